"""Who uses which block: a free list and reference counts."""

from collections.abc import Iterable


class PoolFullError(RuntimeError):
    """Fewer blocks are free than were asked for; nothing was taken."""


class BlockAllocator:
    """Hands out block ids of a pool and counts who uses them.

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

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block_id: int) -> int:
        self._check_id(block_id)
        return self._ref_counts[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks off the free list, each with one reference.

        Raises:
            ValueError: If `num_blocks` is negative.
            PoolFullError: If fewer are free; nothing is taken then.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks: expected 0 or more, got {num_blocks}")
        if num_blocks > len(self._free):
            raise PoolFullError(
                f"num_blocks: expected at most {len(self._free)} (free now), got {num_blocks}"
            )
        if num_blocks == 0:
            return []
        taken = self._free[-num_blocks:][::-1]
        del self._free[-num_blocks:]
        for block_id in taken:
            self._ref_counts[block_id] = 1
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each block.

        Raises:
            ValueError: If an id is out of range or free; nothing changes then.
        """
        block_ids = list(block_ids)
        for block_id in block_ids:
            self._check_used(block_id)
        for block_id in block_ids:
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop one reference of each block; those at zero go back to the free list.

        Raises:
            ValueError: If an id is out of range or has fewer references than are dropped;
                nothing changes then.
        """
        block_ids = list(block_ids)
        for index, block_id in enumerate(block_ids):
            try:
                self._check_used(block_id)
            except ValueError:
                self._undo_release(block_ids[:index])
                raise
            self._ref_counts[block_id] -= 1
        self._free.extend(
            block_id
            for block_id in dict.fromkeys(reversed(block_ids))
            if self._ref_counts[block_id] == 0
        )

    def check(self) -> list[str]:
        """Recount; returns one line for each thing that is wrong."""
        problems = []
        free = set(self._free)
        if len(free) != len(self._free):
            problems.append("a block is on the free list twice")
        for block_id, count in enumerate(self._ref_counts):
            if count < 0 or (count == 0) != (block_id in free):
                where = "is" if block_id in free else "is not"
                problems.append(f"block {block_id} has {count} references and {where} free")
        return problems

    def _undo_release(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._ref_counts[block_id] += 1

    def _check_id(self, block_id: int) -> None:
        if not 0 <= block_id < len(self._ref_counts):
            raise ValueError(f"block_id: expected 0 to {len(self._ref_counts) - 1}, got {block_id}")

    def _check_used(self, block_id: int) -> None:
        self._check_id(block_id)
        if self._ref_counts[block_id] < 1:
            raise ValueError(f"block_id: expected a block in use, got {block_id}, which is free")
