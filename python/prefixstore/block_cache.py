"""Blocks on the device and behind it: what sessions and engines share of one model's cache."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from kvkernels.nn import PagedGroup
from kvkernels.transfer import PinnedMemory
from prefixstore.block_key import ROOT_HASH, BlockKey, chain_keys
from prefixstore.codec_choice import describe_loss, record_layouts
from prefixstore.config import CacheConfig
from prefixstore.device import DeviceBlocks
from prefixstore.identity import stored_identity
from prefixstore.index import Match
from prefixstore.pool_blocks import PoolBlocks
from prefixstore.store import Store
from prefixstore.store.recent_names import RecentNames


class BlockCache:
    """The blocks of one model: found by their tokens, published under them, saved to the tiers.

    Thread-safe. It knows neither the model nor who computes.

    Args:
        groups: Pool, allocator and window of each layer group.
        identity: Of all that must be equal for KV to be valid, see `model_identity`.
        config: Sizes, salt, codecs.
        store: The tiers, if there are any; closed with this.
    """

    def __init__(
        self,
        groups: Sequence[PagedGroup],
        identity: bytes,
        config: CacheConfig,
        store: Store | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.device = DeviceBlocks(groups, config.block_size)
        self._identity = identity
        self._record_layouts = record_layouts(groups, config)
        self._loss = describe_loss(self._record_layouts)
        self.pool_blocks = [
            PoolBlocks(group.pool, layouts)
            for group, layouts in zip(groups, self._record_layouts, strict=True)
        ]
        self._pinned = _pin_lent_memory(groups, store)
        self._were_here = RecentNames()  # group 0's blocks that were computed or loaded
        self._lock = threading.Lock()  # over the counters below
        self._num_prompts = 0
        self._prompt_tokens = 0
        self._hit_tokens: dict[str, int] = {}

    @property
    def block_size(self) -> int:
        return self.config.block_size

    def identity(self, salt: str) -> bytes:
        """Of the records under a salt."""
        return stored_identity(self._identity, salt, self._loss)

    def record_codecs(self) -> set[str]:
        """All that blocks may be written with."""
        return {name for own in self._record_layouts for one in own for name in one.codecs}

    def record_bytes(self, first: int, num_blocks: int) -> list[np.ndarray]:
        """Per group, what the records of a prompt's blocks from `first` on take: `[num_blocks]`,
        int64."""
        numbers = np.arange(first, first + num_blocks)
        return [
            np.array([one.record_bytes for one in own])[np.minimum(numbers, len(own) - 1)]
            for own in self._record_layouts
        ]

    def keys(self, tokens: np.ndarray, salt: str) -> list[list[BlockKey]]:
        """Per group, the keys of the whole blocks of `tokens`."""
        keys: list[list[BlockKey]] = [[] for _ in self._record_layouts]
        self.extend_keys(keys, tokens, salt)
        return keys

    def extend_keys(self, keys: Sequence[list[BlockKey]], tokens: np.ndarray, salt: str) -> None:
        """Add the keys of those whole blocks of `tokens` that `keys` lacks."""
        if all(len(own) == len(tokens) // self.block_size for own in keys):
            return
        identity = self.identity(salt)
        for layouts, own in zip(self._record_layouts, keys, strict=True):
            done = len(own)
            parent = own[-1].block_hash if own else ROOT_HASH
            left = layouts[min(done, len(layouts) - 1) :]
            own += chain_keys(left, identity, tokens[done * self.block_size :], parent)

    def publish(
        self,
        tokens: np.ndarray,
        salt: str,
        block_ids: np.ndarray,
        computed: Sequence[int],
        keys: Sequence[Sequence[BlockKey]] | None = None,
    ) -> Match | None:
        """Index whole blocks, send those that were computed to the tiers, and pin the run.

        Args:
            tokens: ``[num_blocks * block_size]``, uint32.
            salt: The namespace.
            block_ids: ``[num_blocks, num_groups]``, int32; -1 where a group's window has passed.
            computed: Numbers of the blocks that no tier gave.
            keys: Per group, of the blocks or more; worked out if not given.

        Returns:
            The pinned run; None where other blocks of the same tokens were indexed before.
        """
        num_indexed = self.device.insert(tokens, salt, block_ids)
        computed = [number for number in computed if number < num_indexed]
        if computed:
            keys = self.keys(tokens, salt) if keys is None else keys
            self._were_here.add([keys[0][number].name for number in computed])
            if self.store is not None:
                self._save_all(keys, block_ids, computed)
        return self.device.pin(tokens, salt, block_ids)

    def quarantine(
        self,
        tokens: np.ndarray,
        salt: str,
        keys: Sequence[Sequence[BlockKey]],
        num_kept: int,
    ) -> list[BlockKey]:
        """Use a block that was found wrong no more, nor those after it: they were computed on it.

        Args:
            tokens: The prompt, up to the block or further.
            salt: The namespace.
            keys: Per group, of the prompt's blocks.
            num_kept: Blocks before the wrong one.

        Returns:
            The keys of what the tiers may hold of it, to be deleted there: that takes time.
        """
        self.device.detach(tokens, salt, num_kept)
        wrong = [key for own in keys for key in own[num_kept:]]
        if self.store is not None:
            self.store.quarantine(wrong)
        return wrong

    def note_loaded(self, keys: Iterable[BlockKey]) -> None:
        """Blocks came from the tiers; group 0's keys."""
        self._were_here.add([key.name for key in keys])

    def were_here(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Whether this process has computed or loaded blocks that it may have lost since; group
        0's keys."""
        return self._were_here.contains_many([key.name for key in keys])

    def touch(
        self, keys: Sequence[Sequence[BlockKey]], block_ids: np.ndarray, numbers: Sequence[int]
    ) -> None:
        """Tell the store of blocks that were reused in the pool; save those a tier waited for.

        Args:
            keys: Per group, of the blocks.
            block_ids: ``[num_blocks, num_groups]``.
            numbers: Which of the blocks.
        """
        if self.store is None:
            return
        for group, group_keys in enumerate(keys):
            reused = [number for number in numbers if block_ids[number, group] >= 0]
            for wanted in self.store.touch([group_keys[number] for number in reused]):
                number = reused[wanted]
                self._save(group, group_keys[number], int(block_ids[number, group]), True)

    def count(self, num_prompt_tokens: int, tokens_by_tier: Mapping[str, int]) -> None:
        """Count a prompt and what was reused for it."""
        with self._lock:
            self._num_prompts += 1
            self._prompt_tokens += num_prompt_tokens
            for tier, num_tokens in tokens_by_tier.items():
                self._hit_tokens[tier] = self._hit_tokens.get(tier, 0) + num_tokens

    def counts(self) -> tuple[int, int, dict[str, int]]:
        """Prompts, their tokens, and the reused ones by tier."""
        with self._lock:
            return self._num_prompts, self._prompt_tokens, dict(self._hit_tokens)

    def forget(self, salt: str) -> list[str]:
        """See `PrefixCache.forget`."""
        return self.store.delete_identity(self.identity(salt)) if self.store else []

    def check(self) -> list[str]:
        """Recount every part; returns one line for each thing that is wrong."""
        return self.device.check() + (self.store.check() if self.store else [])

    def close(self) -> None:
        """Write out what is queued and close the tiers."""
        if self.store is not None:
            self.store.close()
        for pool_blocks in self.pool_blocks:
            pool_blocks.close()
        if self._pinned is not None:
            self._pinned.close()

    def _save_all(
        self,
        keys: Sequence[Sequence[BlockKey]],
        block_ids: np.ndarray,
        numbers: Sequence[int],
    ) -> None:
        for group, group_keys in enumerate(keys):
            for number in numbers:
                if block_ids[number, group] >= 0:
                    self._save(group, group_keys[number], int(block_ids[number, group]))

    def _save(self, group: int, key: BlockKey, block_id: int, is_reuse: bool = False) -> None:
        assert self.store is not None
        if not self.device.writes.has_room(group):
            self.store.note_dropped()
            return
        self.device.writes.begin(group, block_id)
        done = partial(self.device.writes.end, group, block_id)
        source = self.pool_blocks[group].source(block_id)
        self.store.save(key, source, done, is_reuse=is_reuse)


def _pin_lent_memory(groups: Sequence[PagedGroup], store: Store | None) -> PinnedMemory | None:
    """Let a GPU copy the fastest tier's records from where they lie."""
    memory = None if store is None else store.lent_memory
    devices = [group.pool.device for group in groups if group.pool.device.type == "cuda"]
    if memory is None or not devices:
        return None
    return PinnedMemory(torch.from_numpy(memory), devices[0])
