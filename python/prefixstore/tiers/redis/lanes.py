"""What servers are to be told: operations that begin, commands that wait, and where replies go.

    operation  a generator that yields commands, gets their replies, and returns an outcome
    lane       one server: operations that are to begin there, commands that wait, and the
               connections that share them

A connection takes the next command that waits when it has few under way, so a slow one does less.
Each lane begins operations when it has few commands itself, so a server that hangs holds up no
other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from prefixstore.errors import TierError
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.pool import PooledChannel
from prefixstore.tiers.redis.wire import Command

T = TypeVar("T")
Operation: TypeAlias = Generator[list[Command], list[Any], T]

# Under way on one connection, and never fewer than _MIN_COMMANDS. More keeps no connection busier,
# but makes a server hold more replies at once, and they fall out of its caches.
_WINDOW_BYTES = 2 << 20
_MIN_COMMANDS = 2
_MAX_COMMANDS = 256
# Begun at once, for each server. An operation goes on before another begins, so that a server that
# gets full while long records are written has whole ones, and not the first parts of all.
_ACTIVE_BYTES = 8 << 20
_MIN_ACTIVE_COMMANDS = 8
_MAX_ACTIVE_COMMANDS = 1024


@dataclass(eq=False, slots=True)
class Running(Generic[T]):
    """An operation that has begun, the replies it waits for, and the number of its outcome."""

    operation: Operation[T]
    index: int
    replies: list[Any] = field(default_factory=list)
    num_missing: int = 0


@dataclass(eq=False, slots=True)
class Job:
    """A command under way, and where its reply belongs."""

    command: Command
    running: Running[Any]
    index: int
    lane: Lane | None = None  # that it is counted to
    num_redirects: int = 0
    is_asking: bool = False


@dataclass(eq=False)
class Lane:
    """What one call asks of one server."""

    address: Address
    unstarted: deque[tuple[Running[Any], list[Command]]] = field(default_factory=deque)
    waiting: deque[Job] = field(default_factory=deque)
    channels: list[PooledChannel] = field(default_factory=list)
    asked_at: float = 0.0
    error: TierError | None = None  # why there is no connection; it is tried only once
    has_answered: bool = False
    has_lost: bool = False  # lost a connection, so missing replies do not mean that it is silent
    num_active: int = 0  # commands sent whose reply has not come
    active_bytes: int = 0

    @property
    def has_room(self) -> bool:
        """Whether another operation is to begin."""
        return self.num_active < _MIN_ACTIVE_COMMANDS or (
            self.num_active < _MAX_ACTIVE_COMMANDS and self.active_bytes < _ACTIVE_BYTES
        )

    def take(self, job: Job) -> None:
        """Count a command here, and no longer where it was before."""
        if job.lane is not None:
            job.lane.let_go(job)
        job.lane = self
        self.num_active += 1
        self.active_bytes += job.command.num_bytes

    def let_go(self, job: Job) -> None:
        """A command has its reply, or goes elsewhere."""
        job.lane = None
        self.num_active -= 1
        self.active_bytes -= job.command.num_bytes

    def fill(self, channel: PooledChannel) -> None:
        """Give a connection commands that wait, as far as it has few under way."""
        num_awaited, awaited_bytes = channel.num_awaited, channel.awaited_bytes
        while self.waiting and (
            num_awaited < _MIN_COMMANDS
            or (num_awaited < _MAX_COMMANDS and awaited_bytes < _WINDOW_BYTES)
        ):
            job = self.waiting.popleft()
            if job.is_asking:
                channel.push(Command((b"ASKING",)))
            channel.push(job.command, job)
            num_awaited += 1
            awaited_bytes += job.command.num_bytes


def jobs_of(running: Running[Any], commands: list[Command]) -> list[Job]:
    """The commands that an operation asked for, none of which has a reply yet."""
    running.replies = [None] * len(commands)
    running.num_missing = len(commands)
    return [Job(command, running, index) for index, command in enumerate(commands)]
