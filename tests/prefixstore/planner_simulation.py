"""A model and a tier in simulated time, to run a `Meeting` against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from prefixstore.planner.costs import PlanInputs
from prefixstore.planner.overlap import layer_step_s
from prefixstore.planner.plan import RestorePlan
from prefixstore.planner.progress import Meeting
from prefixstore.planner.rates import PrefillEstimate, TierEstimate

_MAX_EVENTS = 100_000


@dataclass
class World:
    """The true speeds, which may change while a request runs.

    Attributes:
        prefill: Speed of the model.
        tier: Speed of the only tier.
        slowdown: How much both slow down while computing and loading at once.
        compute_speed: Factor on the model's speed, by time.
        load_speed: Factor on the tier's speed, by time; 0 for a stall.
        missing: Blocks that the tier lacks.
    """

    prefill: PrefillEstimate
    tier: TierEstimate
    slowdown: float = 1.0
    compute_speed: Callable[[float], float] = lambda now: 1.0
    load_speed: Callable[[float], float] = lambda now: 1.0
    missing: frozenset[int] = frozenset()


@dataclass
class Work:
    """A chunk or a load call; for `beside_s` of its time the other side worked too.

    A call that brings layer after layer has steps, as has a chunk computed meanwhile, which waits
    for that call only, until `until`.
    """

    seconds: float  # left, at full speed
    what: range
    started_at: float
    num_steps: int = 1
    until: float = float("inf")
    beside: Work | None = None
    ended_at: float = float("nan")
    beside_s: float = 0.0

    def __post_init__(self) -> None:
        self.step_s = self.seconds / self.num_steps

    @property
    def num_steps_left(self) -> int:
        return math.ceil(self.seconds / self.step_s - 1e-9)

    @property
    def step_left_s(self) -> float:
        """Seconds left of the current step."""
        return self.seconds - (self.num_steps_left - 1) * self.step_s

    def waits_for(self, call: Work | None) -> bool:
        """Whether a chunk must wait for its next layers."""
        if call is None or call is not self.beside:
            return False
        return self.num_steps_left <= call.num_steps_left

    @property
    def took_s(self) -> float:
        return self.ended_at - self.started_at


@dataclass
class Run:
    """What happened in a simulated request.

    Attributes:
        ttft_s: Seconds until the last token was computed.
        computed: How often each token was computed, `[num_tokens]`.
        loaded: How often each block was loaded and kept, `[num_blocks]`.
        chunks: Tokens of each computed chunk.
        calls: Blocks of each load call.
        voids: Chunks begun beside a call that did not bring all its blocks.
        given_up: The call that was cancelled or unfinished at the end, if any.
    """

    meeting: Meeting
    ttft_s: float
    computed: np.ndarray
    loaded: np.ndarray
    chunks: list[Work] = field(default_factory=list)
    calls: list[Work] = field(default_factory=list)
    voids: list[range] = field(default_factory=list)
    given_up: Work | None = None


def simulate(plan: RestorePlan, world: World, step_s: float = float("inf")) -> Run:
    """Run a plan from time 0 to its end.

    Args:
        plan: The plan to run.
        world: The true speeds.
        step_s: How often speeds are read again.
    """
    inputs = plan.costs.inputs
    num_blocks = -(-inputs.num_tokens // inputs.block_size)
    meeting = Meeting(plan)
    run = Run(meeting, 0.0, np.zeros(inputs.num_tokens, int), np.zeros(num_blocks, int))
    now = 0.0
    chunk: Work | None = None
    call: Work | None = None
    for _ in range(_MAX_EVENTS):
        if call is not None and meeting.should_cancel:
            meeting.stop_loading(now)
            call.ended_at = now
            run.given_up, call = call, None
        if call is None and (blocks := meeting.next_call(now)) is not None:
            num_steps = meeting.num_layer_steps
            call = Work(_load_s(inputs, world, blocks, num_steps), blocks, now, num_steps)
        if chunk is None and (tokens := meeting.next_chunk(now)) is not None:
            chunk = Work(_pass_s(world, tokens), tokens, now)
        if chunk is None and (tokens := meeting.next_overlapped_chunk(now)) is not None:
            assert call is not None
            until = meeting.overdue_at(now)
            chunk = Work(_pass_s(world, tokens), tokens, now, call.num_steps, until, call)
        if chunk is None and meeting.is_done:
            run.ttft_s = now
            if call is not None and now > call.started_at:
                call.ended_at = now
                run.given_up = call
            return run
        is_late = chunk is not None and chunk.waits_for(call) and now >= chunk.until
        is_alone = chunk is not None and (call is not chunk.beside or is_late)
        if chunk is not None and is_alone and not meeting.is_chunk_valid:
            meeting.chunk_void(now)
            run.voids.append(chunk.what)
            chunk = None
            continue
        load_speed = world.load_speed(now)  # a stalled tier does not slow the model
        is_computing = chunk is not None and not chunk.waits_for(call)
        is_beside = is_computing and call is not None and load_speed > 0
        slowdown = world.slowdown if is_beside else 1.0
        compute_speed = world.compute_speed(now) / slowdown
        load_speed /= slowdown
        waits = [step_s]
        if chunk is not None:
            waits.append(chunk.step_left_s / compute_speed if is_computing else chunk.until - now)
        elif meeting.wake_at is not None:
            waits.append(meeting.wake_at - now)
        if call is not None and load_speed > 0:
            waits.append(call.step_left_s / load_speed)
        wait_s = min(waits)
        assert 0 <= wait_s < float("inf"), "nothing will ever happen"
        now += wait_s
        if chunk is not None and call is not None:
            chunk.beside_s += wait_s
            call.beside_s += wait_s
        if chunk is not None and is_computing:
            chunk.seconds -= wait_s * compute_speed
            if chunk.seconds <= 1e-12:
                assert meeting.is_chunk_valid, "expected all blocks before a chunk to be there"
                meeting.chunk_done(now)
                run.computed[chunk.what.start : chunk.what.stop] += 1
                chunk.ended_at = now
                run.chunks.append(chunk)
                chunk = None
        if call is not None:
            call.seconds -= wait_s * load_speed
            if call.seconds <= 1e-12:
                kept = meeting.call_done(now, [b for b in call.what if b in world.missing])
                run.loaded[kept] += 1
                call.ended_at = now
                run.calls.append(call)
                call = None
    raise AssertionError(f"expected an end, got {_MAX_EVENTS} events in {now} s")


def _pass_s(world: World, tokens: range) -> float:
    return world.prefill.seconds(len(tokens), tokens.start, len(tokens))


def _load_s(inputs: PlanInputs, world: World, blocks: range, num_steps: int) -> float:
    first = inputs.num_device_blocks
    num_bytes = float(inputs.record_bytes[blocks.start - first : blocks.stop - first].sum())
    steps_s = (num_steps - 1) * layer_step_s(world.tier.latency_s, len(blocks))
    return world.tier.seconds(num_bytes) + steps_s


def recompute_s(inputs: PlanInputs, world: World) -> float:
    """True seconds to compute everything."""
    context = inputs.num_device_blocks * inputs.block_size
    return world.prefill.seconds(inputs.num_tokens - context, context, inputs.chunk_tokens)


def load_s(inputs: PlanInputs, world: World) -> float:
    """True seconds to load all blocks in one call and compute the rest."""
    context = (inputs.num_device_blocks + len(inputs.tiers)) * inputs.block_size
    tail = world.prefill.seconds(inputs.num_tokens - context, context, inputs.chunk_tokens)
    return world.tier.seconds(float(inputs.record_bytes.sum())) + tail


def one_tier(
    num_prefix: int,
    tier: TierEstimate,
    prefill: PrefillEstimate,
    *,
    num_tail: int = 32,
    block_bytes: int = 1 << 20,
    slowdown: float = 1.0,
    num_device_blocks: int = 0,
    has_windows: bool = False,
    chunk_tokens: int = 512,
    is_layered: bool = False,
) -> PlanInputs:
    """A prompt whose prefix is in one tier."""
    num_blocks = num_prefix // 64
    return PlanInputs(
        num_tokens=num_device_blocks * 64 + num_blocks * 64 + num_tail,
        block_size=64,
        num_device_blocks=num_device_blocks,
        tiers=np.zeros(num_blocks, int),
        record_bytes=np.full(num_blocks, block_bytes),
        estimates=[tier],
        prefill=prefill,
        slowdown=slowdown,
        has_windows=has_windows,
        chunk_tokens=chunk_tokens,
        is_layered=[is_layered],
    )
