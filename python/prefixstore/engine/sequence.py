"""The blocks of one running sequence, in every layer group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.index import Match
from prefixstore.residency import first_block_needed


class SequenceBlocks:
    """Which blocks hold a sequence's tokens, and what of them is shared with others.

    ::

        group 0 (full)      4   9   2   7   .      7: being filled
        group 1 (sliding)  -1  -1   5   8   .      what no later token can see was given back
                           published -> |

    It holds one reference to each block in its tables and to each spare one, and a pin on the
    published run. One thread at a time.

    Args:
        blocks: Of the model.
        tokens: Of the sequence so far, ``[num_tokens]``, uint32.
        salt: The namespace.
        keys: Per group, those of the tokens' whole blocks; grow with the sequence.
        max_tokens: That the sequence may come to hold.
    """

    def __init__(
        self,
        blocks: BlockCache,
        tokens: np.ndarray,
        salt: str,
        keys: Sequence[list[BlockKey]],
        max_tokens: int,
    ) -> None:
        self._blocks = blocks
        self._device = device = blocks.device
        self._salt = salt
        self._keys = keys
        self._spare: list[list[int]] = [[] for _ in device.groups]
        # Per group: blocks before this one were given back.
        self._dropped = [0] * len(device.groups)
        capacity = -(-max_tokens // blocks.block_size)
        self.tables = np.full((len(device.groups), capacity), -1, dtype=np.int32)
        self._match: Match | None = None
        self._whole = tokens[: (len(tokens) - 1) // blocks.block_size * blocks.block_size]
        self.num_reused = self.num_published = self._take_cached()
        self._num_untouched = self.num_reused
        self._computed: list[int] = []  # whole blocks, not yet published

    def reserve(self, num_tokens: int) -> None:
        """Set blocks aside, so that the sequence can come to hold so many tokens.

        In sliding groups, whose blocks come back while it runs, nothing is set aside: there
        `WindowBudget` sees to it.

        Raises:
            PoolFullError: If the pool has too few; those set aside so far stay so.
        """
        need = -(-num_tokens // self._blocks.block_size)
        for group, window in enumerate(self._device.windows):
            missing = need - self.num_published - len(self._spare[group])
            if window is None and missing > 0:
                self._spare[group] += self._device.reserve_now(group, missing)

    def count_look_up(self) -> None:
        """Count the prompt as looked up; once, and before any of it is published."""
        self._device.count_look_up(self._whole, self._salt)

    def take(self, group: int, num_blocks: int) -> list[int]:
        """Blocks to be filled, from those set aside and then from the pool.

        Raises:
            PoolFullError: If the pool has too few; nothing is taken then.
        """
        spare = self._spare[group]
        missing = num_blocks - len(spare)
        if missing > 0:
            spare += self._device.reserve_now(group, missing)
        taken = spare[len(spare) - num_blocks :]
        del spare[len(spare) - num_blocks :]
        return taken

    def grow(self, first_token: int, end_token: int) -> None:
        """Have blocks where these tokens go.

        Raises:
            PoolFullError: If the pool has too few.
        """
        size = self._blocks.block_size
        first, end = first_token // size, -(-end_token // size)
        for group, table in enumerate(self.tables):
            missing = first + np.flatnonzero(table[first:end] < 0)
            if len(missing):
                table[missing] = self.take(group, len(missing))

    def cut(self, num_blocks: int) -> None:
        """Keep the first blocks; what the others hold is to be written again."""
        for table, spare in zip(self.tables, self._spare, strict=True):
            rest = table[num_blocks:]
            spare += rest[rest >= 0].tolist()
            rest[:] = -1

    def place(self, group: int, block_ids: Mapping[int, int]) -> None:
        """Take over filled blocks, by their numbers."""
        for number, block_id in block_ids.items():
            assert self.tables[group, number] < 0, "a block was computed and loaded"
            self.tables[group, number] = block_id

    def note_computed(self, start: int, stop: int) -> None:
        """These tokens were computed; their whole blocks are new to the tiers."""
        size = self._blocks.block_size
        self._computed += range(start // size, stop // size)

    def publish(self, tokens: np.ndarray, num_stored: int) -> None:
        """Offer the whole blocks of the first `num_stored` tokens to others, and to the tiers."""
        size = self._blocks.block_size
        num_blocks = num_stored // size
        if num_blocks <= self.num_published:
            return
        prefix = tokens[: num_blocks * size]
        self._blocks.extend_keys(self._keys, prefix, self._salt)
        computed = [number for number in self._computed if number < num_blocks]
        ids = np.ascontiguousarray(self.tables[:, :num_blocks].T)
        match = self._blocks.publish(prefix, self._salt, ids, computed, self._keys)
        self._computed = self._computed[len(computed) :]
        self.num_published = num_blocks
        # The old pin would keep a window alive that has passed.
        if match is not None or any(self._dropped):
            self._unpin()
            self._match = match

    def touch_reused(self) -> None:
        """Tell the tiers, once, of what was shared from the start; before any of it is dropped."""
        num_blocks, self._num_untouched = self._num_untouched, 0
        if num_blocks:
            ids = np.ascontiguousarray(self.tables[:, :num_blocks].T)
            self._blocks.touch(self._keys, ids, range(num_blocks))

    def drop_passed(self, num_stored: int) -> None:
        """Give back the blocks that no token from `num_stored` on can see.

        Only published blocks go: a block that is published later must still be there.
        """
        size = self._blocks.block_size
        for group, window in enumerate(self._device.windows):
            first = min(first_block_needed(num_stored // size, size, window), self.num_published)
            self._device.drop(group, self.tables[group, self._dropped[group] : first])
            self._dropped[group] = max(self._dropped[group], first)

    def first_not_finite(self, num_stored: int) -> int | None:
        """Of the whole blocks of the first `num_stored` tokens, the first with a NaN or infinity.

        Only what the sequence holds is looked at.
        """
        found = []
        for group, table in zip(self._device.groups, self.tables, strict=True):
            held = table[: num_stored // self._blocks.block_size]
            numbers = np.flatnonzero(held >= 0).tolist()
            if numbers:
                data = group.pool.data
                is_finite = torch.stack([data[one].isfinite().all() for one in held[numbers]])
                found += [numbers[at] for at in (~is_finite).nonzero()[:1, 0].tolist()]
        return min(found, default=None)

    def release(self) -> None:
        """Give everything back; what was published stays cached."""
        self._device.release(np.ascontiguousarray(self.tables.T))
        self.tables[:] = -1
        for group, spare in zip(self._device.groups, self._spare, strict=True):
            group.allocator.release(spare)
            spare.clear()
        self._unpin()

    def _take_cached(self) -> int:
        """Share the longest prefix on the device, leaving a token to compute; its whole blocks."""
        device, size = self._device, self._blocks.block_size
        self._match, ids = device.find_usable(self._whole, self._salt)
        self._dropped = [first_block_needed(len(ids), size, window) for window in device.windows]
        self.tables[:, : len(ids)] = ids.T
        return len(ids)

    def _unpin(self) -> None:
        match, self._match = self._match, None
        if match is not None:
            self._device.unpin(match)
