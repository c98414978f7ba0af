"""A memory tier that delivers records at a chosen rate, as if behind a narrow link."""

import threading
import time
from collections.abc import Sequence

from prefixstore.block_key import RecordName
from prefixstore.errors import TierTimeout
from prefixstore.tiers.base import ReadOutcome
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

_STEP_S = 2e-3  # how often reads look how many they are


class ThrottledTier(MemoryTier):
    """Reads take as long as their bytes need on the link, which those under way divide evenly.

    Args:
        config: Of the memory.
        gives_parts: Whether layers of records may be asked for.

    Attributes:
        bytes_per_s: Of the link; may be set at any time.
    """

    bytes_per_s = float("inf")

    def __init__(self, config: MemoryTierConfig, gives_parts: bool = True) -> None:
        super().__init__(config)
        self._gives_parts = gives_parts
        self._lock = threading.Lock()
        self._num_reads = 0

    @property
    def gives_parts(self) -> bool:
        return self._gives_parts

    @property
    def lends(self) -> bool:
        return False  # records behind a link are copied, not lent

    def get_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        offsets: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        with self._lock:
            self._num_reads += 1
        try:
            started = time.monotonic()
            outcomes = super().get_many(names, outs, offsets=offsets, deadline=deadline)
            num_bytes = sum(one for one in outcomes if isinstance(one, int))
            if not self._arrive(num_bytes, started, deadline):
                raise TierTimeout(f"{self.name}: expected {num_bytes} bytes before the deadline")
            return outcomes
        finally:
            with self._lock:
                self._num_reads -= 1

    def _arrive(self, num_bytes: float, started: float, deadline: float | None) -> bool:
        """Wait for bytes that were asked for at `started`; False if the deadline came first."""
        while num_bytes > 0:
            share = self.bytes_per_s / self._num_reads
            wait_s = min(started + num_bytes / share - time.monotonic(), _STEP_S)
            if deadline is not None:
                wait_s = min(wait_s, deadline - time.monotonic())
            time.sleep(max(0.0, wait_s))
            now = time.monotonic()
            num_bytes -= (now - started) * share
            if num_bytes > 0 and deadline is not None and now >= deadline:
                return False
            started = now
        return True
