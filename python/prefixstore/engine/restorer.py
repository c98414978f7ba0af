"""Looks prompts up in the tiers, plans, and loads blocks beside the computing of others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.engine.held_blocks import HeldBlocks, held_blocks
from prefixstore.engine.load_call import LoadCall
from prefixstore.engine.restoring import Restoring
from prefixstore.engine.tier_calls import TierCalls
from prefixstore.planner import ContendedCall, Planner, RestorePlan
from prefixstore.residency import first_block_needed
from prefixstore.store import Store

logger = logging.getLogger(__name__)

_LEAST_LOOKUP_S = 0.02  # a thread that wakes late is not a slow tier
_LOOKUP_SHARE = 0.05  # a look-up may take this share of the prompt's computing time


class Restorer:
    """Brings prompts into the pool, as far as that is faster than computing them.

    A look-up runs in a thread of a small pool, and then one load after another in a thread of a
    second one, so that a look-up is not late because others' loads take long. The engine's thread
    meanwhile computes other requests, and this one from its front. A tier that hangs keeps a thread
    and delays nobody: who waits too long, be it for a thread, computes. On a busy machine it may be
    the thread that had to wait: so a look-up goes on, and an answer that comes late still saves
    what is left.

    Args:
        blocks: The model's.
        planner: Learns speeds and plans.
        num_loaders: Threads of each pool, and so requests at the same time.
        changed: The engine's condition, whose lock guards every `Restoring`; notified when there is
            something to do.
    """

    def __init__(
        self,
        blocks: BlockCache,
        planner: Planner,
        num_loaders: int,
        changed: threading.Condition,
    ) -> None:
        self._blocks = blocks
        self._planner = planner
        self._changed = changed
        self._threads = ThreadPoolExecutor(num_loaders, thread_name_prefix="kv-loader")
        self._look_up_threads = ThreadPoolExecutor(num_loaders, thread_name_prefix="kv-look-up")
        names = blocks.store.tier_names if blocks.store is not None else ()
        self._calls = TierCalls(names, planner)
        self._own = threading.local()  # `call`: the one that this thread has under way
        self._is_computing = False
        self._stop_observing: Callable[[], None] | None = None
        if blocks.store is not None:
            self._stop_observing = blocks.store.observe_loads(self._observe)

    def begin(self, restoring: Restoring, keys: Sequence[Sequence[BlockKey]], now: float) -> None:
        """Bring a prompt in, whose cached prefix its sequence holds already."""
        store = self._blocks.store
        if store is None or restoring.num_device == restoring.num_whole:
            self._start(restoring, keys, HeldBlocks(), now)
            return
        restoring.deadline = store.deadline()
        self._look_up_threads.submit(self._run, store, restoring, keys, self._look_up_and_plan)

    def prepare(self, restoring: Restoring, keys: Sequence[Sequence[BlockKey]], now: float) -> bool:
        """See that there is a plan for the next chunk; False while its look-up is waited for."""
        if not restoring.is_planned:
            if now < self.look_up_until(restoring):
                return False
            self._start(restoring, keys, None, now)
        held = restoring.take_late_answer()
        if held is not None:
            self._restart(restoring, keys, held, now)
        return True

    def look_up_until(self, restoring: Restoring) -> float:
        """When the look-up will have taken too long; at the latest at the request's deadline."""
        left = restoring.num_tokens - restoring.num_device * self._blocks.block_size
        prefill_s = self._planner.prefill_s(left, restoring.num_tokens - left)
        patience_s = max(_LEAST_LOOKUP_S, _LOOKUP_SHARE * prefill_s)
        return min(restoring.began + patience_s, restoring.deadline)

    def loading_s(self, now: float) -> float:
        """Seconds until now in which some load was under way."""
        return self._calls.busy_s(now)

    def note_done(self, restoring: Restoring, now: float) -> None:
        """All of a prompt is there: a call that is still under way took too long."""
        load = restoring.load_under_way
        if load is not None:
            self._observe_given_up(restoring, load, now)

    def note_computing(self, is_computing: bool) -> None:
        """Whether the model computes from now on."""
        self._is_computing = is_computing

    def close(self) -> None:
        """Wait for what is under way; every `Restoring` is to be finished before."""
        if self._stop_observing is not None:
            self._stop_observing()
        # The second pool last: a look-up that ends meanwhile may still give it a load.
        self._look_up_threads.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True, cancel_futures=True)

    # ---- in a thread of a pool ---------------------------------------------------------------

    def _run(
        self,
        store: Store,
        restoring: Restoring,
        keys: Sequence[Sequence[BlockKey]],
        work: Callable[[Store, Restoring, Sequence[Sequence[BlockKey]]], None],
    ) -> None:
        try:
            work(store, restoring, keys)
        except Exception:
            # Errors of tiers are handled in the store: this is a bug of ours. The prompt is
            # computed.
            logger.exception("loading blocks failed")
            with self._changed:
                now = time.monotonic()
                if not restoring.is_planned and not restoring.is_over:
                    self._start(restoring, keys, None, now)
                restoring.stop_loading(now)
                self._changed.notify_all()

    def _look_up_and_plan(
        self, store: Store, restoring: Restoring, keys: Sequence[Sequence[BlockKey]]
    ) -> None:
        if restoring.is_over:
            return
        held = self._look_up(store, restoring, keys)
        with self._changed:
            if restoring.is_over:
                return
            # Its time was up and computing has begun; `prepare` takes the answer.
            if restoring.is_planned:
                restoring.answer_late(held)
                return
            self._start(restoring, keys, held, time.monotonic())
            assert restoring.plan is not None
            if _has_loads(restoring.plan):
                self._threads.submit(self._run, store, restoring, keys, self._load_all)
            self._changed.notify_all()

    def _load_all(
        self, store: Store, restoring: Restoring, keys: Sequence[Sequence[BlockKey]]
    ) -> None:
        while self._load_next(store, restoring, keys):
            pass

    def _look_up(
        self, store: Store, restoring: Restoring, keys: Sequence[Sequence[BlockKey]]
    ) -> HeldBlocks:
        first, end = restoring.num_device, restoring.num_whole
        answers = store.look_up([own[first:end] for own in keys], restoring.deadline)
        windows, size = self._blocks.device.windows, self._blocks.block_size
        return held_blocks(answers, first, store.tier_names, size, windows)

    def _start(
        self,
        restoring: Restoring,
        keys: Sequence[Sequence[BlockKey]],
        held: HeldBlocks | None,
        now: float,
    ) -> None:
        plan = self._plan(restoring, restoring.num_device, held.tiers if held else (), now)
        missing = keys[0][restoring.num_device : restoring.num_whole]
        restoring.start(plan, held, self._blocks.were_here(missing), now)

    def _restart(
        self, restoring: Restoring, keys: Sequence[Sequence[BlockKey]], held: HeldBlocks, now: float
    ) -> None:
        """Load what is left of a prompt that is being computed, if that is worth it."""
        store = self._blocks.store
        assert store is not None
        first = restoring.num_present
        left = held.tiers[first - restoring.num_device :]
        plan = self._plan(restoring, first, left, now) if any(left) else None
        has_loads = plan is not None and _has_loads(plan)
        restoring.restart(plan if has_loads else None, held, now)
        if has_loads:
            # Drop a block that is half computed: it is loaded or begun anew.
            restoring.sequence.cut(first)
            self._threads.submit(self._run, store, restoring, keys, self._load_all)

    def _plan(
        self, restoring: Restoring, first: int, tiers: Sequence[str | None], now: float
    ) -> RestorePlan:
        """For the blocks from `first` on; `tiers` is of these."""
        return self._planner.plan(
            *(restoring.num_tokens, first, tiers, self._record_bytes(first, len(tiers)), now),
            deadline_s=restoring.deadline - now,
        )

    def _record_bytes(self, first: int, num_blocks: int) -> np.ndarray:
        """Bytes of each block in all groups that need it when the prefix ends after the last."""
        size, sums = self._blocks.block_size, np.zeros(num_blocks, dtype=np.int64)
        records = self._blocks.record_bytes(first, num_blocks)
        for window, num_bytes in zip(self._blocks.device.windows, records, strict=True):
            needed = max(0, first_block_needed(first + num_blocks, size, window) - first)
            sums[needed:] += num_bytes[needed:]
        return sums

    def _load_next(
        self, store: Store, restoring: Restoring, keys: Sequence[Sequence[BlockKey]]
    ) -> bool:
        """Load what comes next; False if that is nothing."""
        with self._changed:
            now = time.monotonic()
            numbers = restoring.next_call(now)
            if numbers is None:
                # A chunk that waited for the next call may be computed now.
                self._changed.notify_all()
                return False
            assert restoring.meeting is not None
            num_steps = restoring.meeting.num_layer_steps
            tier, _ = restoring.expected_of(numbers)
            tier_call = self._calls.begin(tier, now)
            try:
                call = LoadCall(
                    *(self._blocks, restoring.sequence, numbers),
                    *(restoring.prefix_end(numbers), num_steps, tier_call),
                )
            except PoolFullError:
                restoring.stop_loading(now, has_no_room=not restoring.meeting.is_probing)
                self._calls.end(tier_call, now)
                self._changed.notify_all()
                return False
            restoring.begin_call(call)
            self._own.call = tier_call
            # The engine now waits until it is overdue, or computes beside it.
            self._changed.notify_all()
        found: dict[int, str] = {}
        try:
            found = call.run(store, keys, restoring.deadline)
        finally:
            with self._changed:
                done = time.monotonic()
                self._calls.end(tier_call, done)
                self._own.call = None
                kept = restoring.call_done(numbers, found, done - now, done)
                call.keep(set(kept))
                self._blocks.note_loaded(keys[0][number] for number in kept)
                if not found and not call.is_given_up:
                    self._observe_given_up(restoring, call, done)
                self._changed.notify_all()
        return True

    def _observe(self, tier: str, num_records: int, num_bytes: int, seconds: float) -> None:
        if not num_records or not seconds > 0:
            return
        now = time.monotonic()
        own: ContendedCall | None = getattr(self._own, "call", None)  # None in a session's thread
        num_beside = 0.0
        if own is not None and own.tier == tier:
            with self._changed:
                num_beside = own.num_beside(now)
        self._planner.observe_load(
            *(tier, num_bytes, num_records, seconds, now),
            is_computing=self._is_computing,
            num_beside=num_beside,
        )

    def _observe_given_up(self, restoring: Restoring, call: LoadCall, now: float) -> None:
        """A call gave nothing until now; an answer at once says nothing of the tier, nor does a
        call for blocks that all windows have left behind.

        Once for each call: the planner takes one surprise for an accident, and two for a change.
        """
        call.is_given_up = True
        tier, num_bytes = restoring.expected_of(call.numbers)
        if now > call.began and num_bytes > 0:
            self._planner.observe_given_up(
                *(tier, num_bytes, now - call.began, now),
                num_beside=call.tier_call.num_beside(now),
            )


def _has_loads(plan: RestorePlan) -> bool:
    return plan.num_load_blocks > 0 or plan.is_probe
