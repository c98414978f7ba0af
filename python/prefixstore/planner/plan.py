"""Load or recompute: how many blocks to compute from the front and to load from the back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from prefixstore.planner.costs import Costs, PlanInputs

_MAX_ENDS = 8  # at most this many runs' ends are tried as the end of what is loaded
_PATIENCE_SPREADS = 2.0  # a load may be late by this many times its tier's usual error,
_LEAST_PATIENCE = 1.25  # by this factor in any case,
_LEAST_PATIENCE_S = 2e-3  # and by this many seconds: a thread may wake late


class PlanMode(str, Enum):
    """What a plan does with the blocks that tiers hold."""

    NONE = "none"  # there are none
    RECOMPUTE = "recompute"
    LOAD = "load"
    BOTH = "both"


@dataclass(frozen=True)
class RestorePlan:
    """How to get the blocks of a prompt that are not on the device.

    Attributes:
        mode: In one word.
        num_compute_blocks: To compute from the front while the rest is loaded. Of a plan that
            loads nothing, all that tiers hold or might have held.
        num_load_blocks: To load, from the last one down to the front; those among them that no
            tier holds are computed. What lies behind them is computed last.
        predicted_s: Until the last token of the prompt is computed.
        recompute_s: The same if nothing is loaded.
        load_s: The same if all is loaded; infinity where there is nothing.
        load_deadline_s: Seconds from the start after which the load has disappointed: blocks that
            have not come are computed. 0 if nothing is loaded.
        costs: What the plan was made from.
        probe: A few of the other blocks, which are loaded after these to measure their tier; nobody
            waits for them. Empty if there are none.
    """

    mode: PlanMode
    num_compute_blocks: int
    num_load_blocks: int
    predicted_s: float
    recompute_s: float
    load_s: float
    load_deadline_s: float
    costs: Costs
    probe: range = range(0)

    @property
    def is_probe(self) -> bool:
        """A tier is measured that the plan does not need."""
        return len(self.probe) > 0

    @property
    def saved_s(self) -> float:
        """Seconds that loading saves, as predicted."""
        return self.recompute_s - self.predicted_s

    @property
    def saved_share(self) -> float:
        """The same as a share of `recompute_s`, from 0 to 1."""
        return max(0.0, self.saved_s) / self.recompute_s if self.recompute_s else 0.0


def plan_restore(inputs: PlanInputs) -> RestorePlan:
    """The fastest plan: the exact minimum over all splits.

    Loaded is one range of blocks. It ends where a run of blocks of one tier ends; with more than
    eight runs the longest eight are tried.
    """
    costs = Costs(inputs)
    recompute_s = costs.recompute_s()
    if not len(costs.run_ends):
        return load_nothing(costs, PlanMode.NONE, recompute_s, float("inf"))
    best_s, split, best_end = float("inf"), 0, 0
    for end in _ends(costs):
        seconds = costs.split_s(0, end, pass_s=costs.tail_pass_s(end))
        seconds[-1] = float("inf")  # loads nothing
        seconds += costs.tail_s(end)
        first = int(seconds.argmin())
        if seconds[first] < best_s:
            best_s, split, best_end = float(seconds[first]), first, end
    last = int(costs.run_ends[-1])
    load_s = float(costs.split_s(0, last, pass_s=costs.tail_pass_s(last))[0]) + costs.tail_s(last)
    if recompute_s - best_s <= max(inputs.margin_s, inputs.margin_ratio * recompute_s):
        return load_nothing(costs, PlanMode.RECOMPUTE, recompute_s, load_s)
    patience_s = (inputs.slowdown if split else 1.0) * load_patience_s(costs, split, best_end)
    return RestorePlan(
        mode=PlanMode.BOTH if split else PlanMode.LOAD,
        num_compute_blocks=split,
        num_load_blocks=best_end - split,
        predicted_s=best_s,
        recompute_s=recompute_s,
        load_s=load_s,
        load_deadline_s=min(patience_s, inputs.deadline_s),
        costs=costs,
    )


def plan_probe(plan: RestorePlan, tier: int, num_blocks: int) -> RestorePlan:
    """The same plan, which measures a tier by the last few blocks of it that are not loaded.

    Computing takes them back when it gets there first.

    Args:
        plan: Of which some blocks of `tier` are to be computed.
        tier: Which of the estimates.
        num_blocks: To load at most.
    """
    is_free = _is_computed(plan) & (plan.costs.tiers == tier)
    end = int(np.flatnonzero(is_free)[-1]) + 1
    others = np.flatnonzero(~is_free[:end])
    first = max(end - num_blocks, int(others[-1]) + 1 if len(others) else 0)
    return replace(plan, probe=range(first, end))


def unmeasured_tiers(plan: RestorePlan) -> list[int]:
    """Tiers that hold blocks, of which the plan loads none."""
    is_computed, tiers = _is_computed(plan), plan.costs.tiers
    loaded = set(tiers[~is_computed].tolist())
    return [tier for tier in np.unique(tiers[is_computed]).tolist() if tier not in {-1, *loaded}]


def _is_computed(plan: RestorePlan) -> np.ndarray:
    """Of each block whether the plan computes it even if a tier holds it."""
    is_computed = np.ones(plan.costs.num_blocks, dtype=bool)
    first = plan.num_compute_blocks
    is_computed[first : first + plan.num_load_blocks] = False
    return is_computed


def load_patience_s(
    costs: Costs,
    first: int,
    end: int,
    *,
    load_scale: float = 1.0,
    crowding: float = 1.0,
    num_layer_steps: int = 1,
) -> float:
    """Seconds of a load of blocks `first` to `end` after which it has disappointed.

    More than usual errors and others' loads explain; yet no more than computing the blocks would
    take, or a quarter above what the load would take by itself, so that one that never comes costs
    about as much as computing again.

    Args:
        costs: Of the prompt.
        first: Block where the load begins.
        end: Block behind it.
        load_scale: How many times longer loading takes than estimated.
        crowding: And because others load.
        num_layer_steps: Of the load.
    """
    inputs = costs.inputs
    expected_s = load_scale * costs.load_s(first, end, num_layer_steps)
    spread = inputs.estimates[int(costs.tiers[end - 1])].spread
    longest_s = max(_LEAST_PATIENCE * expected_s, costs.compute_s(first, end))
    patience_s = crowding * max(_LEAST_PATIENCE, 1 + _PATIENCE_SPREADS * spread) * expected_s
    return max(min(patience_s, longest_s), _LEAST_PATIENCE_S)


def load_nothing(costs: Costs, mode: PlanMode, recompute_s: float, load_s: float) -> RestorePlan:
    """All is computed."""
    return RestorePlan(
        mode=mode,
        num_compute_blocks=costs.num_blocks,
        num_load_blocks=0,
        predicted_s=recompute_s,
        recompute_s=recompute_s,
        load_s=load_s,
        load_deadline_s=0.0,
        costs=costs,
    )


def _ends(costs: Costs) -> list[int]:
    """Where the loaded range may end, ascending."""
    ends = costs.run_ends
    if len(ends) > _MAX_ENDS:
        lengths = np.diff(ends, prepend=0)
        ends = np.sort(ends[np.argsort(lengths, kind="stable")[-_MAX_ENDS:]])
    return [int(end) for end in ends]
