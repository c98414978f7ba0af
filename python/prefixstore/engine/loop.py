"""The engine's thread: one forward pass after another over whatever there is to compute."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from prefixstore.at_exit import close_at_exit
from prefixstore.block_cache import BlockCache
from prefixstore.cache import PrefixCache
from prefixstore.engine.audit import Auditor
from prefixstore.engine.config import EngineConfig
from prefixstore.engine.detokenizer import UndecodableTokens
from prefixstore.engine.loader import Loader
from prefixstore.engine.outputs import FinishReason
from prefixstore.engine.overlap import Overlap, PassIsVoid
from prefixstore.engine.pass_layout import Chunk
from prefixstore.engine.quarantine import Quarantine
from prefixstore.engine.request import Request
from prefixstore.engine.restorer import Restorer
from prefixstore.engine.roster import Roster
from prefixstore.engine.runner import ModelRunner
from prefixstore.engine.sampler import NoToken, SampledToken, SamplingRow, sample_tokens
from prefixstore.engine.scheduler import Scheduler, Step
from prefixstore.engine.window_budget import WindowBudget
from prefixstore.planner import Planner, PlannerConfig

logger = logging.getLogger(__name__)

# What two cores decode from host memory (EPYC Zen 4): 47 MB in 11 ms, nearly all of it processor
# time.
_CORES_BYTES_PER_S = 4e9
_MOSTLY = 0.9  # this share of a pass counts as all of it
_WEIGHTS_CHECK_S = 1.0  # how often the model's weights are compared with those the cache knows


class EngineLoop:
    """The parts of an engine, and the thread that has them work together.

    ::

        roster      who was accepted        scheduler  whose tokens come next
        restorer    who is brought in       loader     beside the model
        runner      the model               auditor    when nothing else is to be done
        quarantine  what was found wrong

    Args:
        model: The Hugging Face causal language model that `cache` was opened for.
        cache: Whose blocks are reused and filled.
        config: Bounds.
        max_model_len: Tokens that a sequence may come to.

    Attributes:
        changed: Its lock guards all parts but the runner, which is the thread's; notified when
            there may be something to do, and when a request has ended.
        has_failed: A fault of the engine's own has ended its thread; it answers nothing any more.

    Raises:
        ConfigError: If a sliding group's pool is too small for one sequence.
        UnsupportedError: If batch invariance is asked for and cannot be promised for the model.
    """

    def __init__(
        self, model: Any, cache: PrefixCache, config: EngineConfig, max_model_len: int
    ) -> None:
        self._cache = cache
        blocks = cache.blocks
        budget = WindowBudget(blocks, config.max_batch_tokens, max_model_len)
        self.runner = ModelRunner(
            *(model, blocks.device.groups, blocks.block_size),
            *(config.batch_invariant, config.fuses_layers, config.cuda_graphs),
        )
        self.changed = threading.Condition()
        self.planner = Planner(
            blocks.store.tier_names if blocks.store is not None else (),
            blocks.block_size,
            config.max_batch_tokens,
            has_windows=any(window is not None for window in blocks.device.windows),
            layered_tiers=_layered_tiers(blocks),
            restore_bytes_per_s=_restore_bytes_per_s(blocks),
            config=PlannerConfig(policy=config.restore_policy),
        )
        self.loader = Loader(blocks, self.planner, config.num_loaders, self.changed)
        self.restorer = Restorer(
            blocks, self.planner, self.loader, config.num_loaders, self.changed
        )
        self.quarantine = Quarantine(blocks)
        self.auditor = Auditor(
            *(blocks, self.runner, self.quarantine, self._check_weights),
            *(config.audit_share, config.audit_seed),
        )
        self.scheduler = Scheduler(
            *(blocks, self.restorer, self.loader, config, budget), self.auditor.give_way
        )
        self.roster = Roster(self.scheduler, config, self.changed)
        self.has_failed = False
        self._is_closed = False
        self._weights_checked = 0.0
        self._not_compared = ""  # why the last check could not be made
        self._thread = threading.Thread(target=self._run, name="kv-engine", daemon=True)
        self._thread.start()
        close_at_exit(self.close)

    def close(self) -> None:
        """Cancel what is under way and stop. May be repeated."""
        with self.changed:
            self.roster.is_draining = self._is_closed = True
            self.changed.notify_all()
        self._thread.join()
        self.auditor.close()
        self.quarantine.close()
        self.restorer.close()
        self.loader.close()
        self.runner.close()

    # ---- the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._run_steps()
        except BaseException as error:
            # A bug of ours, or a panic of a tokenizer in Rust, which is no Exception: which blocks
            # belong to whom is no longer known, so nothing can go on.
            logger.exception("the engine stopped")
            with self.changed:
                self.has_failed = True
                self.roster.abandon(f"{type(error).__name__}: {error}")

    def _run_steps(self) -> None:
        while True:
            with self.changed:
                steps = self._wait_steps()
                if steps is None:
                    return
            if not steps:
                self.auditor.step()
                continue
            with self.changed:
                started = time.monotonic()
                loading_s = self.loader.busy_s(started)
                self.loader.note_computing(True)
                chunks = [_chunk(step) for step in steps]
                overlap = Overlap(steps, self.changed)
            try:
                valid, tokens = self._compute(steps, chunks, overlap)
            except Exception as error:
                # Logged here, as nobody else sees it. The requests of this batch end, others go on.
                logger.exception("a forward pass failed")
                with self.changed:
                    self.loader.note_computing(False)
                    for step in steps:
                        self.roster.end(
                            step.request, FinishReason.ERROR, f"{type(error).__name__}: {error}"
                        )
                continue
            with self.changed:
                self.loader.note_computing(False)
                now = time.monotonic()
                loading_s = self.loader.busy_s(now) - loading_s
                self._observe(steps, now - started, loading_s)
                self._advance(valid, tokens, now - started, now)
                self.roster.counts.num_steps += 1
                self.roster.counts.step_s += time.monotonic() - started

    def _wait_steps(self) -> list[Step] | None:
        """The next batch, or an empty one for an audit; None when the engine is closed."""
        while True:
            self.roster.end_cancelled()
            if self._is_closed:
                self.roster.end_all(FinishReason.CANCELLED)
                return None
            now = time.monotonic()
            if not self._has_changed_weights(now):
                self.scheduler.admit(now)
                steps = self.scheduler.next_steps(now)
                if steps or (not self.roster and self.auditor.has_work(now)):
                    return steps
            wake_at = self.scheduler.wake_at()
            self.changed.wait(None if wake_at is None else max(0.0, wake_at - time.monotonic()))

    def _compute(
        self, steps: Sequence[Step], chunks: Sequence[Chunk], overlap: Overlap
    ) -> tuple[list[Step], list[SampledToken | NoToken]]:
        """Run the model; the steps that count, and the next tokens of those that want one."""
        started = time.perf_counter()
        logits = None
        with suppress(PassIsVoid):
            logits = self.runner.run(chunks, overlap.before_layer)
        self.roster.counts.model_s += time.perf_counter() - started
        with self.changed:
            valid = overlap.valid_steps()
        if logits is None:
            return valid, []
        wanting = [step for step in steps if step.wants_logits]
        # Steps that read blocks which never came have meaningless logits: leave them out.
        rows = [row for row, step in enumerate(wanting) if step in valid]
        sampled = [
            SamplingRow(step.request.sampling, step.request.seed, step.request.num_output)
            for step in wanting
            if step in valid
        ]
        if not rows:
            return valid, []
        # Avoid indexing where all rows count: it copies, and on a GPU waits for the copy of the
        # index.
        counting = logits if len(rows) == len(wanting) else logits[rows]
        return valid, sample_tokens(counting, sampled)

    def _advance(
        self,
        steps: Sequence[Step],
        tokens: Sequence[SampledToken | NoToken],
        seconds: float,
        now: float,
    ) -> None:
        """The batch is computed: publish blocks, hand out tokens, end answers."""
        sampled = iter(tokens)
        for step in steps:
            request = step.request
            assert request.sequence is not None
            self.roster.counts.computed_tokens += step.stop - step.start
            token = next(sampled) if step.wants_logits else None
            if isinstance(token, NoToken):
                self._end_without_token(request, step.stop, str(token))
                continue
            request.num_computed = step.stop
            if request.restoring is not None and not request.num_output:
                request.origins.note(request.restoring)
            request.sequence.note_computed(step.start, step.stop)
            request.sequence.publish(request.tokens, step.stop)
            if request.restoring is not None:
                request.clock.compute_s += seconds
                request.restoring.chunk_done(now)
                if request.restoring.is_done:
                    self._end_prefill(request, now)
            try:
                reason = request.push(token, now) if token is not None else None
            except UndecodableTokens as error:
                logger.exception("request %s has no text", request.request_id)
                self.roster.end(request, FinishReason.ERROR, str(error))
                continue
            # Done after the answer is pushed, so that no token waits for it. A resumed request is
            # left out: what it reuses are its own blocks.
            if not request.num_preemptions:
                request.sequence.touch_reused()
            request.sequence.drop_passed(step.stop)
            if reason is not None:
                self.roster.end(request, reason)

    def _end_without_token(self, request: Request, num_stored: int, error: str) -> None:
        """End a request whose logits are no numbers; nobody reads what may have made them so.

        Its blocks of this pass are not published. But the cause may lie in those published after
        earlier passes, or in what it shares: the first one with a number that is none goes, and
        all after it. Only here all are read: a look at each block after every pass would cost all
        requests time.
        """
        assert request.sequence is not None
        first = request.sequence.first_not_finite(num_stored)
        num_blocks = 0 if first is None else self.quarantine.add(request, first)
        logger.error("request %s: %s: %d blocks quarantined", request.request_id, error, num_blocks)
        self.roster.end(request, FinishReason.ERROR, error)

    def _end_prefill(self, request: Request, now: float) -> None:
        restoring, is_first = request.restoring, request.num_output == 0
        assert restoring is not None
        plan, meeting = restoring.plan, restoring.meeting
        assert plan is not None and meeting is not None
        if is_first:
            self.auditor.offer(request, restoring.reused(), now)
        self.loader.note_done(restoring, now)
        reuse = request.end_prefill(now).reuse
        self.planner.finished(plan, restoring.measured_s, meeting.counts())
        if is_first:
            self._cache.blocks.count(reuse.num_prompt_tokens, reuse.tokens_by_tier)

    def _observe(self, steps: Sequence[Step], seconds: float, loading_s: float) -> None:
        """Tell the planner what a pass over prompts took, blocks being loaded for some of it."""
        is_loading = loading_s > _MOSTLY * seconds
        is_alone = loading_s < (1 - _MOSTLY) * seconds
        # A pass that waited for loads, or ran beside loading for a part of its time, tells neither
        # the speed alone nor the speed beside a load.
        if any(step.load is not None for step in steps) or not (is_loading or is_alone):
            return
        if all(step.request.is_decoding for step in steps):
            return
        num_new = sum(step.stop - step.start for step in steps)
        pairs = sum((step.stop - step.start) * (step.start + step.stop) / 2 for step in steps)
        # The planner knows passes by new tokens and context. This is the context of a single
        # sequence with as many new tokens and as many query-key pairs.
        context = max(0, round(pairs / num_new - num_new / 2))
        self.planner.observe_prefill(num_new, context, seconds, is_loading=is_loading)

    def _check_weights(self) -> None:
        """Raise ValueError if the model is not the one any more that the cache was opened for."""
        if self._cache.served_model is None:
            return
        try:
            self._cache.served_model.check_weights()
        except ValueError:
            self._not_compared = ""
            raise
        except Exception as error:
            # Anybody's modules are looked at, and may raise anything: what they hold is theirs to
            # repair, and no block is any less known for it.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if reason != self._not_compared:  # there is a check every second
                logger.error("the model cannot be compared with what it was: %s", reason)
            self._not_compared = reason
            raise ValueError(f"model: {reason}") from error
        self._not_compared = ""

    def _has_changed_weights(self, now: float) -> bool:
        """End all requests if `_check_weights` raises."""
        if now < self._weights_checked + _WEIGHTS_CHECK_S:
            return False
        self._weights_checked = now
        try:
            self._check_weights()
        except ValueError as error:
            self.roster.end_all(FinishReason.ERROR, str(error))
            return True
        return False


def _layered_tiers(blocks: BlockCache) -> Sequence[str]:
    """From which layers can be loaded in the order in which the model attends to them.

    Layers of several groups take turns, and of a sliding group not all blocks are loaded.
    """
    is_full = list(blocks.device.windows) == [None]
    return blocks.store.layered_tiers if blocks.store is not None and is_full else ()


def _restore_bytes_per_s(blocks: BlockCache) -> float:
    """How fast records are copied and decoded by the cores that the model is computed on."""
    pool = blocks.pool_blocks[0].transfer.pool
    return _CORES_BYTES_PER_S if pool.device.type == "cpu" else math.inf


def _chunk(step: Step) -> Chunk:
    request = step.request
    assert request.sequence is not None
    # A copy: loads write to the array while the model runs, though to other blocks' entries.
    tables = request.sequence.tables.copy()
    if step.load is not None:
        step.load.show_in(tables)
    return Chunk(
        tokens=request.tokens[step.start : step.stop].copy(),
        start=step.start,
        tables=tables,
        wants_logits=step.wants_logits,
    )
