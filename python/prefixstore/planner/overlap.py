"""What is gained by a forward pass that begins before the blocks it reads are whole.

    blocks one by one      |----- load -----|--- pass ---|
    layers, step by step   |- 0 -|- 1 -|- 2 -|- 3 -|
                                 |-- 0 --|-- 1 --|-- 2 --|-- 3 --|

A call that brings some layers of all its blocks at a time lets the pass over the tokens behind them
begin with the first layers. The longer of the two is then waited for, and one step of the other.
"""

from __future__ import annotations

import numpy as np

MAX_LAYER_STEPS = 8
_STEPS = (2, 4, MAX_LAYER_STEPS)  # more would save less than a twelfth more


def overlap_saved_s(
    load_s: np.ndarray, pass_s: float, latency_s: np.ndarray | float, slowdown: float
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds that are saved by loading layer after layer, and in how many steps that is best.

    Args:
        load_s: `[n]`, of loads beside which the pass has nothing else to wait for.
        pass_s: Of the pass, by itself.
        latency_s: `[n]` or one number, of a call: each step but the first costs one more.
        slowdown: How many times longer both take beside each other.

    Returns:
        `[n]` seconds, 0 where nothing is gained, and `[n]` steps, 1 there.
    """
    beside_s = (2 - min(slowdown, 2.0)) * np.minimum(load_s, pass_s)
    saved, steps = np.zeros_like(beside_s), np.ones(beside_s.shape, dtype=np.int64)
    for num_steps in _STEPS:
        seconds = beside_s * (1 - 1 / num_steps) - (num_steps - 1) * latency_s
        steps[seconds > saved] = num_steps
        np.maximum(saved, seconds, out=saved)
    return saved, steps
