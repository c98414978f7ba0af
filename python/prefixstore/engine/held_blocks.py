"""Which tiers hold the blocks of a prompt, and which of those can be used."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from prefixstore.residency import first_block_needed, longest_prefix


@dataclass(frozen=True)
class HeldBlocks:
    """The answer of a look-up.

    Attributes:
        tiers: For each block after those on the device, up to the last one that can be used, the
            tier that holds it; None where one is missing. Of several groups' tiers a block counts
            for the slowest: it is there when the last part is.
        cut_off: Numbers of the blocks that tiers hold in vain: a sliding window needs others before
            them that are gone.
    """

    tiers: Sequence[str | None] = ()
    cut_off: Collection[int] = ()


def held_blocks(
    answers: Sequence[Sequence[str | None]],
    first: int,
    tier_names: Sequence[str],
    block_size: int,
    windows: Sequence[int | None],
) -> HeldBlocks:
    """What of a look-up's answers is of use.

    Without windows a missing block can be computed between others. With one it cannot: nothing is
    of use behind the longest prefix that all groups have.

    Args:
        answers: Per group, for each block from `first` on, the tier that holds it.
        first: The blocks before are there.
        tier_names: Fastest first.
        block_size: Tokens in a block.
        windows: Per group, see `longest_prefix`.
    """
    is_held = [np.array([True] * first + [tier is not None for tier in own]) for own in answers]
    full = [own for own, window in zip(is_held, windows, strict=True) if window is None]
    there = np.flatnonzero(np.logical_and.reduce(full or is_held))
    if len(full) == len(is_held):
        end = int(there[-1]) + 1 if len(there) else 0
    else:
        end = longest_prefix(is_held, block_size, windows)
    ranks = {name: rank for rank, name in enumerate(tier_names)}
    tiers: list[str | None] = []
    for number in range(first, end):
        needed = [
            own[number - first]
            for own, window in zip(answers, windows, strict=True)
            if number >= first_block_needed(end, block_size, window)
        ]
        held = [tier for tier in needed if tier is not None]
        # What no group needs is as good as there.
        slowest = max(held, key=ranks.__getitem__, default=tier_names[0])
        tiers.append(slowest if len(held) == len(needed) else None)
    return HeldBlocks(tiers, frozenset(there[there >= end].tolist()))
