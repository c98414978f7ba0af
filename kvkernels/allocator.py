"""Who uses which block: a free list and reference counts."""

import threading
from collections import Counter
from collections.abc import Iterable
from operator import index


class PoolFullError(RuntimeError):
    """Fewer blocks are free than were asked for; nothing was taken."""


class BlockAllocator:
    """Hands out block ids of a pool and counts who uses them. Safe to call from any thread.

    ::

        free list   [7, 3, 9, ...]        a stack: the block freed last is handed out first,
                                          while its memory is still in a near cache
        ref_count   [1, 0, 2, 0, ...]     0 exactly for the blocks on the free list

    Args:
        num_blocks: Blocks in the pool; ids run from 0 to `num_blocks - 1`.
    """

    def __init__(self, num_blocks: int) -> None:
        if not isinstance(num_blocks, int) or num_blocks < 1:
            raise ValueError(f"num_blocks: expected a positive integer, got {num_blocks!r}")
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        # A background writer gives blocks back while requests take them.
        self._lock = threading.Lock()

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free)

    def ref_count(self, block_id: int) -> int:
        """How many users a block has, 0 for a free one; ValueError for an id that there is not."""
        self._check_id(block_id)
        return self._ref_counts[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks off the free list, each with one reference.

        Raises:
            ValueError: If `num_blocks` is negative or no integer.
            PoolFullError: If fewer are free; nothing is taken then.
        """
        if not isinstance(num_blocks, int) or num_blocks < 0:
            raise ValueError(f"num_blocks: expected an integer of 0 or more, got {num_blocks!r}")
        with self._lock:
            if num_blocks > len(self._free):
                raise PoolFullError(
                    f"num_blocks: expected at most {len(self._free)} (free now), got {num_blocks}"
                )
            taken = [self._free.pop() for _ in range(num_blocks)]
            for block_id in taken:
                self._ref_counts[block_id] = 1
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each block.

        Raises:
            ValueError: If an id is out of range or free; nothing changes then.
        """
        block_ids = _integers(block_ids)
        with self._lock:
            for block_id in block_ids:
                self._check_used(block_id, 1)
            for block_id in block_ids:
                self._ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop one reference of each block; those at zero go back to the free list.

        Raises:
            ValueError: If an id is out of range or has fewer references than are dropped;
                nothing changes then.
        """
        drops = Counter(_integers(block_ids))
        with self._lock:
            for block_id, num_drops in drops.items():
                self._check_used(block_id, num_drops)
            for block_id, num_drops in drops.items():
                self._ref_counts[block_id] -= num_drops
                if self._ref_counts[block_id] == 0:
                    self._free.append(block_id)

    def check(self) -> list[str]:
        """Recount; returns one line for each thing that is wrong."""
        with self._lock:
            counts, free_list = list(self._ref_counts), list(self._free)
        free = set(free_list)
        problems = []
        if len(free) != len(free_list):
            problems.append("a block is on the free list twice")
        for block_id, count in enumerate(counts):
            if count < 0 or (count == 0) != (block_id in free):
                where = "is" if block_id in free else "is not"
                problems.append(f"block {block_id} has {count} references and {where} free")
        return problems

    def _check_id(self, block_id: int) -> None:
        if not 0 <= block_id < len(self._ref_counts):
            raise ValueError(f"block_id: expected 0 to {len(self._ref_counts) - 1}, got {block_id}")

    def _check_used(self, block_id: int, num_references: int) -> None:
        self._check_id(block_id)
        if self._ref_counts[block_id] < num_references:
            raise ValueError(
                f"block_id: expected a block with {num_references} references or more,"
                f" got {block_id} with {self._ref_counts[block_id]}"
            )


def _integers(block_ids: Iterable[int]) -> list[int]:
    """The ids as Python's integers: elements of a tensor are views, and each is another key."""
    return [*map(index, block_ids)]
