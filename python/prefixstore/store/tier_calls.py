"""Calls of a tier, behind its breakers: they are counted, and none raises `TierError`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, get_args

from prefixstore.errors import BlockCorrupted, TierError, TierFull, TierPartError, TierTimeout
from prefixstore.store.breaker import Breaker, BreakerConfig, Leave
from prefixstore.store.stats import Counts
from prefixstore.tiers.base import is_past

T = TypeVar("T")
Kind = Literal["look-ups", "reads", "writes"]
Judge = Callable[[object], bool]  # of what one record met


def was_answered(outcome: object) -> bool:
    """Whether a tier said anything; that it is full or a record damaged counts."""
    return not isinstance(outcome, TierError) or isinstance(outcome, (TierFull, BlockCorrupted))


def was_read(outcome: object) -> bool:
    """Whether a record, or a part of one, came."""
    return isinstance(outcome, int)


def was_kept(outcome: object) -> bool:
    """Whether a record was written."""
    return outcome is None


def was_deleted(outcome: object) -> bool:
    """Whether a record was there, and deleted."""
    return outcome is True


class TierCalls:
    """The only place that catches what a tier's look-ups, reads and writes raise.

    Each kind has a breaker, for what ails one leaves the others whole: a disk that hangs knows by
    its index what it holds, and who may not write may read. So no kind is left alone for another,
    and none comes back because another succeeded.

    Args:
        tier_name: The tier's, for what is logged.
        config: When it is left alone.
        counts: Where errors are counted.
        knows_what_it_holds: See `Tier`.
    """

    def __init__(
        self,
        tier_name: str,
        config: BreakerConfig,
        counts: Counts,
        knows_what_it_holds: bool,
    ) -> None:
        self._breakers: dict[Kind, Breaker] = {
            kind: Breaker(f"{tier_name}, {kind}", config) for kind in get_args(Kind)
        }
        self._counts = counts
        self._knows_what_it_holds = knows_what_it_holds

    @property
    def is_down(self) -> bool:
        """Whether the tier is left alone by calls of any kind."""
        return any(breaker.is_down for breaker in self._breakers.values())

    def refuses(self, kind: Kind) -> bool:
        """Whether the tier is left alone by this kind just now; asking is no trial."""
        return self._breakers[kind].is_pausing

    def attempt(
        self,
        kind: Kind,
        call: Callable[[], T],
        was_done: Judge = was_answered,
        deadline: float | None = None,
    ) -> T | None:
        """The call's answer; None if it failed, the tier is left alone by this kind, or the
        deadline is past: it could not answer in time, and is not to blame.

        To the breaker it is one call, however many records it has. It succeeded where any of them
        got an answer, and of a tier that knows what it holds one that needed its medium: what
        failed besides cost its own hits. Otherwise it failed where any record failed, and told
        nothing where none did.

        Args:
            kind: Of the call.
            call: Returns what its records met, in a list, or one answer for all of it.
            was_done: Whether what a record met needed the medium.
            deadline: Of `time.monotonic()`; None where the call is worth making at any time.
        """
        if is_past(deadline):
            return None
        breaker = self._breakers[kind]
        leave = breaker.allows()
        if leave is None:
            self._counts.add(num_skipped=1)
            return None
        try:
            answer = call()
        except TierError as error:
            self.count_error(error)
            _blame(breaker, leave, [error])
            return None
        outcomes = answer if isinstance(answer, list) else [answer]
        failures = self._count_outcomes(outcomes)
        if any(map(was_done if self._knows_what_it_holds else was_answered, outcomes)):
            breaker.succeeded(leave)
        else:
            _blame(breaker, leave, failures)
        return answer

    def ask(self, call: Callable[[], T]) -> T | None:
        """The answer of a call that is of no kind; None if it failed.

        It is made whether the tier is left alone or not, and tells nothing of what the others meet:
        a tier may answer it without asking its server.
        """
        try:
            return call()
        except TierError as error:
            self.count_error(error)
            return None

    def count_error(self, error: TierError) -> None:
        """A call raised this."""
        self._counts.add(num_errors=1, num_timeouts=isinstance(error, TierTimeout))

    def leave_alone(self, error: BaseException) -> None:
        """Leave the tier alone for a pause: it did what no tier may do."""
        self._counts.add(num_errors=1)
        for breaker in self._breakers.values():
            breaker.trip(error)

    def _count_outcomes(self, outcomes: Sequence[object]) -> list[TierError]:
        """Count what single records met; returns what tells against the tier."""
        errors = [one for one in outcomes if isinstance(one, TierError)]
        failures = [one for one in errors if not was_answered(one)]
        self._counts.add(
            num_errors=len(failures),
            num_timeouts=sum(isinstance(one, TierTimeout) for one in failures),
            num_full=sum(isinstance(one, TierFull) for one in errors),
        )
        return failures


def _blame(breaker: Breaker, leave: Leave, failures: Sequence[TierError]) -> None:
    """A call met nothing but these. Parts of a tier that are silent, and those that it leaves alone
    for that, tell nothing of it: they are few, and whoever asks for their records alone is not to
    take the others' from everybody.
    """
    against = [one for one in failures if not isinstance(one, TierPartError)]
    if against:
        breaker.failed(against[0], leave)
    else:
        breaker.told_nothing(leave)
