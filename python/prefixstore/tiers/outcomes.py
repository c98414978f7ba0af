"""Outcomes of calls that run beside each other: how they are counted, and which are raised."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from prefixstore.block_key import RecordName
from prefixstore.errors import TierError, TierPartError
from prefixstore.tiers.base import LookOutcome, ReadOutcome, TierCounters

T = TypeVar("T")


class SharedCounters:
    """`TierCounters` that several threads add to, in a forked process too."""

    def __init__(self) -> None:
        self._counters = TierCounters()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def add(self, **increments: int) -> None:
        """Add to counters by name."""
        with self._locked():
            for name, increment in increments.items():
                setattr(self._counters, name, getattr(self._counters, name) + increment)

    def add_reads(self, outcomes: Sequence[ReadOutcome]) -> None:
        """Count the hits of `Tier.get_many`, their bytes, and the misses."""
        hits = [outcome for outcome in outcomes if isinstance(outcome, int)]
        self.add(num_hits=len(hits), read_bytes=sum(hits), num_misses=outcomes.count(None))

    def copy(self) -> TierCounters:
        """The counters as they are now."""
        with self._locked():
            return replace(self._counters)

    def _locked(self) -> threading.Lock:
        if self._pid != os.getpid():  # forked: the lock may have been held at that moment
            self._lock, self._pid = threading.Lock(), os.getpid()
        return self._lock


def of_each_mention(
    names: Sequence[RecordName], deletions: Mapping[RecordName, LookOutcome]
) -> list[LookOutcome]:
    """What `Tier.delete_many` answers, from what became of each name: of one that comes again the
    record was gone by then, or the error is what each of its mentions met.
    """
    left = dict(deletions)
    outcomes = []
    for name in names:
        outcomes.append(left[name])
        if left[name] is True:
            left[name] = False
    return outcomes


def raise_first(outcomes: Sequence[T | TierError]) -> list[T]:
    """The outcomes, none of which is an error; the first that is one is raised."""
    answers: list[T] = []
    for outcome in outcomes:
        if isinstance(outcome, TierError):
            raise outcome
        answers.append(outcome)
    return answers


def raise_if_all(outcomes: Sequence[object], *kinds: type[TierError]) -> None:
    """Raise what the whole call met: an error of these kinds, if no record met anything else."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, kinds)]
    if failures and len(failures) == len(outcomes):
        # prefer an error of the whole tier to one of a part of it
        raise next((one for one in failures if not isinstance(one, TierPartError)), failures[0])
