"""Which neighbouring sequences of a batch are to be one group, whose shared blocks are read once.

::

    blocks shared with the one before        9   9   1   9   9
    sequences                              0   1   2   3   4   5
    one group                              [ . . . . . . . . . ]     5 x 1 blocks are not read again
    two                                    [ . . . ]   [ . . . ]     2 x 9 and 2 x 9
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise


def find_groups(num_seqs: int, common: Sequence[int]) -> list[tuple[int, int]]:
    """Cut a batch where most is saved: each group's size, and the blocks that all of it shares.

    A group shares no more than any two neighbours in it, so a long prefix is worth more without a
    sequence beside it that has only its first block.

    Args:
        num_seqs: In the batch.
        common: Leading blocks that each sequence but the first shares with the one before it.
    """
    # Entry `end` is about the first `end` sequences: the most blocks that need not be read again,
    # and the last group (start, shared blocks) of the cut that reaches it.
    best, last_groups = [0], [(0, 0)]
    # Starts that a group ending here may have, with the blocks it would share, ascending:
    #     common 3 1 2 2   ->   (1, starts 0 and 1), (2, starts 2 and 3)
    runs: list[tuple[int, list[int]]] = []
    for end in range(1, num_seqs + 1):
        if end > 1:
            _add_neighbour(runs, best, end - 2, common[end - 2])
        most, group = best[-1], (end - 1, 0)
        for index in range(len(runs) - 1, -1, -1):
            shared, (start, *_) = runs[index]
            saved = best[start] + (end - start - 1) * shared
            if saved >= most:
                most, group = saved, (start, shared)
            # Stop early: a group from an earlier start shares at most what the next run does, and
            # the cut before it saves at most what the best cut before this start does, plus one
            # such share.
            if index and best[start] + (end - start) * runs[index - 1][0] < most:
                break
        best.append(most)
        last_groups.append(group)
    groups: list[tuple[int, int]] = []
    end = num_seqs
    while end:
        first, shared = last_groups[end]
        size = end - first
        groups += [(size, shared)] if size > 1 and shared else [(1, 0)] * size
        end = first
    return groups[::-1]


def _add_neighbour(
    runs: list[tuple[int, list[int]]], best: Sequence[int], last: int, shared: int
) -> None:
    """Let groups go on to one more sequence, which shares so much with the `last` before it.

    Of the starts in a run those are kept, in their order, that may save most now or when the group
    shares less: `best` over `start` is an upper hull, and the first is the one that saves most.
    """
    joined = []
    while runs and runs[-1][0] >= shared:
        joined.append(runs.pop()[1])
    if not shared:
        return
    starts = joined.pop() if joined else []
    for start in chain(*reversed(joined), [last]):
        while len(starts) > 1 and _is_below(starts[-2], starts[-1], start, best):
            starts.pop()
        starts.append(start)
    # Drop early starts for good: as `end` grows, a group shares ever fewer blocks, and the fewer it
    # shares the better a later start is.
    num_passed = 0
    for start, later in pairwise(starts):
        if best[later] - best[start] <= (later - start) * shared:
            break
        num_passed += 1
    del starts[:num_passed]
    runs.append((shared, starts))


def _is_below(left: int, middle: int, right: int, best: Sequence[int]) -> bool:
    """Whether a start is never better than both of its neighbours."""
    rise, next_rise = best[middle] - best[left], best[right] - best[middle]
    return rise * (right - middle) <= next_rise * (middle - left)
