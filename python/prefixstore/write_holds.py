"""Blocks that wait to be written to a tier: each has a reference until its bytes are read."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from kvkernels.nn import PagedGroup

# Of a pool of windows, one block in so many at most waits to be written.
_WRITING_SHARE = 4

_LOOK_S = 0.02  # how often who waits looks whether others than writers gave blocks back


class WriteHolds:
    """What writers hold of the pools of all layer groups.

    Args:
        groups: Pool, allocator and window of each.
        holds_windows: Whether the pool of a group is one of windows, smaller than those of whole
            contexts.
    """

    def __init__(self, groups: Sequence[PagedGroup], holds_windows: Callable[[int], bool]) -> None:
        self._groups = groups
        self._holds_windows = holds_windows
        self._counts: list[Counter[int]] = [Counter() for _ in groups]  # writes of each block
        self._lock = threading.Lock()
        self._has_ended = threading.Condition(self._lock)

    def max_blocks(self, group: int) -> int:
        """Blocks of a group that may wait to be written.

        A pool of windows is small, and serving must not wait until a slow tier has what is in it.
        """
        num_blocks = self._groups[group].pool.num_blocks
        return num_blocks // _WRITING_SHARE if self._holds_windows(group) else num_blocks

    def has_room(self, group: int) -> bool:
        """Whether one more block may wait to be written."""
        with self._lock:
            return len(self._counts[group]) < self.max_blocks(group)

    def begin(self, group: int, block_id: int) -> None:
        """A writer holds a block until `end`."""
        self._groups[group].allocator.share([block_id])
        with self._lock:
            self._counts[group][block_id] += 1

    def end(self, group: int, block_id: int) -> None:
        """The writer has read it."""
        with self._lock:
            counts = self._counts[group]
            counts[block_id] -= 1
            if counts[block_id] == 0:
                del counts[block_id]
            # Under the lock: whoever finds no write any more finds its block free.
            self._groups[group].allocator.release([block_id])
            self._has_ended.notify_all()

    def wait(self, group: int, deadline: float) -> bool:
        """Wait until a writer lets go of a block of a group, or a little while.

        Sessions give back and unpin blocks beside this, and in a place that knows nobody who waits.

        Returns:
            Whether more may come: False if no writer holds any, or it is late.
        """
        with self._lock:
            left_s = deadline - time.monotonic()
            if not self._counts[group] or left_s <= 0:
                return False
            self._has_ended.wait(min(left_s, _LOOK_S))
            return True

    def num_leaving(self, group: int) -> int:
        """Blocks that a writer alone still holds: they will soon be free."""
        ref_count = self._groups[group].allocator.ref_count
        with self._lock:
            held = list(self._counts[group].items())
        return sum(ref_count(block_id) == num_writes for block_id, num_writes in held)
