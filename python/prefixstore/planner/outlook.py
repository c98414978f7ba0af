"""How long what is left of one restore takes, with the speeds that this very request has seen.

Blocks and tokens are counted from the prompt's start.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefixstore.planner.calls import call_start, layer_steps
from prefixstore.planner.contention import ContendedCall
from prefixstore.planner.fronts import LoadAhead
from prefixstore.planner.pace import Pace
from prefixstore.planner.plan import RestorePlan, load_patience_s


@dataclass(frozen=True)
class NextLoad:
    """A call that may begin. Seconds are by itself.

    Attributes:
        last_block: Of the call.
        call_s: That it takes.
        left_s: Until all is loaded.
    """

    last_block: int
    call_s: float
    left_s: float


class Outlook:
    """What is expected of a plan's costs and a request's pace.

    Args:
        plan: Of the request.
    """

    def __init__(self, plan: RestorePlan) -> None:
        self._costs = plan.costs
        self._inputs = inputs = plan.costs.inputs
        self._offset = inputs.num_device_blocks
        self._pace = Pace(inputs.slowdown)
        # The forward pass over the tokens behind the loaded blocks, which only waits for the loads.
        self._tail_pass_s = plan.costs.tail_pass_s(plan.num_compute_blocks + plan.num_load_blocks)
        self._call = range(0)  # the last one
        self._idle_since: float | None = None  # while no call is under way
        self._num_layer_steps = 1
        self._contended: ContendedCall | None = None  # the same call, among those of others

    # ---- what happens ------------------------------------------------------------------------

    def begin_chunk(self, tokens: range, now: float) -> None:
        """The model begins to compute these tokens."""
        self._pace.begin(self._pace.compute, self._pass_s(tokens), now)

    def end_chunk(self, now: float, *, learns: bool = True) -> None:
        """The chunk is over; without `learns` its time says nothing of the model."""
        self._pace.end(self._pace.compute, now, learns=learns)

    def begin_call(self, blocks: range, num_layer_steps: int, now: float) -> None:
        """A call for these blocks begins, in so many steps of layers; 1 for whole blocks."""
        self._call, self._num_layer_steps, self._idle_since = blocks, num_layer_steps, None
        self._contended = None
        first, end = blocks.start - self._offset, blocks.stop - self._offset
        self._pace.begin(self._pace.load, self._costs.load_s(first, end, num_layer_steps), now)

    def contend(self, call: ContendedCall) -> None:
        """The call is one of several of its tier."""
        self._contended = call

    def end_call(self, now: float, *, learns: bool = True) -> None:
        """The call is over; without `learns` its time says nothing of the tier."""
        crowding = self._contended.mean_factor(now) if self._contended is not None else 1.0
        self._pace.end(self._pace.load, now, learns=learns, crowding=crowding)
        self._contended = None
        self._idle_since = now

    # ---- what is expected --------------------------------------------------------------------

    def best_split(self, low: int, back: int, now: float) -> int:
        """Where computing from block `low` and loading down from `back` are done first."""
        self._pace.advance(now)
        is_layered = self._pace.load.work is not None and self._num_layer_steps > 1
        seconds = self._costs.split_s(
            low - self._offset,
            back - self._offset,
            compute_scale=self._pace.compute.scale,
            load_scale=self._pace.load.scale,
            compute_ready_s=self._pace.compute.left_s(now),
            load_ready_s=self._pace.load.left_s(now, self._crowding),
            pass_s=self._pace.compute.scale * self._tail_pass_s,
            layered_tier=int(self._costs.tiers[back - self._offset]) if is_layered else -1,
        )
        return low + int(seconds.argmin())

    def whole_call(self, first: int, back: int) -> range:
        """The next call of whole blocks, which ends at `back` and begins at `first` or later."""
        start = call_start(self._costs, first - self._offset, back - self._offset)
        return range(self._offset + start, back)

    def layer_steps(self, low: int, first: int, back: int, now: float) -> int:
        """In how many steps of layers blocks `first` to `back` are best brought; 1 for none.

        Those from `low` on are computed meanwhile.
        """
        self._pace.advance(now)
        return layer_steps(
            *(self._costs, first - self._offset, back - self._offset),
            pass_s=self._pace.compute.scale * self._tail_pass_s,
            compute_s=self._pace.compute.left_s(now) + self.compute_s(low, first),
            load_scale=self._pace.load.scale,
        )

    def compute_s(self, first: int, end: int) -> float:
        """To compute these blocks, by itself."""
        seconds = self._costs.compute_s(first - self._offset, end - self._offset)
        return self._pace.compute.scale * seconds

    def wait_s(self, front: int, back: int, now: float) -> tuple[float, float]:
        """Since when a call is waited for, and how much longer, by itself, it is to be.

        It is the one under way, or else the next one to be begun: that takes a thread, and is
        waited for as long as for the call itself.

        Args:
            front: Block where the next one ends at the latest, to the front.
            back: Block behind it.
            now: When.
        """
        work = self._pace.load.work
        if work is not None:
            return now - work.started_at, self.patience_left_s(now)
        self._idle_since = now if self._idle_since is None else self._idle_since
        waited_s = now - self._idle_since
        return waited_s, self._patience_s(self.whole_call(front, back)) - waited_s

    def patience_left_s(self, now: float) -> float:
        """Until the call under way will have disappointed, by itself."""
        self._pace.advance(now)
        patience_s = self._patience_s(self._call, self._num_layer_steps, self._crowding)
        return patience_s - self._pace.load.done_s(now)

    def call_left_s(self, now: float) -> float:
        """Until the call under way is over, by itself; 0 if there is none."""
        self._pace.advance(now)
        return self._pace.load.left_s(now, self._crowding) / self._crowding

    def next_load(self, blocks: range) -> NextLoad:
        """Of the call that comes next where these are all that is left to load."""
        call = self.whole_call(blocks.start, blocks.stop)
        return NextLoad(blocks.stop - 1, self._load_s(call), self._load_s(blocks))

    def load_ahead(self, low: int, back: int, now: float, *, is_on_time: bool) -> LoadAhead:
        """Of the call under way, and of blocks `low` to `back`."""
        # What no tier holds is to be computed anyway.
        is_held = low < back and self._costs.tiers[low - self._offset] >= 0
        back = back if is_held else low
        front_s = self._load_s(range(low, back))
        # What is left of the call is counted as if it were alone: the others' is their own.
        load_s = self.call_left_s(now) + front_s
        tier_s = self._contended.tier_s if self._contended is not None else 1.0
        return LoadAhead(
            load_s=tier_s * load_s,
            block_size=self._inputs.block_size,
            front_tokens=(back - low) * self._inputs.block_size,
            front_load_s=tier_s * front_s,
            front_compute_s=self.compute_s(low, back),
            pass_s=self._inputs.prefill.pass_s,
            is_on_time=is_on_time,
        )

    def early_s(self, tokens: range, now: float) -> float:
        """How much too early a pass over these would be that never waits for the call's layers."""
        self._pace.advance(now)
        until_last_s = self._pass_s(tokens) * (1 - 1 / self._num_layer_steps)
        left_s = self._pace.load.left_s(now, self._crowding)
        return left_s - self._pace.compute.scale * until_last_s

    def _load_s(self, blocks: range) -> float:
        seconds = self._costs.load_s(blocks.start - self._offset, blocks.stop - self._offset)
        return self._pace.load.scale * seconds

    @property
    def _crowding(self) -> float:
        """How many times as long as alone the call under way takes at most."""
        return self._contended.longest if self._contended is not None else 1.0

    def _patience_s(self, call: range, num_layer_steps: int = 1, crowding: float = 1.0) -> float:
        return load_patience_s(
            *(self._costs, call.start - self._offset, call.stop - self._offset),
            load_scale=self._pace.load.scale,
            crowding=crowding,
            num_layer_steps=num_layer_steps,
        )

    def _pass_s(self, tokens: range) -> float:
        return self._inputs.prefill.seconds(len(tokens), tokens.start, len(tokens))
