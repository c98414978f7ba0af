"""Commands that depend on nobody's reply, run by the extension with nothing of Python in between.

What an operation costs in Python (see exchange.py) is more than it takes a small record to travel.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from prefixstore.errors import TierError
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.errors import ConnectionLost, ServerSilent, no_answer, of_a_part
from prefixstore.tiers.redis.pool import PooledChannel
from prefixstore.tiers.redis.servers import Servers
from prefixstore.tiers.redis.wire import UNANSWERED, Reply, RespBatch, Word, open_batch, run_batch

BatchReply: TypeAlias = "Reply | TierError"
BatchCommand: TypeAlias = "tuple[Sequence[Word], Sequence[memoryview] | None, int]"
"""Words and buffers as in `Command`, the key second, and about how much it moves, to or fro."""


@dataclass(eq=False)
class _Lane:
    """One server, and what goes to it."""

    index: int
    address: Address | None
    num_commands: int = 0
    num_bytes: int = 0
    channels: list[PooledChannel] = field(default_factory=list)
    asked_at: float = 0.0
    error: TierError | None = None  # why nothing can be sent on this lane

    @property
    def failures(self) -> list[str]:
        """How connections ended, but for those whose reply did not come in time."""
        return [one.failure for one in self.channels if one.failure and not one.is_late]


class CommandBatch:
    """Commands to any of a tier's servers; to be run once, by one thread, in a `with` statement.

    Where they all go to one server and what they move is told ahead, it gets the first ones while
    others are still being added.

    Args:
        servers: Who holds what. Their connections must be plain, not TLS.
        deadline: What is not answered by then is a `TierTimeout`.
        num_commands: That will be added, about; 0 where there is nothing to begin with.
        num_bytes: That they will move, about.
    """

    def __init__(
        self, servers: Servers, deadline: float, num_commands: int = 0, num_bytes: int = 0
    ) -> None:
        self._servers = servers
        self._name = servers.config.name
        self._deadline = deadline
        self._batch = RespBatch()
        self._lanes: dict[Address | None, _Lane] = {}
        self._lane_of: list[_Lane] = []
        self._is_open = False
        self._expected = (num_commands, num_bytes) if servers.has_one_address else (0, 0)

    def __enter__(self) -> CommandBatch:
        return self

    def __exit__(self, *error: object) -> None:
        self._batch.close()
        for lane in self._lanes.values():
            for channel in lane.channels:
                self._servers.pool.give_back(channel)

    def add(self, commands: Sequence[BatchCommand]) -> int:
        """Have commands run; returns where their replies begin among all."""
        first = len(self._lane_of)
        if not self._servers.has_one_address:
            for command in commands:
                self._add_to(self._lane_to(command[0][1]), [command])
        elif commands:
            # with one server: once a lane is open, further commands follow on it without asking for
            # the address
            lane = self._lane_of[-1] if self._is_open else self._lane_to(commands[0][0][1])
            self._add_to(lane, commands)
            if any(self._expected):
                self._advance()
        return first

    def _add_to(self, lane: _Lane, commands: Sequence[BatchCommand]) -> None:
        lane.num_commands += len(commands)
        lane.num_bytes += sum([num_bytes for _, _, num_bytes in commands])
        self._batch.add(lane.index, commands)
        self._lane_of.extend([lane] * len(commands))

    def _lane_to(self, key: Word) -> _Lane:
        assert isinstance(key, bytes)
        address, error = None, None
        try:
            address = self._servers.address_of(key, self._deadline)
        except TierError as failure:
            error = failure
        # Nearly always the lane of the command before.
        if self._lane_of and address is self._lane_of[-1].address:
            return self._lane_of[-1]
        lane = self._lanes.get(address)
        if lane is None:
            lane = self._lanes[address] = _Lane(len(self._lanes), address, error=error)
        return lane

    def run(self) -> list[BatchReply]:
        """The reply to each command, or why there is none."""
        self._open(0, 0)
        remaining = self._deadline - time.monotonic()
        found = run_batch(self._batch, remaining)  # of what was sent already, also where it is late
        num_missing: Counter[_Lane] = Counter()
        for i, reply in enumerate(found):
            if reply is UNANSWERED:
                lane = self._lane_of[i]
                found[i] = self._missing(lane)
                num_missing[lane] += 1
        answered = [
            lane
            for lane in self._lanes.values()
            if num_missing[lane] < lane.num_commands or any(c.has_received for c in lane.channels)
        ]
        late = [lane for lane in num_missing if lane.error is None and not lane.failures]
        if remaining <= 0:  # preparing took all the time: no server had any
            late = []
        return of_a_part(found) if self._note(answered, late) else found

    def _note(self, answered: Iterable[_Lane], unanswered: Iterable[_Lane]) -> bool:
        """Tell which servers answered, and which did not though they had the time. See
        `Servers.note_call`.
        """
        unreached = [lane for lane in self._lanes.values() if isinstance(lane.error, ServerSilent)]
        return self._servers.note_call(_times_of(answered), _times_of([*unanswered, *unreached]))

    def _advance(self) -> None:
        self._open(*self._expected)
        self._batch.advance()

    def _open(self, num_commands: int, num_bytes: int) -> None:
        """Take connections to all servers that are known now, unless that was done.

        Args:
            num_commands: That each gets at least.
            num_bytes: That they move at least.
        """
        if self._is_open:
            return
        self._is_open = True
        addresses = [address for address in self._lanes if address is not None]
        in_turn = self._servers.to_connect(addresses, len(addresses), self._deadline)
        for address, latest in in_turn:
            lane = self._lanes[address]
            most = max(lane.num_commands, num_commands), max(lane.num_bytes, num_bytes)
            lane.asked_at = time.monotonic()
            try:
                lane.channels = self._servers.borrow(address, *most, latest, lane.asked_at)
            except TierError as error:
                lane.error = error
        open_batch(self._batch, [lane.channels for lane in self._lanes.values()])

    def _missing(self, lane: _Lane) -> TierError:
        """Why a command has no reply."""
        if lane.error is not None:
            return lane.error
        if lane.failures:
            return ConnectionLost(f"{self._name}: {lane.address}: {lane.failures[0]}")
        return no_answer(self._name)


def _times_of(lanes: Iterable[_Lane]) -> dict[Address, float]:
    """When the servers were asked."""
    return {lane.address: lane.asked_at for lane in lanes if lane.address is not None}
