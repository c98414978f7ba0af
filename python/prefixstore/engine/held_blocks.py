"""Which tiers hold the blocks of a prompt, and which of those can be used."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from prefixstore.residency import first_block_needed, longest_prefix
from prefixstore.store.holders import Holders


@dataclass(frozen=True)
class HeldBlocks:
    """The answer of a look-up.

    Attributes:
        tiers: For each block after those on the device, up to the last one that can be used, the
            tier that holds it; None where one is missing. Of several groups' tiers a block counts
            for the slowest: it is there when the last part is.
        cut_off: Numbers of the blocks that tiers hold in vain: a sliding window needs others before
            them that are gone.
        unanswered: Numbers of the blocks that might be used if a tier that gave no answer has what
            it was asked for.
        quarantined: Numbers of the blocks of which some part is not to be loaded, whoever holds it.
    """

    tiers: Sequence[str | None] = ()
    cut_off: Collection[int] = ()
    unanswered: Collection[int] = ()
    quarantined: Collection[int] = ()


def held_blocks(
    answers: Sequence[Holders],
    first: int,
    tier_names: Sequence[str],
    block_size: int,
    windows: Sequence[int | None],
) -> HeldBlocks:
    """What of a look-up's answers is of use.

    Without windows a missing block can be computed between others. With one it cannot: nothing is
    of use behind the longest prefix that all groups have.

    Args:
        answers: Per group, of each block from `first` on.
        first: The blocks before are there.
        tier_names: Fastest first.
        block_size: Tokens in a block.
        windows: Per group, see `longest_prefix`.
    """
    is_held = [np.array([True] * first + [one is not None for one in own.tiers]) for own in answers]
    might_be_held = [own.copy() for own in is_held]
    for might, own in zip(might_be_held, answers, strict=True):
        might[[first + at for at in own.unanswered]] = True
    is_usable = _are_usable(is_held, block_size, windows)
    might_be_usable = _are_usable(might_be_held, block_size, windows)
    end = len(is_usable)
    ranks = {name: rank for rank, name in enumerate(tier_names)}
    tiers: list[str | None] = []
    for number in reversed(range(first, end)):
        held = [
            tier
            for own, window in zip(answers, windows, strict=True)
            if number >= first_block_needed(end, block_size, window)
            and (tier := own.tiers[number - first]) is not None
        ]
        # A block that no group needs counts with the one after it: by itself there is nothing of it
        # to load, or to measure a tier by.
        following = (tiers[-1] if tiers else None) or tier_names[0]
        slowest = max(held, key=ranks.__getitem__, default=following)
        tiers.append(slowest if is_usable[number] else None)
    tiers.reverse()
    unanswered = frozenset(np.flatnonzero(might_be_usable).tolist()).difference(
        np.flatnonzero(is_usable).tolist()
    )
    there = np.flatnonzero(_are_held(is_held, windows))
    cut_off = frozenset(there[there >= end].tolist()) - unanswered
    quarantined = frozenset(first + at for own in answers for at in own.barred)
    return HeldBlocks(tiers, cut_off, unanswered, quarantined)


def _are_held(is_held: Sequence[np.ndarray], windows: Sequence[int | None]) -> np.ndarray:
    """Of each block whether all groups have it that need it wherever the prefix ends."""
    full = [own for own, window in zip(is_held, windows, strict=True) if window is None]
    return np.logical_and.reduce(full or is_held)


def _are_usable(
    is_held: Sequence[np.ndarray], block_size: int, windows: Sequence[int | None]
) -> np.ndarray:
    """Of each block up to the last one that is of use, whether it is."""
    if all(window is None for window in windows):
        there = np.flatnonzero(_are_held(is_held, windows))
        end = int(there[-1]) + 1 if len(there) else 0
    else:
        end = longest_prefix(is_held, block_size, windows)
    is_usable = np.ones(end, dtype=bool)
    for own, window in zip(is_held, windows, strict=True):
        needed = first_block_needed(end, block_size, window)
        is_usable[needed:] &= own[needed:end]
    return is_usable
