"""Computing from the front and loading from the back, until they meet.

    block   0 ...... front ........ back .................. end ..... last token
            present  being computed  unclaimed   being loaded, loaded  the tail
            ------------------>                  <------------

Every block is in one state, so none is computed that was loaded, and none is loaded that was
computed. Both sides ask what to do next; the answer weighs what is left with the speeds that this
very request has seen, so a wrong estimate costs little more than the first chunk and the first
call. A load that is overdue does not hold computing up, nor one that nobody begins: the front takes
blocks back from it, and what arrives too late is dropped.

The last call may bring layer after layer of its blocks; then the tokens behind them may be begun
beside it (overlap.py). What was computed so counts only if every layer came.

After each event ask `next_call` first, if no call is under way, then `next_chunk`; where that has
nothing, `next_overlapped_chunk`.

Pure: the caller says what happened and when. Not thread-safe: the caller holds one lock.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from prefixstore.planner.contention import ContendedCall
from prefixstore.planner.fronts import LoadAhead
from prefixstore.planner.outlook import NextLoad, Outlook
from prefixstore.planner.plan import RestorePlan
from prefixstore.planner.prompt_blocks import ABSENT, LOADING, PRESENT, PromptBlocks
from prefixstore.planner.stats import MeetingCounts

_CLOCK_S = 1e-6  # nobody wakes more precisely


class Meeting:
    """The state of one restore. Blocks and tokens are counted from the prompt's start.

    Args:
        plan: What was planned; where both sides meet may change.
    """

    def __init__(self, plan: RestorePlan) -> None:
        self._plan = plan
        self._inputs = inputs = plan.costs.inputs
        self._offset = inputs.num_device_blocks
        self._blocks = PromptBlocks(inputs.num_tokens, inputs.block_size, self._offset)
        # Everything from here on was offered to the loader.
        self._back = self._offset + plan.num_compute_blocks + plan.num_load_blocks
        self._probe = range(self._offset + plan.probe.start, self._offset + plan.probe.stop)
        self._is_probing = False  # the call under way is for these
        self._is_loading_over = plan.num_load_blocks == 0
        self._load_end = self._back
        self._call: range | None = None
        self._num_steps = 1  # of the call
        self._is_overlap_tried = False
        self._outlook = Outlook(plan)
        self._overtaken: set[int] = set()
        self._cut_off: set[int] = set()
        self._num_computed = self._num_loaded = self._num_dropped = 0
        self._is_given_up = False
        self._wake_at: float | None = None

    # ---- the front ---------------------------------------------------------------------------

    def next_chunk(self, now: float, max_tokens: int | None = None) -> range | None:
        """Tokens to be computed now; `chunk_done` is to follow.

        What is more than one chunk is cut evenly: a short last one would take nearly as long as one
        of half the length.

        Args:
            now: On the clock of all these calls.
            max_tokens: At most so many; None for a chunk of the plan.

        Returns:
            The tokens' positions; None if there is nothing to compute now: `is_done`, or the load
            is waited for. Then ask again after the next event, or at `wake_at`.
        """
        self._wake_at = None
        self._blocks.skip_present()
        inputs, size = self._inputs, self._inputs.block_size
        max_tokens = inputs.chunk_tokens if max_tokens is None else max_tokens
        if self.is_done or max_tokens <= 0:
            return None
        end = self._computable_until(now)
        start = self._blocks.next_token
        limit = min(end * size, inputs.num_tokens)
        if limit <= start:
            return None
        num_chunks = -(-(limit - start) // max_tokens)
        share = -(-(limit - start) // num_chunks)
        stop = min(-(-(start + share) // size) * size, start + max_tokens, limit)
        if stop < limit and stop // size * size > start and not self._is_loading_over:
            stop = stop // size * size  # what is begun of a block cannot be loaded any more
        return self._begin_chunk(range(start, stop), now)

    def next_overlapped_chunk(
        self, now: float, max_tokens: int | None = None, *, is_alone: bool = True
    ) -> range | None:
        """Tokens behind the blocks of the call under way, to be computed while its layers come.

        Each layer is to be waited for before it is attended to. `chunk_done` or `chunk_void` is to
        follow, after the call.

        Args:
            now: As for `next_chunk`.
            max_tokens: As for `next_chunk`.
            is_alone: Nobody else waits for the forward pass. Else it is begun only once the layers
                are expected to come sooner than it gets to them.

        Returns:
            The tokens' positions; None if there is no such call, or not now: see `wake_at`.
        """
        size, call = self._inputs.block_size, self._call
        if call is None or self._num_steps == 1 or self._is_overlap_tried:
            return None
        if self.overdue_at(now) <= now:
            return None
        if self._blocks.next_token != call.start * size or not self._blocks.are(call, LOADING):
            return None
        behind = self._blocks.present_until(call.stop)
        max_tokens = self._inputs.chunk_tokens if max_tokens is None else max_tokens
        chunk = range(behind * size, min(self._inputs.num_tokens, behind * size + max_tokens))
        early_s = self._outlook.early_s(chunk, now)
        if not is_alone and early_s > _CLOCK_S:
            self._wake_at = min(self._wake_at or math.inf, now + early_s)
            return None
        self._is_overlap_tried = True
        return self._begin_chunk(chunk, now)

    def overdue_at(self, now: float) -> float:
        """When the call under way will have disappointed, the model computing beside it."""
        return now + self._inputs.slowdown * self._outlook.patience_left_s(now)

    @property
    def is_chunk_valid(self) -> bool:
        """Whether all blocks before the chunk under way are there."""
        chunk = self._blocks.chunk
        assert chunk is not None, "no chunk was begun"
        return self._blocks.are(range(chunk.start // self._inputs.block_size), PRESENT)

    def chunk_void(self, now: float) -> None:
        """Not all came that the chunk of `next_overlapped_chunk` reads: it is computed again."""
        self._blocks.void_chunk()
        self._outlook.end_chunk(now, learns=False)

    def chunk_done(self, now: float) -> None:
        """The chunk that `next_chunk` or `next_overlapped_chunk` gave is computed."""
        chunk = self._blocks.chunk
        assert chunk is not None, "no chunk was begun"
        # One that waited for layers says nothing of the model's speed.
        is_overlapped = chunk.start > self._blocks.next_token
        self._outlook.end_chunk(now, learns=not is_overlapped)
        self._num_computed += self._blocks.end_chunk()

    def _begin_chunk(self, tokens: range, now: float) -> range:
        self._blocks.begin_chunk(tokens)
        self._outlook.begin_chunk(tokens, now)
        return tokens

    # ---- the back ----------------------------------------------------------------------------

    def next_call(self, now: float) -> range | None:
        """Blocks to be loaded now, in one call, of one tier, the last one being needed least.

        `call_done` or `stop_loading` is to follow.

        Returns:
            Block numbers, ascending; None if there is nothing more to load, now or later. For how
            they are to be loaded see `num_layer_steps`.
        """
        assert self._call is None, "one call at a time"
        low = self._blocks.claimed_until
        self._skip_unheld(low)
        first = self._back
        if not self._is_loading_over and self._back > low:
            first = self._outlook.best_split(low, self._back, now)
        if first == self._back:
            self._is_loading_over = True  # computing the rest is faster
            return self._next_probe(now)
        self._call, self._num_steps = self._size_call(low, first, now)
        self._back = self._call.start
        self._blocks.set(self._call, LOADING)
        self._outlook.begin_call(self._call, self._num_steps, now)
        return self._call

    def next_load(self) -> NextLoad | None:
        """What `next_call` would give, between two calls, without beginning it.

        Not exactly: where the front will be by then is not looked at.

        Returns:
            None if nothing is left to load.
        """
        assert self._call is None, "one call at a time"
        low = self._blocks.claimed_until
        self._skip_unheld(low)
        if not self._is_loading_over and self._back > low:
            return self._outlook.next_load(range(low, self._back))
        return self._outlook.next_load(self._probe) if self._probe else None

    def call_left_s(self, now: float) -> float | None:
        """Until the call under way is over, by itself; None if there is none, or it is overdue."""
        if self._call is None or self.overdue_at(now) <= now:
            return None
        return self._outlook.call_left_s(now)

    def contend(self, call: ContendedCall) -> None:
        """The call under way has others of its tier beside it."""
        assert self._call is not None, "no call was begun"
        self._outlook.contend(call)

    @property
    def is_probing(self) -> bool:
        """The call under way is to measure a tier: nobody waits for its blocks."""
        return self._is_probing

    @property
    def num_layer_steps(self) -> int:
        """Of the call under way: 1 for whole blocks, else some layers of all of them at a time."""
        return self._num_steps

    def call_done(self, now: float, missing: Collection[int] = ()) -> list[int]:
        """The call that `next_call` gave is over.

        Args:
            now: When.
            missing: Those of its blocks that did not come: misses, failed verification.

        Returns:
            The blocks to keep; the others came too late or are of no use.
        """
        assert self._call is not None, "no call was begun"
        # A miss is answered sooner than a hit, so it says nothing of the tier's speed.
        self._outlook.end_call(now, learns=not missing)
        wanted = [block for block in self._call if self._is_wanted(block)]
        kept = [block for block in wanted if block not in missing]
        if self._inputs.has_windows and missing:
            # Attention windows would reach over the gap: all before it is computed, and what of
            # that other calls were to bring is not asked for.
            not_asked = [] if self._is_probing else self._planned_before(self._call.start)
            self._cut_off.update(block for block in kept if block < max(missing))
            self._cut_off.update(not_asked)
            kept = [block for block in kept if block > max(missing)]
            self._is_loading_over = True
        self._drop_call()
        self._blocks.set(kept, PRESENT)
        self._num_loaded += len(kept)
        self._num_dropped += len(self._call) - len(missing) - len(kept)
        self._call, self._is_probing = None, False
        return kept

    def stop_loading(self, now: float) -> None:
        """The tier failed or the call was cancelled: what has not come is computed."""
        self._is_loading_over, self._probe = True, range(0)
        if self._call is None:
            return
        self._outlook.end_call(now, learns=False)
        self._drop_call()
        self._is_given_up = self._is_given_up or not self._is_probing
        self._call, self._is_probing = None, False

    def load_ahead(self, now: float) -> LoadAhead | None:
        """What is still to be loaded while others wait for the model; between two chunks.

        The front may be made to wait for it, until `wake_at` at most.

        Returns:
            None if nothing is, or if the call under way is overdue.
        """
        self._wake_at = None
        low = self._blocks.claimed_until
        if self._call is None:
            self._skip_unheld(low)
        is_loading = self._call is not None or not (self._is_loading_over or self._back <= low)
        if not is_loading or self._is_probing:
            return None
        until_s = self._outlook.wait_s(low, self._back, now)[1]
        if until_s > _CLOCK_S:
            self._wake_at = now + until_s
        elif self._call is not None:
            return None
        return self._outlook.load_ahead(low, self._back, now, is_on_time=until_s > _CLOCK_S)

    # ---- both --------------------------------------------------------------------------------

    @property
    def num_left(self) -> int:
        """Tokens that are not there yet; between two chunks."""
        return self._blocks.num_left

    @property
    def is_done(self) -> bool:
        """Every token is there."""
        return self._blocks.is_done

    @property
    def wake_at(self) -> float | None:
        """When `next_chunk`, having returned None, is to be asked again if nothing happens."""
        return self._wake_at

    @property
    def should_cancel(self) -> bool:
        """A call is under way of which nobody wants anything any more."""
        if self._call is None or self._is_probing:
            return False
        return not self._blocks.within(self._call, LOADING)

    @property
    def overtaken(self) -> Collection[int]:
        """Blocks that were no longer waited for."""
        return self._overtaken

    @property
    def cut_off(self) -> Collection[int]:
        """Blocks that came in vain, or were not asked for any more: windows would reach from behind
        a missing one to them.
        """
        return self._cut_off

    def counts(self) -> MeetingCounts:
        """Blocks computed, loaded and dropped so far."""
        return MeetingCounts(
            self._num_computed, self._num_loaded, self._num_dropped, self._is_given_up
        )

    # ---- decisions ---------------------------------------------------------------------------

    def _computable_until(self, now: float) -> int:
        """Block before which the front may go on now; the block it stands at for waiting."""
        front = end = self._blocks.front
        limit = self._blocks.run_until(front)
        if self._blocks.state(front) == ABSENT:
            if self._call is None:
                self._skip_unheld(front)
            if self._is_loading_over or front >= self._back:
                return limit
            limit = min(limit, self._back)
            is_begun = self._blocks.next_token % self._inputs.block_size > 0
            split = self._outlook.best_split(front, self._back, now)
            end = min(limit, max(split, front + is_begun))
        return end if end > front else self._patient_until(front, limit, now)

    def _patient_until(self, front: int, limit: int, now: float) -> int:
        """What the front may compute though waiting seemed better.

        Nothing before the call under way is overdue, or the next one to be begun, for which no
        thread may be free. Then what takes half as long as was waited already: if the blocks arrive
        right after, the wait was half again as long, no more.
        """
        outlook = self._outlook
        waited_s, left_s = outlook.wait_s(front, self._back, now)
        half_s = waited_s / 2
        block_s = outlook.compute_s(front, front + 1)
        left_s = max(left_s, 2 * (block_s - half_s))
        if left_s > _CLOCK_S:
            self._wake_at = now + left_s
            return front
        end = front + 1
        while end < limit and outlook.compute_s(front, end + 1) <= half_s:
            end += 1
        self._is_given_up = True
        self._overtaken.update(range(front, end))
        return end

    def _size_call(self, low: int, first: int, now: float) -> tuple[range, int]:
        """The next call, which brings blocks from `first` on, and in how many steps of layers.

        The front computes those from `low` on.
        """
        if self._blocks.are(range(self._back, self._load_end), PRESENT):
            num_steps = self._outlook.layer_steps(low, first, self._back, now)
            if num_steps > 1:
                return range(first, self._back), num_steps
        return self._outlook.whole_call(first, self._back), 1

    def _next_probe(self, now: float) -> range | None:
        """Blocks that are loaded once all others are: computing goes on as if they were not."""
        probe, self._probe = self._probe, range(0)
        if not probe:
            return None
        self._call, self._num_steps, self._is_probing = probe, 1, True
        self._outlook.begin_call(probe, 1, now)
        return probe

    def _is_wanted(self, block: int) -> bool:
        """Whether a block of the call is still of use."""
        if self._is_probing:
            is_claimed = block < self._blocks.claimed_until
            return not is_claimed and self._blocks.state(block) == ABSENT
        return self._blocks.state(block) == LOADING

    def _planned_before(self, back: int) -> list[int]:
        """Blocks before `back` that the plan has loaded, as far as computing has not come."""
        first = max(self._offset + self._plan.num_compute_blocks, self._blocks.claimed_until)
        return self._blocks.within(range(first, max(first, back)), ABSENT)

    def _drop_call(self) -> None:
        """What is still being loaded counts as absent."""
        assert self._call is not None
        self._blocks.set(self._blocks.within(self._call, LOADING), ABSENT)

    def _skip_unheld(self, low: int) -> None:
        """Offer the loader nothing, from `low` on, that no tier holds: the front computes it."""
        while self._back > low and self._plan.costs.tiers[self._back - 1 - self._offset] < 0:
            self._back -= 1
