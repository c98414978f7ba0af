"""What is gained by a forward pass that begins before the blocks it reads are whole.

    blocks one by one      |----- load -----|--- pass ---|
    layers, step by step   |- 0 -|- 1 -|- 2 -|- 3 -|
                                 |-- 0 --|-- 1 --|-- 2 --|-- 3 --|

A call that brings some layers of all its blocks at a time lets the pass over the tokens behind them
begin with the first layers. The longer of the two is then waited for, and one step of the other.

Only waiting can be hidden. Where the cores that compute are busy copying and decoding records, the
pass waits for them instead, and each step costs something more.
"""

from __future__ import annotations

import numpy as np

MAX_LAYER_STEPS = 8
# Python's cost for each record in each step: 11 us, measured with 32 and with 110 records on an
# EPYC (Zen 4).
_PART_S = 12e-6
_STEPS = (2, 4, MAX_LAYER_STEPS)  # more steps would save at most a further twelfth


def layer_step_s(
    latency_s: np.ndarray | float, num_records: np.ndarray | int
) -> np.ndarray | float:
    """What each step of a load of so many records costs beyond the first, `[n]` seconds."""
    return latency_s + _PART_S * num_records


def overlap_saved_s(
    load_s: np.ndarray, pass_s: float, step_s: np.ndarray | float, slowdown: float
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds that are saved by loading layer after layer, and in how many steps that is best.

    Args:
        load_s: `[n]`, that the pass waits for loads and for nothing else, the cores being idle.
        pass_s: Of the pass, by itself.
        step_s: `[n]` or one number, of each step but the first.
        slowdown: How many times longer both take beside each other.

    Returns:
        `[n]` seconds, 0 where nothing is gained, and `[n]` steps, 1 there.
    """
    beside_s = (2 - min(slowdown, 2.0)) * np.minimum(load_s, pass_s)
    saved, steps = np.zeros_like(beside_s), np.ones(beside_s.shape, dtype=np.int64)
    for num_steps in _STEPS:
        seconds = beside_s * (1 - 1 / num_steps) - (num_steps - 1) * step_s
        steps[seconds > saved] = num_steps
        np.maximum(saved, seconds, out=saved)
    return saved, steps
