"""What tiers say they hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from prefixstore.block_key import RecordName
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.tiers.base import is_past


@dataclass(frozen=True)
class Holders:
    """The tiers' answers about some records.

    Attributes:
        tiers: For each the name of the fastest tier that says it holds it, or None.
        unanswered: Indices of those that no tier says it holds, and of which some tier said
            nothing.
        barred: Indices of those that no tier was asked for.
    """

    tiers: Sequence[str | None]
    unanswered: Collection[int] = ()
    barred: Collection[int] = ()

    def split(self, sizes: Sequence[int]) -> list[Holders]:
        """The same, of one part after another of so many records."""
        parts, start = [], 0
        for size in sizes:
            unanswered = {i for i in range(size) if start + i in self.unanswered}
            barred = {i for i in range(size) if start + i in self.barred}
            parts.append(Holders(self.tiers[start : start + size], unanswered, barred))
            start += size
        return parts


def find_holders(
    tiers: Sequence[GuardedTier],
    names: Sequence[RecordName],
    is_barred: Sequence[bool],
    deadline: float,
    progress: Callable[[Holders], None] | None = None,
) -> Holders:
    """Ask one tier after another, each for what those before it do not hold.

    Args:
        tiers: Fastest first.
        names: Of the records.
        is_barred: For each whether it is not to be found anywhere.
        deadline: Of `time.monotonic()`.
        progress: Told before each tier is asked of the answers so far, as if this one and those
            behind it said nothing.
    """
    found: list[str | None] = [None] * len(names)
    barred = {i for i, one in enumerate(is_barred) if one}
    unanswered: set[int] = set()
    for tier in tiers:
        missing = [i for i, name in enumerate(found) if name is None and not is_barred[i]]
        if not missing:
            break
        if progress is not None:
            progress(Holders([*found], set(missing), barred))
        if not tier.lends and is_past(deadline):
            unanswered.update(missing)
            continue  # it is out of time through no fault of its own
        answers = tier.contains_many([names[i] for i in missing], deadline)
        for i, is_there in zip(missing, answers, strict=True):
            if is_there:
                found[i] = tier.name
            elif is_there is None:
                unanswered.add(i)
    return Holders(found, {i for i in unanswered if found[i] is None}, barred)
