"""Bring the longest prefix of a prompt back: what is in the pool, then what the tiers hold."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.index import Match
from prefixstore.missing_blocks import MissingBlocks
from prefixstore.pass_timer import PassTimer
from prefixstore.patient_calls import PatientCalls
from prefixstore.planner import Planner, PlannerConfig
from prefixstore.prefix_loads import PrefixLoads
from prefixstore.residency import first_block_needed
from prefixstore.reuse_report import DEVICE, MissReason

_ONE_PASS = 1 << 30  # tokens: `generate` runs the model once over a prompt


@dataclass
class RestoredPrefix:
    """A prefix whose blocks are in the pool; the holder owns its pin and a reference of each.

    Attributes:
        match: The pinned run of the index.
        block_ids: `[num_blocks, num_groups]` int32; -1 where no later token can see the block.
        tiers: `[num_blocks]`, where each block lay.
        misses: Why each further whole block of the prompt is not part of it.
        num_found: Blocks of the prompt that were indexed, usable or not: other prompts went on
            differently from there.
    """

    match: Match
    block_ids: np.ndarray
    tiers: list[str]
    misses: list[MissReason]
    num_found: int

    @property
    def num_blocks(self) -> int:
        """Blocks of the restored prefix."""
        return len(self.tiers)


class PrefixRestorer:
    """Brings prefixes into the pool, as far as that is faster than computing them.

    Its caller computes nothing meanwhile, so look-ups and loads run in threads that are waited for
    no longer than computing would take: a tier that hangs keeps a thread, and costs little more
    than its hits.

    Args:
        blocks: The model's.
        policy: See `PlannerConfig`.

    Attributes:
        planner: Learns speeds and plans.
        timer: To be told of forward passes over prompts.
    """

    def __init__(self, blocks: BlockCache, policy: str) -> None:
        store = blocks.store
        self._blocks = blocks
        self._calls = PatientCalls()
        self.planner = Planner(
            store.tier_names if store is not None else (),
            blocks.block_size,
            _ONE_PASS,
            config=PlannerConfig(policy=policy),
        )
        device = blocks.device.groups[0].pool.device
        self.timer = PassTimer(device, self._observe_pass, lambda: self._calls.num_under_way > 0)
        if store is not None:
            store.observe_loads(self._observe_load)

    def restore(
        self,
        tokens: np.ndarray,
        num_tokens: int,
        salt: str,
        keys: Sequence[Sequence[BlockKey]],
    ) -> RestoredPrefix:
        """Find, load and verify the longest cached prefix of `tokens` that is worth it, and index
        what was loaded.

        Args:
            tokens: Whole blocks only, `[num_blocks * block_size]` uint32.
            num_tokens: Of the prompt.
            salt: The namespace.
            keys: Per group, the keys of the blocks.
        """
        blocks, device = self._blocks, self._blocks.device
        match, found = device.find(tokens, salt)
        missing = MissingBlocks(blocks, keys, found)
        try:
            if blocks.store is not None and (missing.block_ids < 0).any():
                self.timer.collect()
                PrefixLoads(blocks, self._calls, self.planner, missing, num_tokens).run()
            usable = missing.num_usable
            misses = missing.misses(usable)
        except BaseException:
            device.release(missing.block_ids)
            device.unpin(match)
            raise
        device.release(missing.block_ids[usable:])
        block_ids, tiers = missing.block_ids[:usable], missing.tiers[:usable]
        for group, window in enumerate(device.windows):
            device.drop(
                group, block_ids[: first_block_needed(usable, device.block_size, window), group]
            )
        is_loaded = any(tier != DEVICE for tier in tiers)
        prefix = tokens[: usable * device.block_size]
        if is_loaded:
            blocks.note_loaded(keys[0][at] for at, tier in enumerate(tiers) if tier != DEVICE)
            device.insert(prefix, salt, block_ids)
        if is_loaded or usable < len(found):
            device.unpin(match)
            match = device.hold(prefix, salt)
        return RestoredPrefix(match, block_ids, tiers, misses, len(found))

    def close(self) -> None:
        """Wait for calls that nobody waits for."""
        self._calls.close()

    # ---- measurements ------------------------------------------------------------------------

    def _observe_pass(self, num_new: int, context: int, seconds: float, is_loading: bool) -> None:
        self.planner.observe_prefill(num_new, context, seconds, is_loading=is_loading)

    def _observe_load(self, tier: str, num_records: int, num_bytes: int, seconds: float) -> None:
        if num_records and seconds > 0:
            self.planner.observe_load(tier, num_bytes, num_records, seconds, time.monotonic())
