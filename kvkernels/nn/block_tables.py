"""The blocks of a batch of equally long sequences in one layer group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from kvkernels.nn.groups import PagedGroup


class BlockTables:
    """Block ids of every sequence, as lists to work with and as the tensor the kernels read.

    ::

        ids    [[4, 9, 2], [7, 1, 3]]      all lists are equally long
        table  [[4, 9, 2, -1], [7, 1, 3, -1]]
                             capacity doubles, so growing by a block writes one column in place

    An id of -1 stands for a block that the group's window never reaches again. The object holds
    one reference to every other block.

    Args:
        group: Whose pool the blocks are of.
        ids: For each sequence, blocks that already hold tokens.
        reserve: Takes a number of blocks, returns their ids with one reference each.
    """

    def __init__(
        self,
        group: PagedGroup,
        ids: Sequence[Sequence[int]],
        reserve: Callable[[int], list[int]],
    ) -> None:
        self.group = group
        self.ids = [list(sequence) for sequence in ids]
        self.block_size = group.pool.layout.block_size
        self._reserve = reserve
        self._write_table(2 * len(self.ids[0]) + 1)

    @property
    def num_blocks(self) -> int:
        """Blocks of each sequence."""
        return len(self.ids[0])

    def grow(self, num_tokens: int, kept: Collection[int] | None = None) -> None:
        """Reserve blocks until every sequence has room for `num_tokens`.

        Args:
            num_tokens: Of each sequence.
            kept: Which new blocks get room, the ids of others being -1; None for all.

        Raises:
            PoolFullError: If the pool has too few; nothing changes then.
            ValueError: If `reserve` gave another number of blocks.
        """
        have, need = self.num_blocks, -(-num_tokens // self.block_size)
        if need <= have:
            return
        wanted = [number for number in range(have, need) if kept is None or number in kept]
        extra = len(wanted)
        fresh = self._reserve(extra * len(self.ids))
        if len(fresh) != extra * len(self.ids):
            raise ValueError(
                f"reserve: expected {extra * len(self.ids)} block ids, got {len(fresh)}"
            )
        for sequence, ids in enumerate(self.ids):
            ids += [-1] * (need - have)
            own = fresh[sequence * extra : (sequence + 1) * extra]
            for number, block_id in zip(wanted, own, strict=True):
                ids[number] = block_id
        if need > self.table.shape[1]:
            self._write_table(2 * need)
        else:
            self.table[:, have:need] = self._column_tensor(have, need)

    def shrink(self, num_tokens: int) -> None:
        """Give back the blocks that lie wholly beyond `num_tokens`.

        Raises:
            ValueError: If a block that the window reaches from there is no longer held.
        """
        self.check_reach(num_tokens)
        keep = -(-num_tokens // self.block_size)
        for ids in self.ids:
            self.group.allocator.release(block_id for block_id in ids[keep:] if block_id >= 0)
            del ids[keep:]
        self._write_table(2 * keep + 1)

    def drop_before(self, first: int) -> None:
        """Give back the blocks before the `first`, which no later token sees."""
        dropped = [block_id for ids in self.ids for block_id in ids[:first] if block_id >= 0]
        if dropped:
            self.group.allocator.release(dropped)
            for ids in self.ids:
                ids[:first] = [-1] * first
            self.table[:, :first] = -1

    def has_holes(self, num_tokens: int) -> bool:
        """Whether some block for tokens from `num_tokens` on has no room."""
        first = num_tokens // self.block_size
        return any(block_id < 0 for ids in self.ids for block_id in ids[first:])

    def first_seen(self, num_tokens: int) -> int:
        """The first block that the token after `num_tokens` can see."""
        window = self.group.window
        return 0 if window is None else max(0, num_tokens - window + 1) // self.block_size

    def own_last_block(self, num_tokens: int) -> None:
        """Replace a partly used last block that has other owners too by a copy.

        To be called before it is written: what the others see must not change.

        Raises:
            PoolFullError: If the pool has no block left for the copy; nothing changes then.
        """
        if num_tokens % self.block_size == 0:
            return
        last = num_tokens // self.block_size
        pool, allocator = self.group.pool, self.group.allocator
        shared = [ids for ids in self.ids if allocator.ref_count(ids[last]) > 1]
        if not shared:
            return
        for ids, copy in zip(shared, self._reserve(len(shared)), strict=True):
            pool.data[copy].copy_(pool.data[ids[last]])
            allocator.release([ids[last]])
            ids[last] = copy
        self._write_table(self.table.shape[1])

    def check_reach(self, num_tokens: int) -> None:
        """Raise ValueError unless all blocks that a token at `num_tokens` can see are held."""
        first = self.first_seen(num_tokens)
        for sequence, ids in enumerate(self.ids):
            for index in range(first, -(-num_tokens // self.block_size)):
                if ids[index] < 0:
                    raise ValueError(
                        f"block_tables: expected block {index} of sequence {sequence} to be"
                        f" held (the window reaches it), got {ids[index]}"
                    )

    def slot_mapping(self, num_tokens: int, num_new: int) -> torch.Tensor:
        """Slots of the `num_new` tokens after `num_tokens`, `[batch * num_new]`, int64."""
        device = self.table.device
        if num_new == 1:
            block, offset = divmod(num_tokens, self.block_size)
            slots = [ids[block] * self.block_size + offset for ids in self.ids]
            return torch.tensor(slots, dtype=torch.int64, device=device)
        positions = torch.arange(num_tokens, num_tokens + num_new, device=device)
        blocks = self.table[:, positions // self.block_size].long()
        return (blocks * self.block_size + positions % self.block_size).reshape(-1)

    def release(self) -> None:
        """Give all references back; the tables are empty afterwards."""
        for ids in self.ids:
            self.group.allocator.release(block_id for block_id in ids if block_id >= 0)
            ids.clear()

    # Outside inference mode: a tensor made inside it could never be written in place outside.
    @torch.inference_mode(False)
    def _write_table(self, capacity: int) -> None:
        self.table = torch.full(
            (len(self.ids), capacity), -1, dtype=torch.int32, device=self.group.pool.device
        )
        if self.num_blocks:
            self.table[:, : self.num_blocks] = self._column_tensor(0, self.num_blocks)

    def _column_tensor(self, start: int, stop: int) -> torch.Tensor:
        columns = [ids[start:stop] for ids in self.ids]
        return torch.tensor(columns, dtype=torch.int32, device=self.group.pool.device)
