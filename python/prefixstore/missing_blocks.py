"""What a prompt lacks in the pool: which tiers hold it, and what became of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.residency import first_block_needed, longest_prefix
from prefixstore.reuse_report import DEVICE, MissReason
from prefixstore.store.holders import Holders


@dataclass(frozen=True)
class HeldBlocks:
    """The blocks that would have to be loaded for the longest prefix that can be had.

    Attributes:
        first: The prefix before this block needs nothing.
        tiers: Of each block from there on, the slowest tier that holds a part of it: it is there
            when the last part is.
        record_bytes: `[num_blocks]`, to be read for each.
        needs: `[num_blocks, num_groups]` bool, whether a group's part is to be loaded.
    """

    first: int
    tiers: Sequence[str]
    record_bytes: np.ndarray
    needs: np.ndarray


class MissingBlocks:
    """One prompt's blocks: in the pool, held by a tier as far as is known, or gone.

    Args:
        blocks: The model's.
        keys: Per group, of the prompt's whole blocks.
        found: `[num_found, num_groups]` ids of those in the pool, -1 where there is none; their
            references pass to `block_ids`.

    Attributes:
        keys: As given.
        block_ids: `[num_blocks, num_groups]` int32, with a reference of each; -1 where there is
            none.
        tiers: Where each block lay.
    """

    def __init__(
        self, blocks: BlockCache, keys: Sequence[Sequence[BlockKey]], found: np.ndarray
    ) -> None:
        self._blocks = blocks
        self.keys = keys
        self.block_ids = np.full((len(keys[0]), len(keys)), -1, dtype=np.int32)
        self.block_ids[: len(found)] = found
        self.tiers = [DEVICE] * len(keys[0])
        self._available = [ids >= 0 for ids in self.block_ids.T]
        self._holders: list[dict[int, str]] = [{} for _ in keys]
        self._reasons: dict[int, MissReason] = {}
        self._end = len(keys[0])  # nothing is wanted from this block on

    # ---- who holds what ----------------------------------------------------------------------

    def wanted(self) -> list[list[BlockKey]]:
        """Per group, the keys of what is not in the pool."""
        return [
            [own[number] for number in np.flatnonzero(ids < 0).tolist()]
            for own, ids in zip(self.keys, self.block_ids.T, strict=True)
        ]

    def note_holders(self, answers: Sequence[Holders]) -> None:
        """Per group, the answers for `wanted`."""
        for group, own in enumerate(answers):
            numbers = np.flatnonzero(self.block_ids[:, group] < 0)
            for number, tier in zip(numbers.tolist(), own.tiers, strict=True):
                if tier is not None:
                    self._available[group][number] = True
                    self._holders[group][number] = tier
            self._explain(numbers[[*own.unanswered]], MissReason.UNREACHABLE)
            self._explain(numbers[[*own.barred]], MissReason.QUARANTINED)

    @property
    def num_usable(self) -> int:
        """Blocks of the longest prefix that can be had, and is wanted."""
        return self._longest([own[: self._end] for own in self._available])

    def held(self) -> HeldBlocks:
        """What is to be loaded for it."""
        store, end = self._blocks.store, self.num_usable
        assert store is not None
        first = self._longest([ids >= 0 for ids in self.block_ids.T])
        needs = np.zeros((end - first, len(self.keys)), dtype=bool)
        sums = np.zeros(end - first, dtype=np.int64)
        records = self._blocks.record_bytes(first, end - first)
        for group, num_bytes in enumerate(records):
            own = [number - first for number in self.needed(group, end)]
            needs[own, group] = True
            sums[own] += num_bytes[own]
        ranks = {name: rank for rank, name in enumerate(store.tier_names)}
        tiers: list[str] = []
        for number in reversed(range(first, end)):
            held = [self._holders[g][number] for g in np.flatnonzero(needs[number - first])]
            # A block of which nothing is to be loaded counts with the one after it.
            following = tiers[-1] if tiers else store.tier_names[0]
            tiers.append(max(held, key=ranks.__getitem__, default=following))
        tiers.reverse()
        return HeldBlocks(first, tiers, sums, needs)

    def needed(self, group: int, num_blocks: int) -> list[int]:
        """Numbers of a group's blocks that a prefix of so many needs, and that are not there."""
        window = self._blocks.device.windows[group]
        first = first_block_needed(num_blocks, self._blocks.block_size, window)
        absent = self.block_ids[first:num_blocks, group] < 0
        return (first + np.flatnonzero(absent)).tolist()

    # ---- what becomes of it ------------------------------------------------------------------

    def leave_out(self, end: int) -> None:
        """What tiers hold from block `end` on, as far as it could be had, is computed instead."""
        absent = end + np.flatnonzero((self.block_ids[end : self.num_usable] < 0).any(axis=1))
        self._explain(absent, MissReason.CHEAPER)
        self._end = min(self._end, end)

    def place(self, group: int, numbers: Sequence[int], block_ids: Sequence[int]) -> None:
        """These are to be filled, each with a reference."""
        self.block_ids[numbers, group] = block_ids

    def note_loaded(self, tiers: Mapping[int, str]) -> None:
        """Blocks that were placed came from these tiers."""
        for number, tier in tiers.items():
            self.tiers[number] = tier

    def drop(self, group: int, numbers: Sequence[int]) -> None:
        """Blocks that were placed go back to the pool."""
        for number in numbers:
            self._blocks.device.drop(group, self.block_ids[number : number + 1, group])

    def hand_over(self, group: int, numbers: Sequence[int]) -> None:
        """Blocks that were placed are somebody else's to give back."""
        self.block_ids[numbers, group] = -1

    def fail(self, group: int, numbers: Sequence[int], reason: MissReason) -> None:
        """These did not come, and will not."""
        self._available[group][numbers] = False
        self._explain(numbers, reason)

    def holder(self, group: int, number: int) -> str:
        """The tier that said it holds a block that `held` names."""
        return self._holders[group][number]

    def record_bytes(self, group: int, number: int) -> int:
        """Of a group's part of a block."""
        return int(self._blocks.record_bytes(number, 1)[group][0])

    def misses(self, num_reused: int) -> list[MissReason]:
        """Of each block behind the reused ones, why it is computed."""
        windows = self._blocks.device.windows
        pairs = zip(self._available, windows, strict=True)
        full = [own for own, window in pairs if window is None]
        is_there = np.logical_and.reduce(full or self._available)
        has_windows = any(window is not None for window in windows)
        behind = MissReason.WINDOW if has_windows else MissReason.GAP
        absent = [
            MissReason.EVICTED if was_here else MissReason.NEW
            for was_here in self._blocks.were_here(self.keys[0][num_reused:])
        ]
        return [
            self._reasons.get(number, behind if is_there[number] else gone)
            for number, gone in enumerate(absent, num_reused)
        ]

    def _explain(self, numbers: Collection[int] | np.ndarray, reason: MissReason) -> None:
        self._reasons |= dict.fromkeys(map(int, numbers), reason)

    def _longest(self, available: Sequence[np.ndarray]) -> int:
        device = self._blocks.device
        return longest_prefix(available, device.block_size, device.windows)
