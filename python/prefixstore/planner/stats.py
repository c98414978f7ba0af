"""What a planner counts: what it chose, and how right it was."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from prefixstore.planner.look_ups import LookUpEstimate
from prefixstore.planner.plan import PlanMode, RestorePlan
from prefixstore.planner.rates import PrefillEstimate, TierEstimate

_NUM_KEPT = 512  # errors of the newest plans of each mode


@dataclass(frozen=True)
class MeetingCounts:
    """What became of the blocks of one prompt.

    Attributes:
        num_computed_blocks: Whole blocks that were computed.
        num_loaded_blocks: Blocks that were loaded and kept.
        num_dropped_blocks: Blocks that were loaded for nothing: they came too late.
        is_given_up: Blocks were computed that the load had promised and did not bring in time.
    """

    num_computed_blocks: int
    num_loaded_blocks: int
    num_dropped_blocks: int
    is_given_up: bool


@dataclass(frozen=True)
class ModeStats:
    """Plans of one mode.

    Attributes:
        num_plans: Made.
        num_finished: Carried out and measured; the rest is about these.
        predicted_s: Sum.
        measured_s: Sum.
        saved_s: Sum of the seconds for computing all, as predicted, less the measured ones.
        mean_error: Of the newest 512: measured less predicted, as a share of predicted, without
            its sign; nan before the first.
        p50_error: Their median.
        p90_error: Nine of ten are no larger.
    """

    num_plans: int = 0
    num_finished: int = 0
    predicted_s: float = 0.0
    measured_s: float = 0.0
    saved_s: float = 0.0
    mean_error: float = math.nan
    p50_error: float = math.nan
    p90_error: float = math.nan


@dataclass(frozen=True)
class PlannerStats:
    """What a planner has chosen, and what it believes now.

    Attributes:
        modes: By the mode's word.
        num_probes: Plans that load a few blocks more to measure their tier.
        num_given_up: Finished plans in which blocks were computed that a load had promised.
        computed_blocks: Of finished plans.
        loaded_blocks: Of finished plans; kept.
        dropped_blocks: Of finished plans: loaded for nothing, for they came too late.
        tiers: How fast each is, by name.
        prefill: How fast the model computes.
        slowdown: How many times longer computing takes while records are loaded.
        look_ups: Of sessions: what asking the tiers takes, and brings.
    """

    modes: Mapping[str, ModeStats]
    num_probes: int
    num_given_up: int
    computed_blocks: int
    loaded_blocks: int
    dropped_blocks: int
    tiers: Mapping[str, TierEstimate]
    prefill: PrefillEstimate
    slowdown: float
    look_ups: LookUpEstimate


class PlanCounts:
    """The counters behind `PlannerStats`; not thread-safe."""

    def __init__(self) -> None:
        self._modes = {mode: _ModeCounts() for mode in PlanMode}
        self._counts: Counter[str] = Counter()

    def add_plan(self, plan: RestorePlan) -> None:
        """Count a plan that was made."""
        self._modes[plan.mode].num_plans += 1
        self._counts["num_probes"] += plan.is_probe

    def add_finished(self, plan: RestorePlan, measured_s: float, counts: MeetingCounts) -> None:
        """Count a plan that was carried out in `measured_s` seconds."""
        self._modes[plan.mode].add(plan, measured_s)
        self._counts.update(
            num_given_up=counts.is_given_up,
            computed_blocks=counts.num_computed_blocks,
            loaded_blocks=counts.num_loaded_blocks,
            dropped_blocks=counts.num_dropped_blocks,
        )

    def stats(
        self,
        tiers: Mapping[str, TierEstimate],
        prefill: PrefillEstimate,
        slowdown: float,
        look_ups: LookUpEstimate,
    ) -> PlannerStats:
        modes = {mode.value: counts.stats() for mode, counts in self._modes.items()}
        names = ("num_probes", "num_given_up", "computed_blocks", "loaded_blocks", "dropped_blocks")
        return PlannerStats(
            modes=modes,
            tiers=tiers,
            prefill=prefill,
            slowdown=slowdown,
            look_ups=look_ups,
            **{name: self._counts[name] for name in names},
        )


class _ModeCounts:
    def __init__(self) -> None:
        self.num_plans = 0
        self._num_finished = 0
        self._predicted_s = self._measured_s = self._saved_s = 0.0
        self._errors: deque[float] = deque(maxlen=_NUM_KEPT)

    def add(self, plan: RestorePlan, measured_s: float) -> None:
        self._num_finished += 1
        self._predicted_s += plan.predicted_s
        self._measured_s += measured_s
        self._saved_s += plan.recompute_s - measured_s
        self._errors.append(abs(measured_s - plan.predicted_s) / plan.predicted_s)

    def stats(self) -> ModeStats:
        if not self._errors:
            return ModeStats(self.num_plans)
        errors = sorted(self._errors)
        return ModeStats(
            *(self.num_plans, self._num_finished),
            *(self._predicted_s, self._measured_s, self._saved_s),
            mean_error=sum(errors) / len(errors),
            p50_error=_rank(errors, 0.5),
            p90_error=_rank(errors, 0.9),
        )


def _rank(ordered: list[float], share: float) -> float:
    """The least value that `share` of them do not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]
