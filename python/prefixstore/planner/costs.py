"""What computing and loading the blocks of one prompt costs, summed so that any split is a lookup.

    block      0 .. D-1 | D ........ split | split ..... end | end ...... last token
               device     computed           loaded            computed (the tail)
                          \\____ at the same time ____/         \\_ then _/

Blocks are counted from the first one that is not on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefixstore.planner.overlap import layer_step_s, overlap_saved_s
from prefixstore.planner.rates import PrefillEstimate, TierEstimate


@dataclass(frozen=True)
class PlanInputs:
    """All that decides a plan.

    Attributes:
        num_tokens: Of the prompt.
        block_size: Tokens in a block.
        num_device_blocks: Whole blocks at the start of the prompt that need nothing.
        tiers: `[num_blocks]` integers: which of `estimates` holds each block that follows; -1
            where none does. At least the prompt's last token lies beyond them.
        record_bytes: `[num_blocks]` integers: bytes to be read for each, all layer groups together.
        estimates: Of the tiers.
        prefill: Of the model.
        chunk_tokens: Prompt tokens in one forward pass.
        slowdown: How many times longer computing and loading take beside each other, 1 or more.
        has_windows: Some layer group has a sliding window, so that its blocks before the last
            window are not loaded and computing cannot begin between loaded blocks. Blocks behind
            the first one that no tier holds are of no use then.
        margin_s: Seconds that loading must save, or nothing is loaded.
        margin_ratio: Share of the time of computing all that it must save.
        deadline_s: Seconds after which the store gives nothing any more.
        is_layered: Of each of `estimates`, whether single layers of its records can be loaded; see
            overlap.py. Empty where none's can.
        restore_bytes_per_s: How fast the cores that compute copy and decode records, whatever the
            tier: so long they cannot compute. Infinity where others do that.
    """

    num_tokens: int
    block_size: int
    num_device_blocks: int
    tiers: np.ndarray
    record_bytes: np.ndarray
    estimates: Sequence[TierEstimate]
    prefill: PrefillEstimate
    chunk_tokens: int = 512
    slowdown: float = 1.0
    has_windows: bool = False
    margin_s: float = 2e-4
    margin_ratio: float = 0.03
    deadline_s: float = float("inf")
    is_layered: Sequence[bool] = ()
    restore_bytes_per_s: float = float("inf")

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size: expected 1 or more, got {self.block_size}")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: expected 1 or more, got {self.chunk_tokens}")
        if not self.restore_bytes_per_s > 0:
            raise ValueError(
                f"restore_bytes_per_s: expected more than 0, got {self.restore_bytes_per_s}"
            )
        if not self.slowdown >= 1:
            raise ValueError(f"slowdown: expected 1 or more, got {self.slowdown}")
        if self.num_device_blocks < 0:
            raise ValueError(f"num_device_blocks: expected 0 or more, got {self.num_device_blocks}")
        if len(self.record_bytes) != len(self.tiers):
            raise ValueError(
                f"record_bytes: expected {len(self.tiers)}, one for each block of tiers, got"
                f" {len(self.record_bytes)}"
            )
        most = (self.num_tokens - 1) // self.block_size - self.num_device_blocks
        if most < len(self.tiers):
            raise ValueError(
                f"tiers: expected at most {most} blocks, so that a token remains to be computed,"
                f" got {len(self.tiers)}"
            )
        if len(self.tiers) and not -1 <= self.tiers.min() <= self.tiers.max() < len(self.estimates):
            raise ValueError(
                f"tiers: expected -1 to {len(self.estimates) - 1}, got {self.tiers.min()} to"
                f" {self.tiers.max()}"
            )


class Costs:
    """Running sums over the blocks of `inputs`.

    Attributes:
        inputs: What they were made of.
        tiers: `[num_blocks]`: `inputs.tiers`, but -1 where a block is of no use.
        run_ends: Ends of the runs of blocks that one tier holds, ascending.
        is_layered: Of each tier whether it gives single layers; False at -1.
    """

    def __init__(self, inputs: PlanInputs) -> None:
        self.inputs = inputs
        prefill, size = inputs.prefill, inputs.block_size
        self.tiers = _usable(inputs)
        num_blocks = len(self.tiers)
        is_held = self.tiers >= 0
        is_end = is_held.copy()
        is_end[:-1] &= self.tiers[1:] != self.tiers[:-1]
        self.run_ends = np.flatnonzero(is_end) + 1

        tokens = np.arange(0.0, (num_blocks + 0.5) * size, size)  # [num_blocks + 1]
        context = inputs.num_device_blocks * size
        self._compute = tokens * (prefill.token_s + prefill.pair_s * (context + tokens / 2))
        self._passes = prefill.pass_s * np.ceil(tokens / inputs.chunk_tokens)
        # Tier -1 (no tier holds the block) indexes the extra last entry: it takes no time to load.
        byte_s = np.array([1 / one.bytes_per_s for one in inputs.estimates] + [0.0])
        latency_s = np.array([one.latency_s for one in inputs.estimates] + [0.0])
        seconds = inputs.record_bytes * byte_s[self.tiers]
        # Each run of blocks of one tier costs its latency once. Runs are loaded from their ends.
        seconds[self.run_ends - 1] += latency_s[self.tiers[self.run_ends - 1]]
        self._load = _running_sum(seconds)
        self._latency_s = latency_s
        # The share of a load in which the cores only wait for bytes; the rest they copy and decode.
        self._idle_share = 1 - np.minimum(1 / (inputs.restore_bytes_per_s * byte_s[:-1]), 1.0)
        self._idle_share = np.append(self._idle_share, 0.0)
        is_layered = inputs.is_layered or [False] * len(inputs.estimates)
        self.is_layered = np.array([*is_layered, False])
        self._gives_layers = any(is_layered)
        self._holes = None if is_held.all() else self._sum_holes(is_held)

    @property
    def num_blocks(self) -> int:
        """Blocks that may be loaded."""
        return len(self.tiers)

    def recompute_s(self) -> float:
        """To compute everything that is not on the device."""
        return self.tail_s(0)

    def tail_s(self, end: int) -> float:
        """To compute from block `end` to the last token."""
        inputs = self.inputs
        context = (inputs.num_device_blocks + end) * inputs.block_size
        return inputs.prefill.seconds(inputs.num_tokens - context, context, inputs.chunk_tokens)

    def tail_pass_s(self, end: int) -> float:
        """Of the forward pass over the tokens from block `end` on, by itself."""
        inputs = self.inputs
        context = (inputs.num_device_blocks + end) * inputs.block_size
        num_new = min(inputs.chunk_tokens, inputs.num_tokens - context)
        return inputs.prefill.seconds(num_new, context, num_new)

    def compute_s(self, first: int, end: int) -> float:
        """To compute blocks `first` to `end`, by itself."""
        return float(self._compute[end] - self._compute[first] + self._passes[end - first])

    def load_s(self, first: int, end: int, num_layer_steps: int = 1) -> float:
        """To load blocks `first` to `end` by itself, the latency of the call that begins there too.

        `end` may cut a run: the call that brings its first part has a latency of its own. Each
        further step of a call that brings layer after layer costs one, and more: see overlap.py.
        """
        if first >= end:
            return 0.0
        latency_s = self._latency_s[self.tiers[end - 1]]
        steps_s = (num_layer_steps - 1) * float(layer_step_s(latency_s, end - first))
        return float(self._load[end] - self._load[first]) + self._cut_latency_s(end) + steps_s

    def split_s(
        self,
        first: int,
        end: int,
        *,
        compute_scale: float = 1.0,
        load_scale: float = 1.0,
        compute_ready_s: float = 0.0,
        load_ready_s: float = 0.0,
        pass_s: float = 0.0,
        layered_tier: int = -1,
    ) -> np.ndarray:
        """Seconds until blocks `first` to `end` are all there, for every place where to meet.

        Computing begins at `first` and loading at `end`, at the same time. What no tier holds
        behind the split is computed when both are done.

        What a pass that follows can do beside the last loads is taken off: the seconds are those
        until it is over, less those that it takes by itself.

        Args:
            first: Block where computing begins.
            end: Block behind the one where loading begins.
            compute_scale: How many times longer computing takes than estimated.
            load_scale: And loading.
            compute_ready_s: Seconds until computing can begin here.
            load_ready_s: And loading.
            pass_s: Of the forward pass that waits for these blocks alone; 0 if there is none.
            layered_tier: Of the load that is to be over before loading can begin, if that brings
                layers.

        Returns:
            `[end - first + 1]`: entry i computes i blocks and loads the rest; infinity where the
            load would miss the deadline.
        """
        inputs, slowdown = self.inputs, self.inputs.slowdown
        compute = self._compute[first : end + 1] - self._compute[first]
        compute = compute_ready_s + compute_scale * (compute + self._passes[: end - first + 1])
        load = self._load[end] - self._load[first : end + 1]
        load[:-1] += self._cut_latency_s(end)
        own_load = load_scale * load
        load = load_ready_s + own_load
        seconds = both_s(compute, load, slowdown)
        waits_s = np.maximum(load - compute, 0.0)  # loading time that no computing overlaps yet
        # only the load to come may bring layers, not the one under way before it
        waits_s[:-1] = np.minimum(waits_s[:-1], own_load[:-1])
        if self._holes is not None:
            holes_s = self._holes[end] - self._holes[first : end + 1]
            seconds += compute_scale * holes_s
            waits_s[holes_s > 0] = 0.0  # the pass would wait for the holes before it as well
        if pass_s > 0 and self._gives_layers:
            tiers = np.append(self.tiers[first:end], layered_tier)
            num_records = np.arange(end - first, -1, -1)
            seconds -= self.overlap_s(tiers, waits_s, num_records, pass_s)[0]
        if inputs.deadline_s < float("inf"):
            seconds[:-1][slowdown * load[:-1] > inputs.deadline_s] = float("inf")
        return seconds

    def overlap_s(
        self, tiers: np.ndarray, waits_s: np.ndarray, num_records: np.ndarray | int, pass_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is saved where the last load brings layers, and in how many steps that is best.

        Args:
            tiers: `[n]`, of the load.
            waits_s: `[n]`, that a pass waits for it and for nothing else.
            num_records: `[n]` or one number, of the load.
            pass_s: Of the pass, by itself.
        """
        idle_s = np.where(self.is_layered[tiers], self._idle_share[tiers] * waits_s, 0.0)
        step_s = layer_step_s(self._latency_s[tiers], num_records)
        return overlap_saved_s(idle_s, pass_s, step_s, self.inputs.slowdown)

    def _cut_latency_s(self, end: int) -> float:
        """Of a call that begins inside a run."""
        is_cut = 0 < end < self.num_blocks and self.tiers[end - 1] == self.tiers[end]
        return float(self._latency_s[self.tiers[end - 1]]) if is_cut else 0.0

    def _sum_holes(self, is_held: np.ndarray) -> np.ndarray:
        """Running sum of computing the blocks that no tier holds, a pass for each."""
        seconds = np.diff(self._compute) + self.inputs.prefill.pass_s
        return _running_sum(np.where(is_held, 0.0, seconds))


def both_s(compute: np.ndarray, load: np.ndarray, slowdown: float) -> np.ndarray:
    """Seconds of computing and loading beside each other, from what each takes by itself.

    Both go on `slowdown` times slower until the shorter one ends, then the other at full speed.
    """
    return slowdown * np.minimum(compute, load) + np.abs(compute - load)


def _usable(inputs: PlanInputs) -> np.ndarray:
    missing = np.flatnonzero(inputs.tiers < 0) if inputs.has_windows else np.empty(0, np.int64)
    if len(missing) == 0:
        return inputs.tiers
    tiers = inputs.tiers.copy()
    tiers[int(missing[0]) :] = -1
    return tiers


def _running_sum(values: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, out=sums[1:])
    return sums
