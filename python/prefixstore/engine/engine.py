"""Continuous batching: one thread runs the model over all requests at once.

submit -> queue -> admitted -> restored and computed -> one token a step -> the answer ends
          fair_queue  scheduler  restorer, planner        runner, sampler    answer, handle
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

import numpy as np

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine.answer import Answer
from prefixstore.engine.audit import Auditor
from prefixstore.engine.config import EngineConfig
from prefixstore.engine.handle import RequestHandle
from prefixstore.engine.outputs import FinishReason, RequestOutput, RequestReport
from prefixstore.engine.request import Request
from prefixstore.engine.restorer import Restorer
from prefixstore.engine.runner import Chunk, ModelRunner
from prefixstore.engine.sampler import SampledToken, SamplingRow, sample_tokens
from prefixstore.engine.sampling import SamplingParams
from prefixstore.engine.scheduler import Scheduler, Step
from prefixstore.engine.stats import EngineCounts, EngineStats
from prefixstore.errors import ConfigError, EngineClosed, EngineOverloaded
from prefixstore.planner import Planner, PlannerConfig
from prefixstore.settings import check_known

logger = logging.getLogger(__name__)

NUM_RECENT = 256  # reports of finished requests that are kept
_MOSTLY = 0.9  # of a pass: as good as all of it
_WEIGHTS_CHECK_S = 1.0  # how often the model's weights are compared with those the cache knows


class Engine:
    """Serves many requests at once on one model, over a `PrefixCache`. Thread-safe.

    Open it with `Engine.open(model, tokenizer)`.

    Args:
        model: The Hugging Face causal language model that `cache` was opened for.
        tokenizer: Its `transformers.PreTrainedTokenizerBase`.
        cache: Whose blocks are reused and filled; not closed with the engine.
        config: Bounds.

    Raises:
        ConfigError: If the bounds do not fit the model or the cache's pool.
        UnsupportedError: If batch invariance is asked for and cannot be promised for the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        cache: PrefixCache,
        config: EngineConfig | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.config = config = config if config is not None else EngineConfig()
        blocks = cache.blocks
        text_config = model.config.get_text_config()
        self.vocab_size: int = text_config.vocab_size
        self.max_model_len = _max_model_len(config, text_config, cache)
        self._eos_ids = _eos_ids(model, tokenizer)
        self._runner = ModelRunner(
            *(model, blocks.device.groups, blocks.block_size),
            *(config.batch_invariant, config.fuses_layers),
        )
        self._changed = threading.Condition()  # its lock guards everything below
        self._planner = Planner(
            blocks.store.tier_names if blocks.store is not None else (),
            blocks.block_size,
            config.max_batch_tokens,
            has_windows=any(window is not None for window in blocks.device.windows),
            config=PlannerConfig(policy=config.restore_policy),
        )
        self._restorer = Restorer(blocks, self._planner, config.num_loaders, self._changed)
        self._auditor = Auditor(
            *(blocks, self._runner, self._check_weights),
            *(config.audit_share, config.audit_seed),
        )
        self._scheduler = Scheduler(blocks, self._restorer, config, self._auditor.give_way)
        self._requests: dict[str, Request] = {}  # not finished
        self._cancelled: set[str] = set()
        self._counts = EngineCounts()
        self._recent: deque[RequestReport] = deque(maxlen=NUM_RECENT)
        self._is_draining = self._is_closed = False
        self._weights_checked = 0.0
        self._owns_cache = False
        self._thread = threading.Thread(target=self._run, name="kv-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        model: Any,
        tokenizer: Any,
        config: EngineConfig | None = None,
        cache: CacheConfig | None = None,
        **settings: Any,
    ) -> Engine:
        """An engine with a cache of its own, closed with it.

        Args:
            model: A Hugging Face causal language model, in evaluation mode.
            tokenizer: Its tokenizer.
            config: Bounds of the engine.
            cache: Sizes and places of the cache.
            settings: Fields of either by name, in place of theirs.

        Raises:
            ConfigError: If a setting is unknown or out of range.
            UnsupportedError: If the model has a feature without a kernel; the message names it.
            TierUnavailable: If a tier of this machine cannot be opened.
        """
        of_engine = {one.name for one in fields(EngineConfig)}
        check_known("settings", settings, [*of_engine, *(f.name for f in fields(CacheConfig))])
        own = {name: value for name, value in settings.items() if name in of_engine}
        others = {name: value for name, value in settings.items() if name not in of_engine}
        config = replace(config or EngineConfig(), **own)
        opened = PrefixCache.open(model, cache, **others)
        try:
            engine = cls(model, tokenizer, opened, config)
        except BaseException:
            opened.close()
            raise
        engine._owns_cache = True
        return engine

    # ---- requests ----------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int] | np.ndarray | str,
        sampling: SamplingParams | None = None,
        *,
        tenant: str = "",
        salt: str | None = None,
        request_id: str | None = None,
    ) -> RequestHandle:
        """Take a request on; returns at once.

        Args:
            prompt: Token ids ``[num_tokens]``, or text to be tokenised.
            sampling: How to choose tokens; default `SamplingParams()`.
            tenant: Tenants that wait are served in turn.
            salt: Namespace of the blocks; default that of the cache.
            request_id: Not one that runs; default a random one.

        Raises:
            ValueError: If the prompt is empty, longer than `max_model_len` leaves room for a token,
                or has ids that the model does not know; or another argument is of a wrong type.
            EngineOverloaded: If `max_queued` requests wait.
            EngineClosed: If the engine drains or is closed.
        """
        ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        tokens, salt = self.cache.checked_prompt(ids, salt)
        if len(tokens) >= self.max_model_len:
            raise ValueError(
                f"prompt: expected fewer than {self.max_model_len} tokens (max_model_len), got"
                f" {len(tokens)}"
            )
        if int(tokens.max()) >= self.vocab_size:
            raise ValueError(
                f"prompt: expected token ids below {self.vocab_size}, got {int(tokens.max())}"
            )
        if not isinstance(tenant, str):
            raise ValueError(f"tenant: expected a string, got {tenant!r}")
        sampling = sampling if sampling is not None else SamplingParams()
        request_id = request_id if request_id is not None else secrets.token_hex(8)
        handle = RequestHandle(request_id, lambda: self._cancel(request_id))
        if not self.config.reuses_prefixes:
            salt = f"{salt}\0{secrets.token_hex(16)}"
        max_tokens = min(self.max_model_len, len(tokens) + sampling.max_tokens)
        request = Request(
            prompt=tokens,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            tenant=tenant,
            salt=salt,
            answer=Answer(
                handle, sampling, max_tokens - len(tokens), self._eos_ids, self.tokenizer
            ),
            num_groups=len(self.cache.blocks.device.groups),
        )
        with self._changed:
            self._accept(request)
        return handle

    def generate(
        self,
        prompts: Iterable[Sequence[int] | np.ndarray | str],
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """The whole answers to some prompts, in their order; other arguments as for `submit`."""
        handles = [self.submit(prompt, sampling, **options) for prompt in prompts]
        return [handle.result() for handle in handles]

    # ---- the engine as a whole ---------------------------------------------------------------

    def stats(self) -> EngineStats:
        cache, planner = self.cache.stats(), self._planner.stats()
        with self._changed:
            counts, scheduler = self._counts, self._scheduler
            return EngineStats(
                num_submitted=counts.num_submitted,
                num_refused=counts.num_refused,
                num_finished=dict(counts.finished),
                num_running=len(scheduler.running),
                num_queued=scheduler.num_waiting,
                num_preemptions=scheduler.num_preemptions,
                num_steps=counts.num_steps,
                step_s=counts.step_s,
                model_s=counts.model_s,
                prompt_tokens=counts.prompt_tokens,
                computed_tokens=counts.computed_tokens,
                hit_tokens=dict(counts.hit_tokens),
                miss_tokens=dict(counts.miss_tokens),
                output_tokens=counts.output_tokens,
                num_audits=self._auditor.num_audits,
                audited_blocks=self._auditor.audited_blocks,
                num_quarantined=self._auditor.num_quarantined,
                planner=planner,
                cache=cache,
            )

    def recent(self) -> list[RequestReport]:
        """The last finished requests, the newest last."""
        with self._changed:
            return list(self._recent)

    def drain(self, timeout_s: float) -> bool:
        """Take on no more requests and wait for those there are; False if that takes longer."""
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._requests, timeout_s)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether answers are the same bits in any batch."""
        return self._runner.is_batch_invariant

    def check(self) -> list[str]:
        """Recount every part; returns one line for each thing that is wrong."""
        with self._changed:
            problems = [f"queue: {line}" for line in self._scheduler.queue.check()]
            num_held = self._scheduler.num_waiting + len(self._scheduler.running)
            if num_held != len(self._requests):
                problems.append(f"engine: {len(self._requests)} requests, {num_held} in its lists")
        return problems + self.cache.check()

    def close(self) -> None:
        """Cancel what is under way and stop; `drain` first for an end without. May be repeated."""
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._auditor.close()
        self._restorer.close()
        self._runner.close()
        if self._owns_cache:
            self.cache.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self, request: Request) -> None:
        if self._is_draining:
            raise EngineClosed("engine: expected an open engine, got one that drains or is closed")
        if request.request_id in self._requests:
            raise ValueError(
                f"request_id: expected one that does not run, got {request.request_id!r}"
            )
        if self._scheduler.num_waiting >= self.config.max_queued + self._num_free_places():
            self._counts.num_refused += 1
            raise EngineOverloaded(
                f"engine: expected at most {self.config.max_queued} waiting requests, got one more"
            )
        self._scheduler.queue.push(request.tenant, request.max_tokens, request)
        self._requests[request.request_id] = request
        self._counts.num_submitted += 1
        self._changed.notify_all()

    def _num_free_places(self) -> int:
        """Of the batch: who goes there at the next step does not wait."""
        return self.config.max_running - len(self._scheduler.running)

    def _cancel(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._requests:
                self._cancelled.add(request_id)
                self._changed.notify_all()

    # ---- the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._run_steps()
        except Exception as error:
            # A fault of ours: whose blocks are whose is not known any more. Nobody is left to wait.
            logger.exception("the engine stopped")
            with self._changed:
                self._is_draining = True
                for request in self._requests.values():
                    report = request.report(time.monotonic())
                    request.answer.end(
                        FinishReason.ERROR, report, f"{type(error).__name__}: {error}"
                    )
                self._requests.clear()
                self._changed.notify_all()

    def _run_steps(self) -> None:
        while True:
            with self._changed:
                steps = self._wait_steps()
                if steps is None:
                    return
            if not steps:
                self._auditor.step()
                continue
            with self._changed:
                started = time.monotonic()
                loading_s = self._restorer.loading_s(started)
                self._restorer.note_computing(True)
                chunks = [_chunk(step) for step in steps]
            try:
                tokens = self._compute(steps, chunks)
            except Exception as error:
                # Nobody else sees it: the requests of this batch end, the others go on.
                logger.exception("a forward pass failed")
                with self._changed:
                    for step in steps:
                        self._end(
                            step.request, FinishReason.ERROR, f"{type(error).__name__}: {error}"
                        )
                continue
            with self._changed:
                self._restorer.note_computing(False)
                now = time.monotonic()
                loading_s = self._restorer.loading_s(now) - loading_s
                self._observe(steps, now - started, loading_s)
                self._advance(steps, tokens, now - started, now)
                self._counts.num_steps += 1
                self._counts.step_s += time.monotonic() - started

    def _wait_steps(self) -> list[Step] | None:
        """The next batch, or an empty one for an audit; None when the engine is closed."""
        while True:
            self._end_cancelled()
            if self._is_closed:
                for request in list(self._requests.values()):
                    self._end(request, FinishReason.CANCELLED)
                return None
            now = time.monotonic()
            if not self._has_changed_weights(now):
                self._scheduler.admit(now)
                steps = self._scheduler.next_steps(now)
                if steps or (not self._requests and self._auditor.has_work(now)):
                    return steps
            wake_at = self._scheduler.wake_at()
            self._changed.wait(None if wake_at is None else max(0.0, wake_at - time.monotonic()))

    def _compute(self, steps: Sequence[Step], chunks: Sequence[Chunk]) -> list[SampledToken]:
        started = time.perf_counter()
        logits = self._runner.run(chunks)
        self._counts.model_s += time.perf_counter() - started
        if logits is None:
            return []
        rows = [
            SamplingRow(step.request.sampling, step.request.seed, step.request.num_output)
            for step in steps
            if step.wants_logits
        ]
        return sample_tokens(logits, rows)

    def _advance(
        self, steps: Sequence[Step], tokens: Sequence[SampledToken], seconds: float, now: float
    ) -> None:
        """The batch is computed: publish blocks, hand out tokens, end answers."""
        sampled = iter(tokens)
        for step in steps:
            request = step.request
            assert request.sequence is not None
            request.num_computed = step.stop
            self._counts.computed_tokens += step.stop - step.start
            request.sequence.note_computed(step.start, step.stop)
            request.sequence.publish(request.tokens, step.stop)
            request.sequence.drop_passed(step.stop)
            if request.restoring is not None:
                request.clock.compute_s += seconds
                request.restoring.chunk_done(now)
                if request.restoring.is_done:
                    self._end_prefill(request, now)
            if step.wants_logits:
                reason = request.push(next(sampled), now)
                if reason is not None:
                    self._end(request, reason)

    def _end_prefill(self, request: Request, now: float) -> None:
        restoring, is_first = request.restoring, request.num_output == 0
        assert restoring is not None
        plan, meeting = restoring.plan, restoring.meeting
        assert plan is not None and meeting is not None
        if is_first:
            self._auditor.offer(request, restoring.reused(), now)
        self._restorer.note_done(restoring, now)
        reuse = request.end_prefill(now).reuse
        self._planner.finished(plan, restoring.measured_s, meeting.counts())
        if is_first:
            self.cache.blocks.count(reuse.num_prompt_tokens, reuse.tokens_by_tier)

    def _observe(self, steps: Sequence[Step], seconds: float, loading_s: float) -> None:
        """Tell the planner what a pass over prompts took, blocks being loaded for some of it."""
        is_loading = loading_s > _MOSTLY * seconds
        is_alone = loading_s < (1 - _MOSTLY) * seconds
        # One beside which blocks were loaded for a part of it tells neither speed.
        if all(step.request.is_decoding for step in steps) or not (is_loading or is_alone):
            return
        num_new = sum(step.stop - step.start for step in steps)
        pairs = sum((step.stop - step.start) * (step.start + step.stop) / 2 for step in steps)
        # The context that one sequence with as many new tokens would have for as many pairs.
        context = max(0, round(pairs / num_new - num_new / 2))
        self._planner.observe_prefill(num_new, context, seconds, is_loading=is_loading)

    def _end_cancelled(self) -> None:
        for request_id in self._cancelled:
            request = self._requests.get(request_id)
            if request is not None:
                self._end(request, FinishReason.CANCELLED)
        self._cancelled.clear()

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """Give a request's blocks and place back, and its reader the end of the answer."""
        if request.sequence is not None:
            self._scheduler.stop(request)
        else:
            self._scheduler.remove_waiting(request)
        del self._requests[request.request_id]
        report = request.report(time.monotonic())
        self._counts.add_finished(reason, report)
        self._recent.append(report)
        request.answer.end(reason, report, error)
        self._changed.notify_all()

    def _check_weights(self) -> None:
        if self.cache.served_model is not None:
            self.cache.served_model.check_weights()

    def _has_changed_weights(self, now: float) -> bool:
        """End all requests if the model is not the one any more that the cache was opened for."""
        if now < self._weights_checked + _WEIGHTS_CHECK_S:
            return False
        self._weights_checked = now
        try:
            self._check_weights()
        except ValueError as error:
            for request in list(self._requests.values()):
                self._end(request, FinishReason.ERROR, str(error))
            return True
        return False


def _chunk(step: Step) -> Chunk:
    request = step.request
    assert request.sequence is not None
    return Chunk(
        tokens=request.tokens[step.start : step.stop].copy(),
        start=step.start,
        # Loads write into tables while the model runs: of other blocks, but of the same array.
        tables=request.sequence.tables.copy(),
        wants_logits=step.wants_logits,
    )


def _max_model_len(config: EngineConfig, text_config: Any, cache: PrefixCache) -> int:
    context = getattr(text_config, "max_position_embeddings", None)
    pool_tokens = cache.stats().pool_blocks * cache.config.block_size
    known = [one for one in (context, pool_tokens) if one is not None]
    wanted = config.max_model_len
    if wanted is None:
        return min(known)
    if wanted > min(known):
        raise ConfigError(
            f"max_model_len: expected at most {context} (the model's positions) and {pool_tokens}"
            f" (the pool's tokens), got {wanted}"
        )
    return wanted


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens with which the model ends an answer."""
    found: set[int] = set()
    generation_config = getattr(model, "generation_config", None)
    for owner in (generation_config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(found)
