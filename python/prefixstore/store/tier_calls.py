"""Calls of a tier, behind its breakers: they are counted, and none raises `TierError`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, get_args

from prefixstore.errors import BlockCorrupted, TierError, TierFull, TierTimeout
from prefixstore.store.breaker import Breaker, BreakerConfig
from prefixstore.store.stats import Counts

T = TypeVar("T")
Kind = Literal["look-ups", "reads", "writes"]


class TierCalls:
    """The only place that catches what a tier's look-ups, reads and writes raise.

    Each kind has a breaker, for what ails one leaves the others whole: a disk that hangs knows by
    its index what it holds, and who may not write may read. So no kind is left alone for another,
    and none comes back because another succeeded.

    Args:
        tier_name: The tier's, for what is logged.
        config: When it is left alone.
        counts: Where errors are counted.
    """

    def __init__(self, tier_name: str, config: BreakerConfig, counts: Counts) -> None:
        self._breakers: dict[Kind, Breaker] = {
            kind: Breaker(f"{tier_name}, {kind}", config) for kind in get_args(Kind)
        }
        self._counts = counts

    @property
    def is_down(self) -> bool:
        """Whether the tier is left alone by calls of any kind."""
        return any(breaker.is_down for breaker in self._breakers.values())

    def attempt(self, kind: Kind, call: Callable[[], T]) -> T | None:
        """The call's answer; None if it failed, or the tier is left alone by this kind."""
        breaker = self._breakers[kind]
        leave = breaker.allows()
        if leave is None:
            self._counts.add(num_skipped=1)
            return None
        try:
            answer = call()
        except TierError as error:
            self.count_error(error)
            breaker.failed(error, leave)
            return None
        failure = self._count_outcomes(answer) if isinstance(answer, list) else None
        if failure is None:
            breaker.succeeded(leave)
        else:
            breaker.failed(failure, leave)
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

    def _count_outcomes(self, outcomes: Sequence[object]) -> TierError | None:
        """Count what single records met; returns one that tells against the tier, if any does.

        For the breaker a call is one failure, however many records it has, and none where any of
        them got an answer: what failed besides cost its own hits, and the tier is there.
        """
        errors = [one for one in outcomes if isinstance(one, TierError)]
        failures = [one for one in errors if not isinstance(one, (TierFull, BlockCorrupted))]
        self._counts.add(
            num_errors=len(failures),
            num_timeouts=sum(isinstance(one, TierTimeout) for one in failures),
            num_full=sum(isinstance(one, TierFull) for one in errors),
        )
        return failures[0] if failures and len(failures) == len(outcomes) else None
