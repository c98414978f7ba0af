"""Load or recompute where a prefix is loaded first, and then the rest computed.

    block      0 .. D-1 | D ........ end | end ...... last token
               device     loaded           computed, once all of it is there

Who computes learns only from the whole prefix where to begin, so there is one decision, and one
wait. As many blocks are asked for as make the sum of both the least.
"""

from __future__ import annotations

import numpy as np

from prefixstore.planner.costs import Costs, PlanInputs
from prefixstore.planner.plan import PlanMode, RestorePlan, load_nothing

_LEAST_PATIENCE_S = 0.02  # a thread that wakes late is not a slow tier


def plan_prefix(inputs: PlanInputs) -> RestorePlan:
    """The fastest plan: the minimum over all ends of a prefix.

    Blocks behind the first one that no tier holds are of no use: `inputs.has_windows` must say so.

    What is loaded is waited for as long as computing it would take. So a tier that never answers
    costs as much as computing once more, and one that answers at all is not given up in vain.
    """
    costs = Costs(inputs)
    recompute_s = costs.recompute_s()
    if not len(costs.run_ends):
        return load_nothing(costs, PlanMode.NONE, recompute_s, float("inf"))
    loads_s = prefix_loads_s(costs)
    seconds = {end: float(loads_s[end]) + costs.tail_s(end) for end in _ends(costs, loads_s)}
    last = int(costs.run_ends[-1])
    load_s = float(loads_s[last]) + costs.tail_s(last)
    best = min(seconds, key=seconds.__getitem__, default=0)
    least_s = max(inputs.margin_s, inputs.margin_ratio * recompute_s)
    if best == 0 or recompute_s - seconds[best] <= least_s:
        return load_nothing(costs, PlanMode.RECOMPUTE, recompute_s, load_s)
    patience_s = max(recompute_s - costs.tail_s(best), _LEAST_PATIENCE_S)
    return RestorePlan(
        mode=PlanMode.LOAD,
        num_compute_blocks=0,
        num_load_blocks=best,
        predicted_s=seconds[best],
        recompute_s=recompute_s,
        load_s=load_s,
        load_deadline_s=min(patience_s, inputs.deadline_s),
        costs=costs,
    )


def prefix_loads_s(costs: Costs) -> np.ndarray:
    """Seconds to load the first blocks, for each number of them: `[num_blocks + 1]`.

    Each tier is asked once for all that it holds of them, however that is spread.
    """
    inputs = costs.inputs
    seconds = np.zeros(costs.num_blocks + 1)
    for number, tier in enumerate(inputs.estimates):
        is_own = costs.tiers == number
        num_bytes = np.cumsum(np.where(is_own, inputs.record_bytes, 0))
        seconds[1:] += num_bytes / tier.bytes_per_s + tier.latency_s * (np.cumsum(is_own) > 0)
    return seconds


def _ends(costs: Costs, loads_s: np.ndarray) -> set[int]:
    """Where the prefix may end best: at the end of a run of blocks of one tier, or where time runs
    out. Within a run each further block takes as long to load, and longer to compute.
    """
    last = int(costs.run_ends[-1])
    in_time = int(np.searchsorted(loads_s[: last + 1], costs.inputs.deadline_s, side="right")) - 1
    return {int(end) for end in costs.run_ends if end <= in_time} | ({in_time} - {0})
