"""A memory tier that delivers records at a chosen rate, as if behind a narrow link."""

import threading
import time
from collections.abc import Sequence

from prefixstore.block_key import RecordName
from prefixstore.errors import TierTimeout
from prefixstore.tiers.base import ReadOutcome
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig


class ThrottledTier(MemoryTier):
    """Reads take one after another as long as their bytes need on the link, or as memory if longer.

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
        self._link = threading.Lock()

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
        with self._link:
            started = time.monotonic()
            outcomes = super().get_many(names, outs, offsets=offsets, deadline=deadline)
            num_bytes = sum(one for one in outcomes if isinstance(one, int))
            arrives = started + num_bytes / self.bytes_per_s
            until = arrives if deadline is None else min(arrives, deadline)
            time.sleep(max(0.0, until - time.monotonic()))
            if until < arrives:
                raise TierTimeout(f"{self.name}: expected {num_bytes} bytes before the deadline")
            return outcomes
