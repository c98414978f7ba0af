"""The prefix cache of one model: the class most users meet."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch

from kvkernels import BlockAllocator, KVPool
from kvkernels.nn import LayerGroupSpec, PagedGroup, layer_groups
from prefixstore.block_cache import BlockCache
from prefixstore.cache_store import open_store
from prefixstore.config import CacheConfig
from prefixstore.errors import ConfigError
from prefixstore.identity import model_identity
from prefixstore.index import Match, Outline
from prefixstore.index import Stats as IndexStats
from prefixstore.module_state import check_evaluates
from prefixstore.planner import PlannerStats
from prefixstore.pool_sizes import pool_sizes
from prefixstore.restore import PrefixRestorer, RestoredPrefix
from prefixstore.reuse_report import DEVICE, ReuseReport
from prefixstore.served_model import ServedModel
from prefixstore.session import Session
from prefixstore.settings import check_known
from prefixstore.store import Store, StoreStats
from prefixstore.tiers.base import TierStats
from prefixstore.tokens import as_tokens, text_problem


@dataclass(frozen=True)
class PoolStats:
    """The pool of one layer group, now.

    Attributes:
        window: Reach of the group's attention in tokens; None for all.
        num_blocks: Blocks that it holds.
        num_free: Those of them that nobody uses and no prefix is cached in.
        num_bytes: Its memory.
    """

    window: int | None
    num_blocks: int
    num_free: int
    num_bytes: int


@dataclass(frozen=True)
class CacheStats:
    """Counters of a cache and its parts since it was opened.

    `pools` has the layer groups, that which reaches furthest first; `pool_blocks` and
    `pool_free_blocks` are of that.
    """

    num_sessions: int
    prompt_tokens: int
    hit_tokens: dict[str, int]
    evicted_blocks: int
    pool_blocks: int
    pool_free_blocks: int
    pools: tuple[PoolStats, ...]
    index: IndexStats
    store: StoreStats | None


class PrefixCache:
    """Reuses the KV of prompt prefixes across calls, sessions, processes and restarts.

    Open it with `PrefixCache.open(model)`. It may be used from several threads; one session
    belongs to one thread at a time.
    """

    def __init__(
        self,
        groups: Sequence[PagedGroup],
        identity: bytes,
        config: CacheConfig,
        store: Store | None = None,
        served_model: ServedModel | None = None,
    ) -> None:
        """Put a cache together from parts; `open` is the way for a model.

        Without `served_model` nothing watches that a session is fed its own tokens.
        """
        self.config = config
        self.blocks = BlockCache(groups, identity, config, store)
        self._restorer = PrefixRestorer(self.blocks, config.restore_policy)
        self.served_model = served_model
        self._is_closed = False

    @classmethod
    def open(
        cls,
        model: Any,
        config: CacheConfig | None = None,
        *,
        store: Store | None = None,
        **settings: Any,
    ) -> PrefixCache:
        """A cache for `model`, whose attention is set to read it until `close`.

        Args:
            model: A Hugging Face causal language model, in evaluation mode. Its weights and
                adapters count as they are now; one loaded or switched later needs a cache opened
                after it.
            config: Sizes and places, such as `CacheConfig.from_toml("kv.toml")`.
            store: Tiers of your own, in place of those that `config` names; closed with the cache.
            settings: Fields of `CacheConfig` by name, in place of those of `config`:
                `PrefixCache.open(model, disk_path="kv-cache", codec="q8")`.

        Raises:
            ConfigError: If a setting is unknown or out of range, or the model in training mode.
            UnsupportedError: If the model has a feature without a kernel; the message names it.
            TierUnavailable: If a tier of this machine cannot be opened.
        """
        check_known("settings", settings, [one.name for one in fields(CacheConfig)])
        config = replace(config or CacheConfig(), **settings)
        check_evaluates(model)
        specs = layer_groups(model.config, config.block_size, model.dtype)
        sizes = pool_sizes(config, model.config, specs, model.device)
        identity = model_identity(model, [spec.layout for spec in specs])
        with ExitStack() as opened:
            served_model = ServedModel(model)
            opened.callback(served_model.close)
            groups = [
                PagedGroup(
                    pool=_make_pool(spec, num_blocks, model.device),
                    allocator=BlockAllocator(num_blocks),
                    layers=spec.layers,
                    window=spec.window,
                )
                for spec, num_blocks in zip(specs, sizes, strict=True)
            ]
            if store is None:
                store = open_store(config, groups)
                if store is not None:
                    opened.callback(store.close)
            cache = cls(groups, identity, config, store, served_model)
            opened.pop_all()
            return cache

    def session(
        self, token_ids: torch.Tensor | Sequence[int], *, salt: str | None = None
    ) -> Session:
        """The KV of one sequence, beginning with the longest prefix that is cached anywhere.

        What tiers hold is loaded as far as that is expected to be faster than computing it, see
        `CacheConfig.restore_policy`. At least the last token is left to compute: the model needs it
        to give logits.

        Args:
            token_ids: The prompt, `[num_tokens]` or `[1, num_tokens]`.
            salt: Namespace; default that of the cache.

        Raises:
            ValueError: If `token_ids` is empty, of another type or shape, or not integers in
                range; if `salt` is no string; if the cache is closed, or the model's weights
                changed since it was opened.
        """
        tokens, salt = self.checked_prompt(token_ids, salt)
        if self.served_model is not None:
            self.served_model.check_weights_beyond()
        started = time.perf_counter()
        whole = tokens[: (len(tokens) - 1) // self.config.block_size * self.config.block_size]
        keys = self.blocks.keys(whole, salt)
        device = self.blocks.device
        with ExitStack() as held:
            restored = self._restorer.restore(whole, len(tokens), salt, keys)
            held.callback(device.unpin, restored.match)
            held.callback(device.release, restored.block_ids)
            reused = [number for number, tier in enumerate(restored.tiers) if tier == DEVICE]
            self.blocks.touch(keys, restored.block_ids, reused)
            report = self._report(tokens, restored, time.perf_counter() - started)
            publish = partial(self._publish, salt)
            session = Session(
                *(device, tokens, restored, report, publish),
                *(self._restorer.timer, self.served_model),
            )
            held.pop_all()  # the session releases them from now on
            return session

    def checked_prompt(
        self, token_ids: torch.Tensor | np.ndarray | Sequence[int], salt: str | None
    ) -> tuple[np.ndarray, str]:
        """A prompt as `[num_tokens]` uint32, and its namespace; ValueError as for `session`.

        Of a GPU nothing is waited for, so a change of values alone is not seen in its weights.
        """
        if self._is_closed:
            raise ValueError("session: expected an open cache, got a closed one")
        salt = self._checked_salt(salt)
        if self.served_model is not None:
            self.served_model.check_weights_at_hand()
        tokens = as_tokens("token_ids", token_ids)
        if len(tokens) == 0:
            raise ValueError("token_ids: expected at least one token, got none")
        return tokens, salt

    def evict_pool(self) -> int:
        """Give up all blocks in the pool that no session holds; the tiers keep theirs.

        Returns:
            How many there were.
        """
        return self.blocks.device.evict_all()

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until the tiers hold everything committed; False if time ran out first."""
        store = self.blocks.store
        return store.flush(timeout_s) if store else True

    def stats(self) -> CacheStats:
        """Counters since the cache was opened, and what its pools hold now."""
        device, store = self.blocks.device, self.blocks.store
        device.release_abandoned()
        pools = tuple(
            PoolStats(
                window=group.window,
                num_blocks=group.pool.num_blocks,
                num_free=group.allocator.num_free,
                num_bytes=group.pool.capacity_bytes,
            )
            for group in device.groups
        )
        num_prompts, prompt_tokens, hit_tokens = self.blocks.counts()
        return CacheStats(
            num_sessions=num_prompts,
            prompt_tokens=prompt_tokens,
            hit_tokens=hit_tokens,
            evicted_blocks=device.evicted_blocks,
            pool_blocks=pools[0].num_blocks,
            pool_free_blocks=pools[0].num_free,
            pools=pools,
            index=device.index_stats(),
            store=store.stats() if store else None,
        )

    def planner_stats(self) -> PlannerStats:
        """What was chosen for the prompts of sessions, and which speeds are believed."""
        return self._restorer.planner.stats()

    def tier_stats(self) -> dict[str, TierStats | None]:
        """What each tier holds, by name; None where it gave no answer."""
        return self.blocks.store.tier_stats() if self.blocks.store else {}

    def outline(self) -> Outline:
        """The tree of cached prefixes as it is now, without tokens."""
        return self.blocks.device.outline()

    def tokens_of(self, handle: int) -> np.ndarray | None:
        """The tokens of a run of an outline, `[num_tokens]` uint32; None if it was evicted since.

        Prompts are private: show them to nobody who may not see all of them.
        """
        return self.blocks.device.tokens_of(handle)

    def forget(self, salt: str | None = None) -> list[str]:
        """Forget what the tiers hold of this identity: this model, a salt, this cache's settings.

        For every process. Caches of the same model with another block size, dtype of the model,
        adapter or lossy codec have other identities, which nothing ties to this one: what those
        wrote under the salt stays, and is forgotten by a cache that is opened like them. Without
        loss all codecs share one.

        Blocks in the pool stay until they are evicted. What this process is still to write of them
        is dropped, or waited for and deleted.

        Args:
            salt: The namespace; default that of the cache.

        Returns:
            The names of the tiers that could not, or that may get some of them yet.

        Raises:
            ValueError: If `salt` is no string, or holds half a surrogate pair.
        """
        return self.blocks.forget(self._checked_salt(salt))

    def check(self) -> list[str]:
        """Recount every part; returns one line for each thing that is wrong."""
        return self.blocks.check()

    def close(self) -> None:
        """Write out what is queued, close the tiers and give the model its attention back.

        Sessions still open are of no more use than to be released. May be called again.
        """
        self._is_closed = True
        try:
            self._restorer.close()
            self.blocks.close()
        finally:
            if self.served_model is not None:
                self.served_model.close()

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _checked_salt(self, salt: str | None) -> str:
        if salt is not None and not isinstance(salt, str):
            raise ValueError(f"salt: expected a string or None, got {salt!r}")
        salt = self.config.salt if salt is None else salt
        problem = text_problem(salt)
        if problem is not None:
            raise ValueError(f"salt: {problem}")
        return salt

    def _publish(
        self, salt: str, tokens: np.ndarray, block_ids: np.ndarray, first_new: int
    ) -> Match | None:
        """Index the blocks of `tokens`, send those from `first_new` on to the tiers, and pin them.

        Returns:
            The pinned run; None where other blocks of the same tokens were indexed before.
        """
        if self.served_model is not None:
            self.served_model.check_weights()
        computed = range(first_new, len(block_ids))
        return self.blocks.publish(tokens, salt, block_ids, computed)

    def _report(
        self, tokens: np.ndarray, restored: RestoredPrefix, restore_s: float
    ) -> ReuseReport:
        by_tier: dict[str, int] = {}
        for tier in restored.tiers:
            by_tier[tier] = by_tier.get(tier, 0) + self.config.block_size
        self.blocks.count(len(tokens), by_tier)
        return ReuseReport(
            num_prompt_tokens=len(tokens),
            tokens_by_tier=by_tier,
            num_recomputed=len(tokens) - sum(by_tier.values()),
            restore_s=restore_s,
            misses={
                reason.value: count * self.config.block_size
                for reason, count in Counter(restored.misses).items()
            },
        )


def _make_pool(spec: LayerGroupSpec, num_blocks: int, device: torch.device) -> KVPool:
    """A group's pool.

    Raises:
        ConfigError: If the device does not give so much memory.
    """
    try:
        return KVPool(spec.layout, num_blocks, device)
    except RuntimeError as error:
        raise ConfigError(
            f"pool_tokens: expected room for {num_blocks * spec.layout.block_bytes} bytes on"
            f" {device}, got: {str(error).partition(chr(10))[0]}"
        ) from error
