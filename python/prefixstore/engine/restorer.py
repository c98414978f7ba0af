"""Looks prompts up in the tiers, and plans what is loaded of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.engine.held_blocks import HeldBlocks, held_blocks
from prefixstore.engine.loader import Loader
from prefixstore.engine.restoring import Restoring
from prefixstore.planner import Planner, RestorePlan
from prefixstore.residency import first_block_needed
from prefixstore.store import Store

logger = logging.getLogger(__name__)

_LEAST_LOOKUP_S = 0.02  # a thread that wakes late is not a slow tier
_LOOKUP_SHARE = 0.05  # a look-up may take this share of the prompt's computing time


class Restorer:
    """Brings prompts into the pool, as far as that is faster than computing them.

    A look-up runs in a thread of a small pool, and then loads in those of the loader, so that a
    look-up is not late because others' loads take long. The engine's thread meanwhile computes
    other requests, and this one from its front. A tier that hangs keeps a thread and delays nobody:
    who waits too long, be it for a turn, computes. On a busy machine it may be the thread that had
    to wait: so a look-up goes on, and an answer that comes late still saves what is left.

    Args:
        blocks: The model's.
        planner: Plans.
        loader: Gets what is to be loaded.
        num_threads: And so most look-ups at the same time.
        changed: The engine's condition, whose lock guards every `Restoring`; notified when there is
            something to do.
    """

    def __init__(
        self,
        blocks: BlockCache,
        planner: Planner,
        loader: Loader,
        num_threads: int,
        changed: threading.Condition,
    ) -> None:
        self._blocks = blocks
        self._planner = planner
        self._loader = loader
        self._changed = changed
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-look-up")

    def begin(self, restoring: Restoring, keys: Sequence[Sequence[BlockKey]], now: float) -> None:
        """Bring a prompt in, whose cached prefix its sequence holds already."""
        store = self._blocks.store
        if store is None or restoring.num_device == restoring.num_whole:
            self._start(restoring, keys, HeldBlocks(), now)
            return
        restoring.deadline = store.deadline()
        self._threads.submit(self._run, store, restoring, keys)

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

    def close(self) -> None:
        """Wait for the look-ups under way; before the loader is closed, as they may add to it."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    # ---- in a thread of a pool ---------------------------------------------------------------

    def _run(self, store: Store, restoring: Restoring, keys: Sequence[Sequence[BlockKey]]) -> None:
        try:
            self._look_up_and_plan(store, restoring, keys)
        except Exception:
            # Errors of tiers are handled in the store: this is a bug of ours. The prompt is
            # computed.
            logger.exception("looking blocks up failed")
            with self._changed:
                if not restoring.is_planned and not restoring.is_over:
                    self._start(restoring, keys, None, time.monotonic())
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
            now = time.monotonic()
            self._start(restoring, keys, held, now)
            assert restoring.plan is not None
            if _has_loads(restoring.plan):
                self._loader.add(restoring, keys, now)
            self._changed.notify_all()

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
        first = restoring.num_present
        left = held.tiers[first - restoring.num_device :]
        plan = self._plan(restoring, first, left, now) if any(left) else None
        has_loads = plan is not None and _has_loads(plan)
        restoring.restart(plan if has_loads else None, held, now)
        if has_loads:
            # Drop a block that is half computed: it is loaded or begun anew.
            restoring.sequence.cut(first)
            self._loader.add(restoring, keys, now)

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


def _has_loads(plan: RestorePlan) -> bool:
    return plan.num_load_blocks > 0 or plan.is_probe
