"""One call of the store for blocks of one layer group, which may be left before it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey


class GroupLoad:
    """Blocks on their way into the pool.

    ::

        under way -> over                 all are the caller's, whether they were found or not
                  -> left, then over      those that had come before it was left are the caller's;
                                          the others go back to the pool once nobody writes to them

    Args:
        blocks: The model's.
        group: Which layer group.
        keys: Of what is loaded.
        block_ids: Where each goes.
    """

    def __init__(
        self, blocks: BlockCache, group: int, keys: Sequence[BlockKey], block_ids: Sequence[int]
    ) -> None:
        self._blocks = blocks
        self._group = group
        self._keys = keys
        self._block_ids = block_ids
        # Made in the caller's thread: it marks the point in that one's stream up to which the
        # blocks may still be read.
        self._target = blocks.pool_blocks[group].target(block_ids)
        self._lock = threading.Lock()
        self._arrived: set[int] = set()
        self._is_left = self._is_over = False
        self.last_arrival = time.monotonic()  # before the first, the beginning

    def run(self, deadline: float) -> list[str | None]:
        """Load them; see `Store.load_many`."""
        assert self._blocks.store is not None
        try:
            return self._blocks.store.load_many(self._keys, self._target, deadline, self._note)
        finally:
            with self._lock:
                self._is_over = True
                is_left = self._is_left
            if is_left:
                self._give_back()

    def leave(self) -> set[int]:
        """Wait no longer; returns which blocks have come. No more than those under way will."""
        with self._lock:
            self._is_left = True
            is_over = self._is_over
        if is_over:
            self._give_back()
        return self._arrived

    def _note(self, arrived: Sequence[int]) -> bool:
        with self._lock:
            if self._is_left:
                return False
            self._arrived.update(arrived)
            self.last_arrival = time.monotonic()
            return True

    def _give_back(self) -> None:
        allocator = self._blocks.device.groups[self._group].allocator
        allocator.release(
            [one for at, one in enumerate(self._block_ids) if at not in self._arrived]
        )
