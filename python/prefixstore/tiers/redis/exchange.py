"""Runs operations beside each other: many commands under way, on many connections, in one thread.

    operation  a generator that yields commands, gets their replies, and returns an outcome
    lane       one server: commands that wait, and the connections that share them

A connection takes the next command that waits when it has few under way, so a slow one does less.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from prefixstore.errors import TierError, TierTimeout
from prefixstore.tiers.redis.config import Address
from prefixstore.tiers.redis.errors import ConnectionLost, tier_error
from prefixstore.tiers.redis.pool import PooledChannel
from prefixstore.tiers.redis.servers import Servers
from prefixstore.tiers.redis.wire import Command, ErrorReply, Reply, StreamError

T = TypeVar("T")
Operation: TypeAlias = Generator[list[Command], list[Any], T]

# Under way on one connection, and never fewer than _MIN_COMMANDS. More keeps no connection busier,
# but makes a server hold more replies at once, and they fall out of its caches.
_WINDOW_BYTES = 2 << 20
_MIN_COMMANDS = 2
_MAX_COMMANDS = 256
_BYTES_PER_CONNECTION = 1 << 20  # less is not worth another connection
_MAX_REDIRECTS = 5
# Begun at once, for each server. An operation goes on before another begins, so that a server that
# gets full while long records are written has whole ones, and not the first parts of all.
_ACTIVE_BYTES = 8 << 20
_MIN_ACTIVE_COMMANDS = 8
_MAX_ACTIVE_COMMANDS = 1024


@dataclass(eq=False)
class _Running(Generic[T]):
    operation: Operation[T]
    index: int
    replies: list[Any] = field(default_factory=list)
    num_missing: int = 0


@dataclass(eq=False)
class _Job:
    """A command under way, and where its reply belongs."""

    running: _Running[Any]
    index: int
    num_redirects: int = 0
    is_asking: bool = False


@dataclass(eq=False)
class _Lane:
    address: Address
    waiting: deque[Command] = field(default_factory=deque)
    channels: list[PooledChannel] = field(default_factory=list)


class Exchange(Generic[T]):
    """One call's operations on the servers of a tier; to be used once, by one thread.

    Args:
        servers: Who holds what.
        deadline: What is not done by then is a `TierTimeout`.
    """

    def __init__(self, servers: Servers, deadline: float) -> None:
        self._servers = servers
        self._name = servers.config.name
        self._deadline = deadline
        self._unstarted: deque[_Running[T]] = deque()
        self._jobs: dict[Command, _Job] = {}
        self._active_bytes = 0
        self._lanes: dict[Address, _Lane] = {}
        self._lane_of: dict[int, tuple[_Lane, PooledChannel]] = {}
        self._poll = select.poll()
        self._events: dict[PooledChannel, int] = {}  # what is waited for
        self._outcomes: list[T | TierError] = []

    def run(self, operations: Iterable[Operation[T]]) -> list[T | TierError]:
        """What each returned, or why it did not."""
        running = [_Running(operation, i) for i, operation in enumerate(operations)]
        late = TierTimeout(f"{self._name}: expected an answer before the deadline, got none")
        self._outcomes = [late] * len(running)
        try:
            self._unstarted.extend(running)
            while self._start_more():
                is_awaiting = self._write()
                remaining = self._deadline - time.monotonic()
                if remaining <= 0:
                    break
                for fd, _ in self._poll.poll(remaining * 1e3) if is_awaiting else ():
                    self._read(*self._lane_of[fd])
        finally:
            for lane in self._lanes.values():
                for channel in lane.channels:
                    self._servers.pool.give_back(channel)
            for one in running:
                one.operation.close()
        return self._outcomes

    # ---- operations ----------------------------------------------------------------------------

    def _start_more(self) -> bool:
        """Begin as many operations as keep the connections busy; False when all are done."""
        max_bytes = _ACTIVE_BYTES * max(1, len(self._lanes))
        while self._unstarted and (
            len(self._jobs) < _MIN_ACTIVE_COMMANDS
            or (len(self._jobs) < _MAX_ACTIVE_COMMANDS and self._active_bytes < max_bytes)
        ):
            self._resume(self._unstarted.popleft(), None)
        return bool(self._jobs)

    def _resume(self, running: _Running[T], error: TierError | None) -> None:
        """Let an operation go on with its replies, and send what it asks for next."""
        is_new = not running.replies and error is None
        try:
            if error is not None:
                commands = running.operation.throw(error)
            elif is_new:
                commands = next(running.operation)
            else:
                commands = running.operation.send(running.replies)
        except StopIteration as stop:
            self._outcomes[running.index] = stop.value
            return
        except TierError as failure:
            self._outcomes[running.index] = failure
            return
        running.replies = [None] * len(commands)
        running.num_missing = len(commands)
        for index, command in enumerate(commands):
            self._jobs[command] = _Job(running, index)
            self._active_bytes += command.num_bytes
        if is_new:
            for command in commands:
                self._route(command, is_first=False)
        else:
            for command in reversed(commands):
                self._route(command, is_first=True)

    def _route(self, command: Command, is_first: bool) -> None:
        """Let a command wait for its server; before all others where it `is_first`."""
        address = command.address
        try:
            if address is None:
                address = self._servers.address_of(command.key, self._deadline)
        except TierError as error:
            self._answer(command, error)
            return
        waiting = self._lanes.setdefault(address, _Lane(address)).waiting
        if is_first:
            waiting.appendleft(command)
        else:
            waiting.append(command)

    def _answer(self, command: Command, reply: Reply | TierError) -> None:
        job = self._jobs.get(command)
        if job is None:  # an ASKING
            return
        if isinstance(reply, ErrorReply):
            if self._redirect(command, job, reply):
                return
            reply = None if command.is_optional else tier_error(self._name, reply)
        del self._jobs[command]
        self._active_bytes -= command.num_bytes
        running = job.running
        running.replies[job.index] = reply
        running.num_missing -= 1
        if running.num_missing == 0:
            errors = [reply for reply in running.replies if isinstance(reply, TierError)]
            self._resume(running, errors[0] if errors else None)

    def _redirect(self, command: Command, job: _Job, reply: ErrorReply) -> bool:
        """Send a command on to the server that another one named."""
        address = self._servers.redirected(reply)
        if address is None or job.num_redirects == _MAX_REDIRECTS:
            return False
        job.num_redirects += 1
        job.is_asking = reply.code == "ASK"
        self._lanes.setdefault(address, _Lane(address)).waiting.appendleft(command)
        return True

    # ---- connections ---------------------------------------------------------------------------

    def _write(self) -> bool:
        """Open what is needed and send what fits; whether any replies are to come."""
        is_awaiting = False
        for lane in list(self._lanes.values()):
            if lane.waiting and not lane.channels:
                self._open(lane)
            for channel in list(lane.channels):
                try:
                    self._fill(lane, channel)
                    channel.flush()
                except StreamError as error:
                    self._lose(lane, channel, error)
                    continue
                events = select.POLLIN | (select.POLLOUT if channel.has_output else 0)
                if self._events.get(channel) != events:
                    self._poll.register(channel, events)
                    self._events[channel] = events
                is_awaiting = is_awaiting or channel.num_awaited > 0
        return is_awaiting

    def _open(self, lane: _Lane) -> None:
        num_bytes = sum(command.num_bytes for command in lane.waiting)
        # Over a unix socket one keeps a server busy, which reads but one at a time.
        most = self._servers.config.num_connections if lane.address.port else 1
        num_wanted = min(
            most,
            len(lane.waiting),
            max(1, num_bytes // _BYTES_PER_CONNECTION),
        )
        try:
            for _ in range(num_wanted):
                channel = self._servers.pool.borrow(lane.address, self._deadline)
                lane.channels.append(channel)
                self._lane_of[channel.fileno()] = lane, channel
        except TierError as error:
            if not lane.channels:  # fewer than wanted will do
                self._fail_waiting(lane, error)

    def _fill(self, lane: _Lane, channel: PooledChannel) -> bool:
        """Give a connection commands that wait, as far as it has few under way; False if none."""
        if channel.num_awaited >= _MIN_COMMANDS and channel.awaited_bytes > _WINDOW_BYTES // 2:
            return False  # several small ones leave together, later
        has_more = bool(lane.waiting)
        while lane.waiting and (
            channel.num_awaited < _MIN_COMMANDS
            or (channel.num_awaited < _MAX_COMMANDS and channel.awaited_bytes < _WINDOW_BYTES)
        ):
            command = lane.waiting.popleft()
            if self._jobs[command].is_asking:
                channel.push(Command((b"ASKING",)))
            channel.push(command)
        return has_more

    def _read(self, lane: _Lane, channel: PooledChannel) -> None:
        try:
            for command, reply in channel.receive():
                self._answer(command, reply)
                if self._fill(lane, channel):
                    channel.flush()
        except StreamError as error:
            self._lose(lane, channel, error)

    def _lose(self, lane: _Lane, channel: PooledChannel, error: StreamError) -> None:
        """What a connection that ended leaves unanswered has failed."""
        lane.channels.remove(channel)
        if self._events.pop(channel, None) is not None:
            self._poll.unregister(channel)
        lost = ConnectionLost(f"{self._name}: {lane.address}: {error}")
        for command in channel.abandon():
            self._answer(command, lost)
        channel.close()
        if not lane.channels:
            self._fail_waiting(lane, lost)

    def _fail_waiting(self, lane: _Lane, error: TierError) -> None:
        commands = list(lane.waiting)
        lane.waiting.clear()
        for command in commands:
            self._answer(command, error)
