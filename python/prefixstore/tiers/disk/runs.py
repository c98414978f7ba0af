"""Slots that lie in a row and have something in common, for one statement to change all of them.

Records that were written together lie together and go together. A statement for each run of them
takes half the time of one for each slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple


class Run(NamedTuple):
    """Neighbours in a slab.

    Attributes:
        slab_id: Of the slab.
        first: The first of the slots.
        last: The last of them.
        common: What they have in common.
        payload: Of each what else its row has, in the order of the slots.
    """

    slab_id: int
    first: int
    last: int
    common: tuple[Any, ...]
    payload: list[Any]

    @property
    def place(self) -> tuple[int, int, int]:
        """For `slab_id = ? AND slot BETWEEN ? AND ?`."""
        return self[:3]


def runs_of(rows: Iterable[tuple[int, int, tuple[Any, ...], Any]]) -> Iterator[Run]:
    """Runs of rows of slab_id, slot, what only slots with the same may share, and anything else."""
    run: list[Any] = []
    start: tuple[int, int, tuple[Any, ...]] | None = None
    for slab_id, slot, common, anything in sorted(rows, key=itemgetter(0, 1)):
        if start is None or (slab_id, slot - len(run), common) != start:
            if start is not None:
                yield _run(*start, run)
            start, run = (slab_id, slot, common), []
        run.append(anything)
    if start is not None:
        yield _run(*start, run)


def _run(slab_id: int, first: int, common: tuple[Any, ...], payload: list[Any]) -> Run:
    return Run(slab_id, first, first + len(payload) - 1, common, payload)
