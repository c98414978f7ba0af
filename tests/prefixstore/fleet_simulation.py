"""Prompts that arrive together on one model and one tier, in simulated time.

The planner, the meetings and the turns are the real ones; what is left of a scheduler and of
loaders is here. Unlike in planner_simulation.py, computing and loading do not slow each other down.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prefixstore.engine.load_turns import Load, LoadTurns
from prefixstore.engine.prefill_turns import Prefill, PrefillTurns
from prefixstore.planner import (
    ContendedCall,
    Contention,
    Meeting,
    Planner,
    PlannerConfig,
    PrefillEstimate,
    TierEstimate,
)

SIZE = 64
BLOCK_BYTES = 1 << 20
CHUNK_TOKENS = 576
NUM_LOADERS = 4
_MAX_EVENTS = 100_000
_TIER = "link"


@dataclass(frozen=True)
class Prompt:
    """`num_prefix` tokens are in the tier, `num_tail` more are not."""

    arrives_at: float
    num_prefix: int
    num_tail: int


@dataclass(frozen=True)
class FleetWorld:
    """The true speeds.

    Attributes:
        prefill: Of the model.
        tier: Of a call alone.
        sharing: As in `Contention`: 1 for calls that divide the rate, 0 for others.
        hangs: No call is ever answered.
    """

    prefill: PrefillEstimate
    tier: TierEstimate
    sharing: float = 1.0
    hangs: bool = False


@dataclass(eq=False)
class _Request:
    prompt: Prompt
    meeting: Meeting
    call: _Call | None = None
    done_at: float = math.nan


@dataclass(eq=False)
class _Call:
    request: _Request
    contended: ContendedCall
    num_blocks: int
    latency_s: float  # left
    num_bytes: float  # left


@dataclass
class Fleet:
    """See the module; `run` gives the seconds to the first token, in the order of the prompts.

    Args:
        world: The true speeds, which the planner knows at first.
        policy: As in `PlannerConfig`.
        takes_turns: With calls; else each begins as soon as there is a loader.
    """

    world: FleetWorld
    policy: str = "planned"
    takes_turns: bool = True
    _now: float = 0.0
    _running: list[_Request] = field(default_factory=list)
    _loading: list[_Request] = field(default_factory=list)
    _steps: list[tuple[_Request, range]] = field(default_factory=list)
    _pass_began: float = 0.0

    def __post_init__(self) -> None:
        # No probes: there is one tier, and it is loaded from.
        config = PlannerConfig(policy=self.policy, probe_interval_s=1e9)
        self._planner = Planner([_TIER], SIZE, CHUNK_TOKENS, config=config)
        self._contention = Contention(_TIER)
        self._turns, self._load_turns = PrefillTurns(), LoadTurns()
        prefill, tier = self.world.prefill, self.world.tier
        for number in range(30):
            num_new, context = (64, 512, 256, 32)[number % 4], (0, 1024, 8192)[number % 3]
            seconds = prefill.seconds(num_new, context, num_new)
            self._planner.observe_prefill(num_new, context, seconds)
            num_records = (1, 8, 32)[number % 3]
            num_bytes = num_records * BLOCK_BYTES
            seconds = tier.seconds(num_bytes)
            self._planner.observe_load(_TIER, num_bytes, num_records, seconds, number - 30.0)

    def run(self, prompts: Sequence[Prompt]) -> list[float]:
        arrivals = [(one.arrives_at, number) for number, one in enumerate(prompts)]
        heapq.heapify(arrivals)
        requests: dict[int, _Request] = {}
        for _ in range(_MAX_EVENTS):
            while arrivals and arrivals[0][0] <= self._now:
                number = heapq.heappop(arrivals)[1]
                requests[number] = self._admit(prompts[number])
            self._begin_calls()
            if not self._steps:
                self._begin_pass()
            if not self._running and not arrivals:
                return [requests[i].done_at - one.arrives_at for i, one in enumerate(prompts)]
            self._advance(arrivals[0][0] if arrivals else math.inf)
        raise AssertionError(f"expected an end, got {_MAX_EVENTS} events in {self._now} s")

    def _admit(self, prompt: Prompt) -> _Request:
        num_blocks = prompt.num_prefix // SIZE
        plan = self._planner.plan(
            prompt.num_prefix + prompt.num_tail,
            0,
            [_TIER] * num_blocks,
            [BLOCK_BYTES] * num_blocks,
            self._now,
        )
        request = _Request(prompt, Meeting(plan))
        self._running.append(request)
        if plan.num_load_blocks:
            self._loading.append(request)
        return request

    # ---- the tier ----------------------------------------------------------------------------

    def _begin_calls(self) -> None:
        while sum(1 for _ in self._calls()) < NUM_LOADERS:
            request = self._next_turn()
            if request is None:
                return
            blocks = request.meeting.next_call(self._now)
            if blocks is None:
                self._loading.remove(request)
                continue
            contended = self._contention.begin(self._now)
            request.meeting.contend(contended)
            latency_s = math.inf if self.world.hangs else self.world.tier.latency_s
            num_bytes = len(blocks) * BLOCK_BYTES
            request.call = _Call(request, contended, len(blocks), latency_s, num_bytes)

    def _next_turn(self) -> _Request | None:
        waiting = []
        for request in [one for one in self._loading if one.call is None]:
            is_over = not math.isnan(request.done_at)
            found = None if is_over else request.meeting.next_load()
            if found is None:
                self._loading.remove(request)
            else:
                waiting.append((request, Load(_TIER, found.call_s, found.left_s)))
        if not self.takes_turns:
            return waiting[0][0] if waiting else None
        left = [one.request.meeting.call_left_s(self._now) for one in self._calls()]
        under_way = [Load(_TIER, seconds, seconds) for seconds in left if seconds is not None]
        loads = [load for _, load in waiting]
        turn = self._load_turns.next(loads, under_way, self._planner.tiers())
        if turn is None:
            return None
        self._load_turns.take(turn)
        return waiting[turn.index][0]

    def _calls(self) -> Iterator[_Call]:
        return (one.call for one in self._loading if one.call is not None)

    def _end_call(self, call: _Call) -> None:
        now, request = self._now, call.request
        self._planner.observe_load(
            *(_TIER, call.num_blocks * BLOCK_BYTES, call.num_blocks),
            *(now - call.contended.began, now),
            num_beside=call.contended.num_beside(now),
        )
        self._contention.sharing = self._planner.tiers()[_TIER].sharing
        if math.isnan(request.done_at):
            request.meeting.call_done(now)
        self._contention.end(call.contended, now)
        request.call = None

    # ---- the model ---------------------------------------------------------------------------

    def _begin_pass(self) -> None:
        meetings = [one.meeting for one in self._running]
        prefills = [Prefill("", one.num_left, one.load_ahead(self._now)) for one in meetings]
        for turn in self._turns.of_pass(prefills, CHUNK_TOKENS):
            chunk = meetings[turn.index].next_chunk(self._now, turn.max_tokens)
            if chunk is not None:
                self._steps.append((self._running[turn.index], chunk))
                turn.num_taken = len(chunk)
        self._pass_began = self._now

    def _pass_ends_at(self) -> float:
        if not self._steps:
            return math.inf
        num_new, pairs = self._work()
        prefill = self.world.prefill
        seconds = prefill.pass_s + prefill.token_s * num_new + prefill.pair_s * pairs
        return self._pass_began + seconds

    def _work(self) -> tuple[int, float]:
        chunks = [chunk for _, chunk in self._steps]
        pairs = sum(len(chunk) * (chunk.start + chunk.stop) / 2 for chunk in chunks)
        return sum(map(len, chunks)), pairs

    def _end_pass(self) -> None:
        num_new, pairs = self._work()
        context = max(0, round(pairs / num_new - num_new / 2))
        self._planner.observe_prefill(num_new, context, self._now - self._pass_began)
        for request, _ in self._steps:
            request.meeting.chunk_done(self._now)
            if request.meeting.is_done:
                request.done_at = self._now
                self._running.remove(request)
        self._steps = []

    # ---- time --------------------------------------------------------------------------------

    def _advance(self, next_arrival: float) -> None:
        """To the next event."""
        transfers = [one for one in self._calls() if one.latency_s <= 0]
        rate = self.world.tier.bytes_per_s
        rate /= 1 + self.world.sharing * max(0, len(transfers) - 1)
        pass_ends_at = self._pass_ends_at()
        times = [next_arrival, pass_ends_at]
        times += [self._now + one.latency_s for one in self._calls() if one.latency_s > 0]
        times += [self._now + one.num_bytes / rate for one in transfers]
        if not self._steps:
            wakes = [one.meeting.wake_at for one in self._running]
            times += [max(wake, self._now + 1e-6) for wake in wakes if wake is not None]
        overdue = [
            one.request.meeting.overdue_at(self._now)
            for one in self._calls()
            if math.isnan(one.request.done_at)
        ]
        times += [time + 1e-6 for time in overdue if time > self._now]
        now = max(self._now, min(times))
        assert now < math.inf, "nothing will ever happen"
        for call in self._calls():
            if call.latency_s > 0:
                call.latency_s -= now - self._now
                if call.latency_s < 1e-9:
                    call.latency_s = 0.0
            else:
                call.num_bytes -= (now - self._now) * rate
        self._now = now
        for call in [one for one in transfers if one.num_bytes < 1.0]:
            self._end_call(call)
        if self._steps and now >= pass_ends_at:
            self._end_pass()


def mean_ttft_s(
    world: FleetWorld,
    prompts: Sequence[Prompt],
    policy: str = "planned",
    takes_turns: bool = True,
) -> float:
    return statistics.mean(Fleet(world, policy, takes_turns).run(prompts))
