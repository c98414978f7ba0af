"""Commands that are known from the start, run by the extension with nothing of Python in between.

What an operation costs in Python (see exchange.py) is more than it takes a small record to travel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from prefixstore.errors import TierError
from prefixstore.tiers.redis.config import Address
from prefixstore.tiers.redis.errors import ConnectionLost, no_answer
from prefixstore.tiers.redis.pool import PooledChannel
from prefixstore.tiers.redis.servers import Servers
from prefixstore.tiers.redis.wire import UNANSWERED, Reply, RespBatch, Word, run_batch

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
    error: TierError | None = None  # why nothing can be sent


class CommandBatch:
    """Commands to any of a tier's servers; to be run once, by one thread.

    Args:
        servers: Who holds what. Their connections must be plain, not TLS.
        deadline: What is not answered by then is a `TierTimeout`.
    """

    def __init__(self, servers: Servers, deadline: float) -> None:
        self._servers = servers
        self._name = servers.config.name
        self._deadline = deadline
        self._batch = RespBatch()
        self._lanes: dict[Address | None, _Lane] = {}
        self._lane_of: list[_Lane] = []

    def add(self, commands: Sequence[BatchCommand]) -> None:
        """Have commands run; among all replies theirs follow those to the ones before."""
        if not self._servers.has_one_address:
            for command in commands:
                self._add_to(self._lane_to(command[0][1]), [command])
        elif commands:
            self._add_to(self._lane_to(commands[0][0][1]), commands)

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
        if self._lane_of and address is self._lane_of[-1].address:  # as nearly always
            return self._lane_of[-1]
        lane = self._lanes.get(address)
        if lane is None:
            lane = self._lanes[address] = _Lane(len(self._lanes), address, error=error)
        return lane

    def run(self) -> list[BatchReply]:
        """The reply to each command, or why there is none."""
        lanes = list(self._lanes.values())
        try:
            for lane in lanes:
                self._open(lane)
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                return [lane.error or no_answer(self._name) for lane in self._lane_of]
            found = run_batch(self._batch, [lane.channels for lane in lanes], remaining)
            is_late = time.monotonic() >= self._deadline
            for i, reply in enumerate(found):
                if reply is UNANSWERED:
                    found[i] = self._missing(self._lane_of[i], is_late)
            return found
        finally:
            for lane in lanes:
                for channel in lane.channels:
                    self._servers.pool.give_back(channel)

    def _open(self, lane: _Lane) -> None:
        if lane.address is None:
            return
        try:
            lane.channels = self._servers.borrow(
                lane.address, lane.num_commands, lane.num_bytes, self._deadline
            )
        except TierError as error:
            lane.error = error

    def _missing(self, lane: _Lane, is_late: bool) -> TierError:
        """Why a command has no reply."""
        if lane.error is not None:
            return lane.error
        if is_late:
            return no_answer(self._name)
        failures = [channel.failure for channel in lane.channels if channel.failure]
        return ConnectionLost(f"{self._name}: {lane.address}: {failures[0]}")
