"""What users meet: requests go in, answers come out, one thread runs the model over all of them.

submit -> queue -> admitted -> restored and computed -> one token a step -> the answer ends
          fair_queue  scheduler  restorer, planner        runner, sampler    answer, handle
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

import numpy as np

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine.answer import Answer
from prefixstore.engine.config import EngineConfig
from prefixstore.engine.handle import RequestHandle
from prefixstore.engine.loop import EngineLoop
from prefixstore.engine.outputs import RequestOutput, RequestReport
from prefixstore.engine.pass_layout import DecodeShape
from prefixstore.engine.request import Request
from prefixstore.engine.sampling import SamplingParams
from prefixstore.engine.stats import EngineStats
from prefixstore.errors import ConfigError, ModelChanged
from prefixstore.settings import check_known
from prefixstore.tokens import text_problem


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
        text_config = model.config.get_text_config()
        self.vocab_size: int = text_config.vocab_size
        self.max_model_len = _max_model_len(config, text_config, cache)
        self._eos_ids = _eos_ids(model, tokenizer)
        self._owns_cache = False
        self._loop = EngineLoop(model, cache, config, self.max_model_len)

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
                has ids that the model does not know, or is text with half a surrogate pair; or
                another argument is wrong.
            ModelChanged: If the model is not the one any more that the engine was opened with.
            EngineOverloaded: If `max_queued` requests wait.
            EngineClosed: If the engine drains, is closed or has failed.
        """
        request = self._request(prompt, sampling, tenant, salt, request_id)
        with self._loop.changed:
            self._loop.roster.accept(request)
        return request.answer.handle

    def _request(
        self,
        prompt: Sequence[int] | np.ndarray | str,
        sampling: SamplingParams | None = None,
        tenant: str = "",
        salt: str | None = None,
        request_id: str | None = None,
    ) -> Request:
        """What `submit` takes on."""
        self._loop.roster.check_open()
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
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
        handle = RequestHandle(request_id, self._cancel)
        if not self.config.reuses_prefixes:
            salt = f"{salt}\0{secrets.token_hex(16)}"
        max_tokens = min(self.max_model_len, len(tokens) + sampling.max_tokens)
        return Request(
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

    def generate(
        self,
        prompts: Iterable[Sequence[int] | np.ndarray | str],
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """The whole answers to some prompts, in their order; other arguments as for `submit`.

        There may be any number of prompts: one that finds `max_queued` requests waiting is
        submitted once there is room. If one is refused, those before it are cancelled.
        """
        handles: list[RequestHandle] = []
        try:
            for prompt in prompts:
                request = self._request(prompt, sampling, **options)
                self._accept_when_there_is_room(request)
                handles.append(request.answer.handle)
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def _accept_when_there_is_room(self, request: Request) -> None:
        roster = self._loop.roster
        with self._loop.changed:
            self._loop.changed.wait_for(lambda: roster.has_room or roster.is_draining)
            roster.accept(request)

    # ---- the engine as a whole ---------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters since the engine was opened, and how many requests wait and run now."""
        loop = self._loop
        cache, planner = self.cache.stats(), loop.planner.stats()
        with loop.changed:
            counts, scheduler, auditor = loop.roster.counts, loop.scheduler, loop.auditor
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
                num_audits=auditor.num_audits,
                audited_blocks=auditor.audited_blocks,
                num_quarantined=loop.quarantine.num_blocks,
                planner=planner,
                cache=cache,
            )

    def recent(self) -> list[RequestReport]:
        """The last finished requests, the newest last."""
        with self._loop.changed:
            return list(self._loop.roster.recent)

    def drain(self, timeout_s: float) -> bool:
        """Take on no more requests and wait for those there are; False if that takes longer."""
        roster = self._loop.roster
        with self._loop.changed:
            roster.is_draining = True
            return self._loop.changed.wait_for(lambda: not roster, timeout_s)

    @property
    def has_failed(self) -> bool:
        """Whether a fault of its own has ended it: all requests were told, none is taken on."""
        return self._loop.has_failed

    @property
    def has_changed_model(self) -> bool:
        """Whether requests are refused because the model is not the one any more that the engine
        was opened with. Of weights on a GPU changed values alone are not seen here."""
        served_model = self.cache.served_model
        try:
            if served_model is not None:
                served_model.check_weights_at_hand()
        except ModelChanged:
            return True
        return False

    @property
    def is_batch_invariant(self) -> bool:
        """Whether answers are the same bits in any batch."""
        return self._loop.runner.is_batch_invariant

    @property
    def graph_shapes(self) -> list[DecodeShape]:
        """Of the decode passes that are replayed from CUDA graphs by now."""
        return self._loop.runner.graph_shapes

    def check(self) -> list[str]:
        """Recount every part; returns one line for each thing that is wrong."""
        with self._loop.changed:
            problems = self._loop.roster.check()
        return problems + self.cache.check()

    def close(self) -> None:
        """Cancel what is under way and stop; `drain` first for an end without. May be repeated."""
        self._loop.close()
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

    def _encode(self, text: str) -> list[int]:
        problem = text_problem(text)
        if problem is not None:
            raise ValueError(f"prompt: {problem}")
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def _cancel(self, handle: RequestHandle) -> None:
        with self._loop.changed:
            self._loop.roster.cancel(handle)


def _max_model_len(config: EngineConfig, text_config: Any, cache: PrefixCache) -> int:
    context = getattr(text_config, "max_position_embeddings", None)
    # A sliding group holds a window of a sequence, however long that is.
    pools = [pool.num_blocks for pool in cache.stats().pools if pool.window is None]
    pool_tokens = min(pools) * cache.config.block_size if pools else None
    known = [one for one in (context, pool_tokens) if one is not None]
    wanted = config.max_model_len
    if not known and wanted is None:
        raise ConfigError(
            "max_model_len: expected a number, for the model's configuration names no"
            " max_position_embeddings; got None"
        )
    if wanted is None:
        return min(known)
    if known and wanted > min(known):
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
