"""How much of the fronts of prompts that still load a pass may compute while others wait for it.

A prompt that loads computes from its front meanwhile. Alone it loses nothing by that; among others
each token holds up those whose pass it is in, and those whose loads arrive before it is over.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadAhead:
    """What a prompt still loads; see `Meeting.load_ahead`. Seconds of loading are of the tier.

    Attributes:
        load_s: Until all of it is there.
        block_size: Tokens in a block.
        front_tokens: Of the blocks that the front may take from the loader next; 0 where it has to
            compute others first.
        front_load_s: To load these.
        front_compute_s: To compute them.
        pass_s: Of a forward pass, however short.
        is_on_time: The call under way, or one that waits for a thread, is not overdue.
    """

    load_s: float
    block_size: int
    front_tokens: int
    front_load_s: float
    front_compute_s: float
    pass_s: float
    is_on_time: bool


def front_budget(loads: Collection[LoadAhead], num_others: int, other_tokens: int) -> float:
    """Tokens that all fronts together may have in a pass.

    Of `n` prompts that load, half are behind the one whose front is computed: a token that it does
    not load brings these their blocks sooner by `front_load_s / front_tokens`. Computing it delays
    the `m` others by `front_compute_s / front_tokens`, and, a load being over every `load_s`, also
    those whose loads end in the pass. With `r` for the ratio of these two, a token saves more than
    it costs as long as the pass takes no longer than

        load_s * (r * (n + 1) / 2 - m)

    Args:
        loads: Of all prompts that load.
        num_others: Prompts in prefill that do not.
        other_tokens: Of theirs in the pass.

    Returns:
        Of whole blocks: one that was begun must be finished, in a pass of its own. Infinity where
        nobody is held up, or where all loads are late.
    """
    fronts = [load for load in loads if load.front_tokens]
    if not fronts or len(loads) + num_others == 1 or not any(load.is_on_time for load in loads):
        return math.inf
    ratio = sum(load.front_load_s / load.front_compute_s for load in fronts) / len(fronts)
    token_s = sum(load.front_compute_s / load.front_tokens for load in fronts) / len(fronts)
    load_s = sum(load.load_s for load in loads) / len(loads)
    longest_s = load_s * (ratio * (len(loads) + 1) / 2 - num_others)
    taken_s = max(load.pass_s for load in fronts) + other_tokens * token_s
    size = fronts[0].block_size
    return max(0, math.floor((longest_s - taken_s) / token_s / size)) * size
