"""How many blocks one call of a tier brings, and whether layer after layer of them.

Blocks are counted as in costs.py.
"""

from __future__ import annotations

import numpy as np

from prefixstore.planner.costs import Costs

# A call takes 50 times its tier's latency. Larger ones would be cheaper, but a load can only be
# stopped or turned between calls.
_LATENCIES_PER_CALL = 50.0
_LEAST_CALL_S = 5e-3


def call_start(costs: Costs, first: int, end: int) -> int:
    """First block of a call that ends at `end`, brings blocks of one tier and none before `first`.

    `end` is returned where `first` is.
    """
    if first == end:
        return end
    first = _run_start(costs, first, end)
    tier = costs.inputs.estimates[int(costs.tiers[end - 1])]
    longest_s = max(_LATENCIES_PER_CALL * tier.latency_s, _LEAST_CALL_S)
    transfers = np.cumsum(costs.inputs.record_bytes[first:end][::-1]) / tier.bytes_per_s
    num_blocks = int(np.searchsorted(transfers, longest_s, side="right"))
    return max(first, end - max(1, num_blocks))


def layer_steps(
    costs: Costs, first: int, end: int, *, pass_s: float, compute_s: float, load_scale: float
) -> int:
    """In how many steps the last call brings blocks `first` to `end`, beside a forward pass.

    1 if they are not to be brought layer after layer: the tier does not give layers, nothing would
    be gained, or the load is much longer than the pass. Then it begins with calls of whole blocks,
    each of which is of use if the tier stalls after it, as long as the rest is enough to keep the
    pass from waiting for nothing.

    Args:
        costs: Of the prompt.
        first: Block where loading ends.
        end: Block behind the call.
        pass_s: Seconds of the pass over what follows the blocks, by itself.
        compute_s: Seconds until it waits for nothing but these blocks.
        load_scale: How many times longer loading takes than estimated.
    """
    number = int(costs.tiers[end - 1])
    if not costs.is_layered[number] or _run_start(costs, first, end) > first:
        return 1
    if load_scale * costs.load_s(first, call_start(costs, first, end)) > pass_s:
        return 1
    waits_s = max(load_scale * costs.load_s(first, end) - compute_s, 0.0)
    _, steps = costs.overlap_s(np.array([number]), np.array([waits_s]), end - first, pass_s)
    return int(steps[0])


def _run_start(costs: Costs, first: int, end: int) -> int:
    """First block from which on, up to `end`, one tier holds all."""
    others = np.flatnonzero(costs.tiers[first:end] != costs.tiers[end - 1])
    return first + (int(others[-1]) + 1 if len(others) else 0)
