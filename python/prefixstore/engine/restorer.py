"""Looks prompts up in the tiers, plans, and loads blocks beside the computing of others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.engine.restoring import Held, Restoring
from prefixstore.planner import Planner
from prefixstore.residency import first_block_needed, longest_prefix
from prefixstore.store import Store

logger = logging.getLogger(__name__)

_LEAST_LOOKUP_S = 0.02  # a thread that wakes late is not a slow tier
_LOOKUP_SHARE = 0.05  # of the time of computing the prompt, that its look-up may take


class Restorer:
    """Brings prompts into the pool, as far as that is faster than computing them.

    A look-up, and then one load after another, run in a thread of a small pool; the engine's thread
    meanwhile computes other requests, and this one from its front. A tier that hangs keeps a thread
    and delays nobody: who waits too long computes.

    Args:
        blocks: The model's.
        planner: Learns speeds and plans.
        num_loaders: Threads, and so requests at the same time.
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
        self._num_loading = 0
        self._is_computing = False
        layouts = [pool_blocks.transfer.pool.layout for pool_blocks in blocks.pool_blocks]
        self._block_bytes = [layout.block_bytes for layout in layouts]
        if blocks.store is not None:
            blocks.store.observe_loads(self._observe)

    def begin(self, restoring: Restoring, keys: Sequence[Sequence[BlockKey]], now: float) -> None:
        """Bring a prompt in, whose cached prefix its sequence holds already."""
        store = self._blocks.store
        if store is None or restoring.num_device == restoring.num_whole:
            self._start(restoring, keys, [], now)
            return
        self._threads.submit(self._run, store, restoring, keys)

    def give_up_looking(
        self, restoring: Restoring, keys: Sequence[Sequence[BlockKey]], now: float
    ) -> bool:
        """If the look-up took too long, begin computing; whether that is so."""
        if now < self.look_up_until(restoring):
            return False
        self._start(restoring, keys, None, now)
        return True

    def look_up_until(self, restoring: Restoring) -> float:
        """When the look-up will have taken too long."""
        left = restoring.num_tokens - restoring.num_device * self._blocks.block_size
        prefill_s = self._planner.prefill_s(left, restoring.num_tokens - left)
        return restoring.began + max(_LEAST_LOOKUP_S, _LOOKUP_SHARE * prefill_s)

    @property
    def is_loading(self) -> bool:
        """Whether a load is under way."""
        return self._num_loading > 0

    def note_computing(self, is_computing: bool) -> None:
        """Whether the model computes from now on."""
        self._is_computing = is_computing

    def close(self) -> None:
        """Wait for what is under way; every `Restoring` is to be finished before."""
        if self._blocks.store is not None:
            self._blocks.store.observe_loads(None)
        self._threads.shutdown(wait=True, cancel_futures=True)

    # ---- in a thread of the pool -------------------------------------------------------------

    def _run(self, store: Store, restoring: Restoring, keys: Sequence[Sequence[BlockKey]]) -> None:
        try:
            held = self._look_up(store, restoring, keys)
            with self._changed:
                if restoring.is_over or restoring.is_planned:  # it was not waited for
                    return
                self._start(restoring, keys, held, time.monotonic())
                self._changed.notify_all()
            while self._load_next(store, restoring, keys):
                pass
        except Exception:
            # What a tier may do was handled below; this is a fault of ours. The prompt is computed.
            logger.exception("loading blocks failed")
            with self._changed:
                now = time.monotonic()
                if not restoring.is_planned and not restoring.is_over:
                    self._start(restoring, keys, None, now)
                restoring.stop_loading(now)
                self._changed.notify_all()

    def _look_up(
        self, store: Store, restoring: Restoring, keys: Sequence[Sequence[BlockKey]]
    ) -> Held:
        """For each block after the cached ones the slowest tier that it needs, None if not held."""
        first, end = restoring.num_device, restoring.num_whole
        windows, size = self._blocks.device.windows, self._blocks.block_size
        deadline = store.deadline()
        answers = [store.contains_many(own[first:end], deadline) for own in keys]
        # Blocks of a sliding group count where the prefix that is there ends.
        available = [
            np.array([True] * first + [tier is not None for tier in own]) for own in answers
        ]
        usable = longest_prefix(available, size, windows)
        ranks = {name: rank for rank, name in enumerate(store.tier_names)}
        held: list[str | None] = []
        for number in range(first, usable):
            needed = [
                own[number - first]
                for own, window in zip(answers, windows, strict=True)
                if number >= first_block_needed(usable, size, window)
            ]
            there = [tier for tier in needed if tier is not None]
            is_whole = len(there) == len(needed)
            held.append(max(there, key=ranks.__getitem__) if is_whole else None)
        return held

    def _start(
        self,
        restoring: Restoring,
        keys: Sequence[Sequence[BlockKey]],
        held: Held | None,
        now: float,
    ) -> None:
        tiers = list(held or ())
        plan = self._planner.plan(
            restoring.num_tokens,
            restoring.num_device,
            tiers,
            self._record_bytes(restoring.num_device, len(tiers)),
            now,
        )
        missing = keys[0][restoring.num_device : restoring.num_whole]
        restoring.start(plan, held, self._blocks.were_published(missing), now)

    def _record_bytes(self, first: int, num_blocks: int) -> np.ndarray:
        """Bytes of each block in all groups that need it when the prefix ends after the last."""
        size, sums = self._blocks.block_size, np.zeros(num_blocks, dtype=np.int64)
        for window, num_bytes in zip(self._blocks.device.windows, self._block_bytes, strict=True):
            needed = first_block_needed(first + num_blocks, size, window) - first
            sums[max(0, needed) :] += num_bytes
        return sums

    def _load_next(
        self, store: Store, restoring: Restoring, keys: Sequence[Sequence[BlockKey]]
    ) -> bool:
        """Load what comes next; False if that is nothing."""
        with self._changed:
            now = time.monotonic()
            numbers = restoring.next_call(now)
            if numbers is None:
                return False
            try:
                taken = self._take_blocks(restoring, numbers)
            except PoolFullError:
                restoring.stop_loading(now, has_no_room=True)
                self._changed.notify_all()
                return False
            self._num_loading += 1
        found: dict[int, str] = {}
        try:
            found = self._load(store, keys, numbers, taken)
        finally:
            with self._changed:
                self._num_loading -= 1
                done = time.monotonic()
                kept = restoring.call_done(numbers, found, done - now, done)
                self._keep(restoring, taken, set(kept))
                self._changed.notify_all()
        return True

    def _take_blocks(self, restoring: Restoring, numbers: range) -> list[dict[int, int]]:
        """Per group, a block for each of the numbers that it needs."""
        plan = restoring.plan
        assert plan is not None
        end = restoring.num_device + plan.num_compute_blocks + plan.num_load_blocks
        size = self._blocks.block_size
        taken: list[dict[int, int]] = []
        try:
            for group, window in enumerate(self._blocks.device.windows):
                first = first_block_needed(end, size, window)
                needed = [number for number in numbers if number >= first]
                ids = restoring.sequence.take(group, len(needed))
                taken.append(dict(zip(needed, ids, strict=True)))
        except PoolFullError:
            self._keep(restoring, taken, set())
            raise
        return taken

    def _load(
        self,
        store: Store,
        keys: Sequence[Sequence[BlockKey]],
        numbers: range,
        taken: Sequence[dict[int, int]],
    ) -> dict[int, str]:
        """Load blocks of all groups; the slowest tier of each block of which no part is missing."""
        ranks = {name: rank for rank, name in enumerate(store.tier_names)}
        found = dict.fromkeys(numbers, store.tier_names[0])
        deadline = store.deadline()
        for group, (own, ids) in enumerate(zip(keys, taken, strict=True)):
            if not ids:
                continue
            target = self._blocks.pool_blocks[group].target(list(ids.values()))
            answers = store.load_many([own[number] for number in ids], target, deadline)
            for number, tier in zip(ids, answers, strict=True):
                if tier is None:
                    found.pop(number, None)
                elif number in found and ranks[tier] > ranks[found[number]]:
                    found[number] = tier
        return found

    def _keep(self, restoring: Restoring, taken: Sequence[dict[int, int]], kept: set[int]) -> None:
        """Blocks that were filled go to the sequence, others back to the pool."""
        for group, ids in enumerate(taken):
            restoring.sequence.place(group, {n: one for n, one in ids.items() if n in kept})
            allocator = self._blocks.device.groups[group].allocator
            allocator.release([one for number, one in ids.items() if number not in kept])

    def _observe(self, tier: str, num_records: int, num_bytes: int, seconds: float) -> None:
        if num_records and seconds > 0:
            self._planner.observe_load(
                *(tier, num_bytes, num_records, seconds, time.monotonic()),
                is_computing=self._is_computing,
            )
