"""Runs operations beside each other: many commands under way, on many connections, in one thread.

Operations are generators: they yield commands, get the replies, and return an outcome. What each
server is to be told meanwhile is in its lane (lanes.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from prefixstore.errors import TierError
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.errors import (
    ConnectionLost,
    ServerSilent,
    no_answer,
    of_a_part,
    tier_error,
)
from prefixstore.tiers.redis.lanes import Job, Lane, Operation, Running, jobs_of
from prefixstore.tiers.redis.pool import PooledChannel
from prefixstore.tiers.redis.replies import refuse_odd
from prefixstore.tiers.redis.servers import Servers
from prefixstore.tiers.redis.wire import Command, ErrorReply, Reply, take_turn

T = TypeVar("T")

_MAX_REDIRECTS = 5


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
        self._new: deque[Running[T]] = deque()  # of which no lane is known yet
        self._lanes: dict[Address, Lane] = {}
        self._outcomes: list[T | TierError] = []

    def run(self, operations: Iterable[Operation[T]]) -> list[T | TierError]:
        """What each returned, or why it did not."""
        running = [Running(operation, i) for i, operation in enumerate(operations)]
        self._outcomes = [no_answer(self._name)] * len(running)
        unanswered: set[Lane] = set()
        try:
            self._new.extend(running)
            while self._start_more():
                awaiting = self._hand_out()
                remaining = self._deadline - time.monotonic()
                if remaining <= 0:
                    unanswered = self._end(awaiting)
                    break
                if awaiting:
                    take_turn([channel for _, channel in awaiting], remaining)
                for lane, channel in awaiting:
                    self._collect(lane, channel)
            if self._note(unanswered):
                self._outcomes = of_a_part(self._outcomes)
        finally:
            for lane in self._lanes.values():
                for channel in lane.channels:
                    self._servers.pool.give_back(channel)
            for one in running:
                one.operation.close()
        return self._outcomes

    def _end(self, awaiting: Sequence[tuple[Lane, PooledChannel]]) -> set[Lane]:
        """The deadline has come; returns who has not answered all.

        What came meanwhile counts, and is read: this process may have stood still, not the server.
        """
        for lane, channel in awaiting:
            channel.try_to(channel.receive)
            self._collect(lane, channel)
        return {lane for lane, _ in awaiting if lane.num_active and not lane.has_lost}

    def _note(self, unanswered: set[Lane]) -> bool:
        """Tell who answered, and who did not though it had the time. See `Servers.note_call`."""
        lanes = self._lanes.values()
        unreached = [lane for lane in lanes if isinstance(lane.error, ServerSilent)]
        return self._servers.note_call(
            {
                lane.address: lane.asked_at
                for lane in lanes
                if lane.has_answered or any(c.has_received for c in lane.channels)
            },
            {lane.address: lane.asked_at for lane in (*unanswered, *unreached)},
        )

    # ---- operations ----------------------------------------------------------------------------

    def _start_more(self) -> bool:
        """Begin as many operations as keep the connections busy; False when all are done."""
        # A copy, as an operation whose slot moved may add a lane.
        for lane in list(self._lanes.values()):
            while lane.unstarted and lane.has_room:
                self._start(lane, *lane.unstarted.popleft())
        # With one server, stop once it has enough: the rest is prepared while it works. With
        # several, go on: what is first in line must not hide work for the others.
        is_one, has_room = self._servers.has_one_address, True
        while self._new and (has_room or not is_one):
            has_room = self._line_up(self._new.popleft())
        return any(lane.num_active for lane in self._lanes.values())

    def _line_up(self, running: Running[T]) -> bool:
        """Have an operation begin, now or when the server of its first command has room for it;
        False where that has none now.
        """
        commands = self._go_on(running, None)
        if commands is None:
            return True
        try:
            lane = self._lane_of(commands[0])
        except TierError as error:
            self._resume(running, error)
            return True
        if lane.has_room:
            self._start(lane, running, commands)
            return True
        lane.unstarted.append((running, commands))
        return False

    def _start(self, lane: Lane, running: Running[T], commands: list[Command]) -> None:
        """Send an operation's first commands, the very first of them to that lane."""
        first, *others = jobs_of(running, commands)
        lane.take(first)
        lane.waiting.append(first)
        for job in others:
            self._route(job, is_first=False)

    def _resume(self, running: Running[T], error: TierError | None) -> None:
        """Let an operation go on with its replies, and send what it asks for next."""
        commands = self._go_on(running, error)
        if commands is not None:
            for job in reversed(jobs_of(running, commands)):
                self._route(job, is_first=True)

    def _go_on(self, running: Running[T], error: TierError | None) -> list[Command] | None:
        """What an operation asks for next; None where it has its outcome."""
        try:
            if error is not None:
                return running.operation.throw(error)
            if running.replies:
                return running.operation.send(running.replies)
            return next(running.operation)
        except StopIteration as stop:
            self._outcomes[running.index] = stop.value
        except TierError as failure:
            self._outcomes[running.index] = failure
        return None

    def _route(self, job: Job, is_first: bool) -> None:
        """Let a command wait for its server; before all others where it `is_first`."""
        try:
            lane = self._lane_of(job.command)
        except TierError as error:
            self._answer(job, error)
            return
        lane.take(job)
        if is_first:
            lane.waiting.appendleft(job)
        else:
            lane.waiting.append(job)

    def _lane_of(self, command: Command) -> Lane:
        """Where a command goes.

        Raises:
            TierError: If nobody can say which server that is.
        """
        address = command.address
        if address is None:
            address = self._servers.address_of(command.key, self._deadline)
        return self._lane(address)

    def _lane(self, address: Address) -> Lane:
        lane = self._lanes.get(address)
        if lane is None:
            lane = self._lanes[address] = Lane(address)
        return lane

    def _answer(self, job: Job, reply: Reply | TierError) -> None:
        if isinstance(reply, ErrorReply):
            if self._redirect(job, reply):
                return
            reply = None if job.command.is_optional else tier_error(self._name, reply)
        elif not isinstance(reply, TierError):
            reply = refuse_odd(self._name, job.command, reply) or reply
        if job.lane is not None:
            job.lane.let_go(job)
        running = job.running
        running.replies[job.index] = reply
        running.num_missing -= 1
        if running.num_missing == 0:
            errors = [reply for reply in running.replies if isinstance(reply, TierError)]
            self._resume(running, errors[0] if errors else None)

    def _redirect(self, job: Job, reply: ErrorReply) -> bool:
        """Send a command on to the server that another one named."""
        address = self._servers.redirected(reply)
        if address is None or job.num_redirects == _MAX_REDIRECTS:
            return False
        job.num_redirects += 1
        job.is_asking = reply.code == "ASK"
        lane = self._lane(address)
        lane.take(job)
        lane.waiting.appendleft(job)
        return True

    # ---- connections ---------------------------------------------------------------------------

    def _hand_out(self) -> list[tuple[Lane, PooledChannel]]:
        """Give the connections, which are opened where needed, commands that wait; those that
        replies are to come from.
        """
        awaiting = []
        closed = [
            lane.address for lane in self._lanes.values() if lane.waiting and not lane.channels
        ]
        for address, latest in self._servers.to_connect(closed, len(self._lanes), self._deadline):
            self._open(self._lanes[address], latest)
        for lane in self._lanes.values():
            for channel in lane.channels:
                lane.fill(channel)
                if channel.num_awaited:
                    awaiting.append((lane, channel))
        return awaiting

    def _open(self, lane: Lane, latest: float) -> None:
        if lane.error is None:
            num_bytes = sum(job.command.num_bytes for job in lane.waiting)
            lane.asked_at = time.monotonic()
            try:
                lane.channels = self._servers.borrow(
                    lane.address, len(lane.waiting), num_bytes, latest, lane.asked_at
                )
                return
            except TierError as error:
                lane.error = error
        self._fail_waiting(lane, lane.error)

    def _collect(self, lane: Lane, channel: PooledChannel) -> None:
        """Let the operations go on whose replies have come."""
        for job, reply in channel.take_answers():
            lane.has_answered = True
            if job is not None:  # an ASKING has none
                self._answer(job, reply)
        if channel.failure:
            self._lose(lane, channel)

    def _lose(self, lane: Lane, channel: PooledChannel) -> None:
        """What a connection that ended leaves unanswered has failed."""
        lane.channels.remove(channel)
        lane.has_lost = True
        lost = ConnectionLost(f"{self._name}: {lane.address}: {channel.failure}")
        for job in channel.abandon():
            if job is not None:
                self._answer(job, lost)
        channel.close()
        if not lane.channels:
            self._fail_waiting(lane, lost)

    def _fail_waiting(self, lane: Lane, error: TierError) -> None:
        jobs = list(lane.waiting)
        lane.waiting.clear()
        for job in jobs:
            self._answer(job, error)
