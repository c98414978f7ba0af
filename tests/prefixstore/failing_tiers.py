"""Tiers that fail in every way a tier may, at random or on demand, and tiers that wait."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from dict_tier import DictTier

from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.pages import PAGE_BYTES

_DAMAGED_SHARE = 0.1  # of the records


class FaultyTier(DictTier):
    """Raises, stalls, loses and damages records, at random.

    Args:
        name: Of the tier.
        seed: Seed of the random choices.
        stall_s: How long it stalls.
    """

    def __init__(self, name: str, seed: int, stall_s: float) -> None:
        super().__init__(name, self._fail)
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._stall_s = stall_s
        self.num_faults = 0

    def contains_many(self, names, *, deadline=None):
        with self._lock:
            self._lose()
        return super().contains_many(names, deadline=deadline)

    def _fail(self, call: str) -> None:
        if call in ("check", "close"):
            return
        with self._lock:
            kind = self._rng.choices(("", "stall", "timeout", "down"), (90, 4, 3, 3))[0]
            self.num_faults += kind != ""
        if kind == "stall":
            time.sleep(self._stall_s)
        if kind == "timeout":
            raise TierTimeout(f"{self.name}: expected an answer in time, got none")
        if kind == "down":
            raise TierUnavailable(f"{self.name}: expected a tier, got none")

    def _lose(self) -> None:
        """Now and then drop a record that `contains_many` has just reported."""
        names = list(self.records)
        if names and self._rng.random() < 0.2:
            self.num_faults += self.records.pop(self._rng.choice(names), None) is not None

    def _read(self, name, out):
        num_bytes = super()._read(name, out)
        with self._lock:
            is_damaged = num_bytes and self._rng.random() < _DAMAGED_SHARE
            if is_damaged:
                self.num_faults += 1
                out[self._rng.randrange(num_bytes)] ^= 1 << self._rng.randrange(8)
                num_bytes -= self._rng.randrange(2)  # sometimes also truncated
        return num_bytes


class Gate:
    """Makes calls of a `DictTier` wait until it is opened."""

    def __init__(self, *calls: str) -> None:
        self._calls = calls
        self._opened = threading.Event()
        self.entered = threading.Event()
        self.open: Callable[[], None] = self._opened.set

    def __call__(self, call: str) -> None:
        if call in self._calls:
            self.entered.set()
            assert self._opened.wait(30), "the gate was not opened"


class GatedMemory(MemoryTier):
    """A memory tier whose look-ups wait at a gate; records what `put_many` got."""

    def __init__(self, gate: Gate, capacity_bytes: int) -> None:
        super().__init__(MemoryTierConfig(capacity_bytes, 16 * PAGE_BYTES))
        self._gate = gate
        self.put_names: list[bytes] = []

    def contains_many(self, names, *, deadline=None):
        self._gate("contains")
        return super().contains_many(names, deadline=deadline)

    def put_many(self, names, records, *, priority=0, deadline=None):
        self.put_names += [name.block_hash for name in names]
        return super().put_many(names, records, priority=priority, deadline=deadline)
