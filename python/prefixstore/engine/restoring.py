"""One prompt's way into the pool: what is computed, what is loaded, and what became of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from prefixstore.engine.held_blocks import HeldBlocks
from prefixstore.engine.load_call import LoadCall
from prefixstore.engine.load_turns import Load
from prefixstore.engine.sequence import SequenceBlocks
from prefixstore.planner import LoadAhead, Meeting, RestorePlan
from prefixstore.reuse_report import DEVICE, MissReason, ReuseReport


@dataclass(frozen=True)
class Restored:
    """What became of one prompt; see `RequestReport`.

    Attributes:
        reuse: Tokens by where they came from.
        mode: The plan, in a word.
        lookup_s: Until the plan was made.
        load_s: Loads under way.
        saved_s: Seconds of computing that loading saved, as the planner reckons.
    """

    reuse: ReuseReport
    mode: str = "none"
    lookup_s: float = 0.0
    load_s: float = 0.0
    saved_s: float = 0.0


class Restoring:
    """A prompt in prefill, from its admission until all its tokens are computed.

    ::

        look-up under way      nothing is computed yet
        planned                computing from the front, loading from the back
        finished

    A look-up that takes too long is not waited for: computing begins by a plan that loads nothing.
    When the answer comes after all, what is left of the prompt gets a new plan.

    Not thread-safe: everything happens under the engine's lock.

    Args:
        num_tokens: To be computed or loaded, the cached ones included.
        block_size: Tokens in a block.
        sequence: Of the request.
        now: Of `time.monotonic`, as everywhere here.
        tenant: Whose it is.
    """

    def __init__(
        self,
        num_tokens: int,
        block_size: int,
        sequence: SequenceBlocks,
        now: float,
        tenant: str = "",
    ) -> None:
        self.num_tokens = num_tokens
        self.tenant = tenant
        self.sequence = sequence
        self.num_device = sequence.num_reused
        self.lookup_s = self.load_s = 0.0
        self.is_over = False  # finished, cancelled or preempted: nothing more is wanted
        self.deadline = math.inf  # after it the tiers are not waited for
        self._block_size = block_size
        self._began = self._planned = now
        self._finished = 0.0
        self._held: HeldBlocks | None = None
        self._meeting: Meeting | None = None
        self._plan: RestorePlan | None = None
        self._chunk = range(0)  # the last one to be computed
        self._late_answer: HeldBlocks | None = None
        self._num_before_answer = 0  # whole blocks that were there when it was taken
        self._load: LoadCall | None = None
        self._loaded: dict[int, str] = {}
        self._lost: set[int] = set()
        self._late: set[int] = set()
        self._has_no_room = False
        self._was_here: Sequence[bool] = ()

    @property
    def num_whole(self) -> int:
        """Blocks that may be reused: whole ones, without the last token."""
        return (self.num_tokens - 1) // self._block_size

    # ---- the course --------------------------------------------------------------------------

    def start(
        self,
        plan: RestorePlan,
        held: HeldBlocks | None,
        was_here: Sequence[bool],
        now: float,
    ) -> None:
        """The look-up is over.

        Args:
            plan: What is to be loaded.
            held: What tiers hold; None if there was no answer in time.
            was_here: Of each of them whether this process had it once.
            now: When.
        """
        self.lookup_s = now - self._began
        self._planned = now
        self._plan, self._held = plan, held
        self._meeting = Meeting(plan)
        self._was_here = was_here

    @property
    def is_planned(self) -> bool:
        """Whether there is a plan: before, nothing is computed."""
        return self._meeting is not None

    @property
    def began(self) -> float:
        """When it was admitted, on `time.monotonic`."""
        return self._began

    def answer_late(self, held: HeldBlocks) -> None:
        """The look-up was not waited for, and this is its answer."""
        assert self.is_planned
        self._late_answer = held

    def take_late_answer(self) -> HeldBlocks | None:
        """The answer that came since, once."""
        answer, self._late_answer = self._late_answer, None
        return answer

    @property
    def num_present(self) -> int:
        """Whole blocks at the front that are there; between two chunks."""
        return max(self.num_device, self._chunk.stop // self._block_size)

    @property
    def num_left(self) -> int:
        """Tokens that are not there yet; between two chunks."""
        if self._meeting is None:
            return self.num_tokens - self.num_device * self._block_size
        return self._meeting.num_left

    def load_ahead(self, now: float) -> LoadAhead | None:
        """What is still to be loaded; see `Meeting.load_ahead`."""
        return None if self._meeting is None else self._meeting.load_ahead(now)

    def restart(self, plan: RestorePlan | None, held: HeldBlocks, now: float) -> None:
        """Go on from what is computed so far, now that it is known who holds what.

        Args:
            plan: Of what is left; None if there is nothing to load.
            held: As for `start`.
            now: When.
        """
        self._held = held
        self._num_before_answer = self.num_present
        if plan is not None:
            self._plan, self._meeting, self._planned = plan, Meeting(plan), now

    def next_chunk(self, now: float, max_tokens: int) -> range | None:
        """Tokens to compute now; see `Meeting.next_chunk`."""
        chunk = None if self._meeting is None else self._meeting.next_chunk(now, max_tokens)
        self._chunk = chunk or self._chunk
        return chunk

    def next_overlapped_chunk(self, now: float, max_tokens: int, *, is_alone: bool) -> range | None:
        """Tokens to compute while blocks before them come; see `Meeting`."""
        if self._load is None or self._meeting is None:
            return None
        return self._meeting.next_overlapped_chunk(now, max_tokens, is_alone=is_alone)

    def overdue_at(self, now: float) -> float:
        """When the load under way is not to be waited for any more."""
        assert self._meeting is not None
        return min(self._meeting.overdue_at(now), self.deadline)

    def chunk_done(self, now: float) -> None:
        """See `Meeting.chunk_done`."""
        assert self._meeting is not None
        self._meeting.chunk_done(now)

    @property
    def is_done(self) -> bool:
        """Whether every token of the prompt is there."""
        return self._meeting is not None and self._meeting.is_done

    @property
    def wake_at(self) -> float | None:
        """When `next_chunk` may have an answer though nothing happened."""
        return None if self._meeting is None else self._meeting.wake_at

    def next_load(self) -> Load | None:
        """What its next call would begin to load, between two calls; None if nothing is left."""
        if self.is_over or self._meeting is None:
            return None
        found = self._meeting.next_load()
        if found is None:
            return None
        return Load(self._tier_of(found.last_block), found.call_s, found.left_s, self.tenant)

    @property
    def is_loading(self) -> bool:
        """Whether blocks are being loaded, or will be when its turn comes."""
        return self._load is not None or self.next_load() is not None

    def load_left(self, now: float) -> Load | None:
        """What is left of the call under way; None if nobody waits for it any more."""
        if self.is_over or self._meeting is None or self._load is None:
            return None
        call_s = self._meeting.call_left_s(now)
        if call_s is None:
            return None
        return Load(self._load.tier_call.tier, call_s, call_s, self.tenant)

    def next_call(self, now: float) -> range | None:
        """Blocks to load now; see `Meeting.next_call`."""
        if self.is_over or self._meeting is None:
            return None
        return self._meeting.next_call(now)

    def begin_call(self, load: LoadCall) -> None:
        """What `next_call` gave is being loaded."""
        assert self._meeting is not None
        self._meeting.contend(load.tier_call)
        self._load = load

    @property
    def load_under_way(self) -> LoadCall | None:
        """What is being loaded."""
        return self._load

    def expected_of(self, numbers: range) -> tuple[str, int]:
        """The tier that a call asks for these blocks, and their bytes there."""
        assert self._plan is not None
        inputs = self._plan.costs.inputs
        first = numbers.start - inputs.num_device_blocks
        return self._tier_of(numbers.stop - 1), int(
            inputs.record_bytes[first : first + len(numbers)].sum()
        )

    def _tier_of(self, number: int) -> str:
        assert self._held is not None
        tier = self._held.tiers[number - self.num_device]
        assert tier is not None, "a block is loaded that no tier holds"
        return tier

    def call_done(
        self, numbers: range, found: dict[int, str], seconds: float, now: float
    ) -> Collection[int]:
        """A call is over that found these blocks, by the tiers; returns those to keep."""
        self.load_s += seconds
        self._load = None
        if self.is_over or self._meeting is None:
            return ()
        missing = [number for number in numbers if number not in found]
        kept = self._meeting.call_done(now, missing)
        self._lost.update(missing)
        self._late.update(found.keys() - set(kept) - set(self._meeting.cut_off))
        self._loaded.update((number, found[number]) for number in kept)
        return kept

    def stop_loading(self, now: float, *, has_no_room: bool = False) -> None:
        """What has not come is computed."""
        self._has_no_room = self._has_no_room or has_no_room
        if not self.is_over and self._meeting is not None:
            self._meeting.stop_loading(now)

    def finish(self, now: float) -> None:
        """All is there, or nobody wants it any more."""
        if not self.is_over:
            self.is_over = True
            self._finished = now
            if self._load is not None:
                self.load_s += now - self._load.began

    # ---- what became of it -------------------------------------------------------------------

    @property
    def plan(self) -> RestorePlan | None:
        """The newest plan; None before there is one."""
        return self._plan

    def prefix_end(self, numbers: range) -> int:
        """Block behind the last one of what a call for these blocks is a part of."""
        assert self._plan is not None and self._meeting is not None
        if self._meeting.is_probing:
            return numbers.stop
        first = self._plan.costs.inputs.num_device_blocks
        return first + self._plan.num_compute_blocks + self._plan.num_load_blocks

    def reused(self) -> dict[int, str]:
        """Blocks that were not computed, and where each came from."""
        return {**dict.fromkeys(range(self.num_device), DEVICE), **self._loaded}

    @property
    def meeting(self) -> Meeting | None:
        """The state of that plan; None before there is one."""
        return self._meeting

    @property
    def measured_s(self) -> float:
        """From the plan to the end."""
        return self._finished - self._planned

    def result(self) -> Restored:
        """Of a finished one."""
        assert self._plan is not None
        return Restored(
            reuse=self._reuse(),
            mode=self._plan.mode.value,
            lookup_s=self.lookup_s,
            load_s=self.load_s,
            saved_s=self._plan.recompute_s - self.measured_s if self._loaded else 0.0,
        )

    def _reuse(self) -> ReuseReport:
        size = self._block_size
        by_tier = Counter(self._loaded.values())
        by_tier[DEVICE] = self.num_device
        return ReuseReport(
            num_prompt_tokens=self.num_tokens,
            tokens_by_tier={tier: count * size for tier, count in by_tier.items() if count},
            num_recomputed=self.num_tokens - size * (self.num_device + len(self._loaded)),
            restore_s=self.lookup_s + self.load_s,
            misses={reason.value: count * size for reason, count in self._misses().items()},
        )

    def _misses(self) -> Counter[MissReason]:
        missed = [n for n in range(self.num_device, self.num_whole) if n not in self._loaded]
        return Counter(map(self._reason, missed))

    def _reason(self, number: int) -> MissReason:
        """Why a block was computed."""
        assert self._meeting is not None
        at = number - self.num_device
        if number in self._lost:
            return MissReason.LOST
        if number in self._late or number in self._meeting.overtaken:
            return MissReason.LATE
        if self._held is None or number in self._held.unanswered:
            return MissReason.UNREACHABLE
        if number in self._held.quarantined:
            return MissReason.QUARANTINED
        if number in self._held.cut_off or number in self._meeting.cut_off:
            return MissReason.WINDOW
        if at >= len(self._held.tiers) or self._held.tiers[at] is None:
            return MissReason.EVICTED if self._was_here[at] else MissReason.NEW
        if number < self._num_before_answer:
            return MissReason.LATE
        return MissReason.NO_ROOM if self._has_no_room else MissReason.CHEAPER
