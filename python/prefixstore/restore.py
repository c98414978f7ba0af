"""Bring the longest prefix of a prompt back: what is in the pool, then what the tiers hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.index import Match
from prefixstore.record import BlockKey
from prefixstore.residency import first_block_needed, longest_prefix
from prefixstore.reuse_report import MissReason

DEVICE = "device"  # the name of the pool among the tiers, in reports


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


def restore_prefix(
    blocks: BlockCache,
    tokens: np.ndarray,
    salt: str,
    keys: Sequence[Sequence[BlockKey]],
) -> RestoredPrefix:
    """Find, load and verify the longest cached prefix of `tokens`, and index what was loaded.

    Args:
        blocks: Where they are looked for.
        tokens: Whole blocks only, `[num_blocks * block_size]` uint32.
        salt: The namespace.
        keys: Per group, the keys of the blocks.
    """
    device = blocks.device
    num_blocks = len(tokens) // device.block_size
    match, found = device.find(tokens, salt)
    block_ids = np.full((num_blocks, len(device.groups)), -1, dtype=np.int32)
    block_ids[: len(found)] = found
    tiers = [DEVICE] * num_blocks
    try:
        usable, misses = _load_missing(blocks, keys, block_ids, tiers)
    except BaseException:
        device.release(block_ids)
        device.unpin(match)
        raise
    device.release(block_ids[usable:])
    block_ids, tiers = block_ids[:usable], tiers[:usable]
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


def _load_missing(
    blocks: BlockCache,
    keys: Sequence[Sequence[BlockKey]],
    block_ids: np.ndarray,
    tiers: list[str],
) -> tuple[int, list[MissReason]]:
    """Fill holes in `block_ids` from the tiers; returns the blocks of the longest whole prefix, and
    why each further one is not part of it.
    """
    device, store = blocks.device, blocks.store
    reasons: dict[int, MissReason] = {}
    available = [ids >= 0 for ids in block_ids.T.copy()]
    deadline = math.inf if store is None else store.deadline()
    if store is not None:
        missing = [np.flatnonzero(~held) for held in available]
        asked = [
            [own[number] for number in numbers.tolist()]
            for own, numbers in zip(keys, missing, strict=True)
        ]
        answers = store.look_up(asked, deadline)
        for held, numbers, own in zip(available, missing, answers, strict=True):
            held[numbers] = [tier is not None for tier in own.tiers]
            reasons |= dict.fromkeys(numbers[[*own.unanswered]].tolist(), MissReason.UNREACHABLE)
            reasons |= dict.fromkeys(numbers[[*own.barred]].tolist(), MissReason.QUARANTINED)
    while True:
        num_blocks = longest_prefix(available, device.block_size, device.windows)
        is_complete = True
        for group, window in enumerate(device.windows):
            first = first_block_needed(num_blocks, device.block_size, window)
            numbers = first + np.flatnonzero(block_ids[first:num_blocks, group] < 0)
            if len(numbers) == 0:
                continue
            failed = _load(blocks, group, keys[group], numbers, block_ids, tiers, deadline)
            reasons |= failed
            # Counted misses: settle for the longest prefix without these blocks.
            available[group][[*failed]] = False
            is_complete = is_complete and not failed
        if is_complete:
            return num_blocks, _misses(blocks, keys[0], available, num_blocks, reasons)


def _misses(
    blocks: BlockCache,
    keys: Sequence[BlockKey],
    available: Sequence[np.ndarray],
    num_reused: int,
    reasons: Mapping[int, MissReason],
) -> list[MissReason]:
    """Of each block behind the reused ones, why it is computed; `reasons` of those that failed."""
    windows = blocks.device.windows
    full = [own for own, window in zip(available, windows, strict=True) if window is None]
    is_there = np.logical_and.reduce(full or available)
    behind = MissReason.GAP if all(window is None for window in windows) else MissReason.WINDOW
    absent = [
        MissReason.EVICTED if was_here else MissReason.NEW
        for was_here in blocks.were_here(keys[num_reused:])
    ]
    return [
        reasons.get(number, behind if is_there[number] else gone)
        for number, gone in enumerate(absent, num_reused)
    ]


def _load(
    blocks: BlockCache,
    group: int,
    keys: Sequence[BlockKey],
    numbers: np.ndarray,
    block_ids: np.ndarray,
    tiers: list[str],
    deadline: float,
) -> dict[int, MissReason]:
    """Load these blocks of one group into the pool; returns which failed, and why."""
    assert blocks.store is not None
    try:
        taken = blocks.device.reserve(group, len(numbers), deadline)
    except PoolFullError:
        # Try again with the first half; what the pool cannot hold cannot be restored.
        return dict.fromkeys(numbers[len(numbers) // 2 :].tolist(), MissReason.NO_ROOM)
    block_ids[numbers, group] = taken  # theirs at once: whatever is raised below, they go back
    target = blocks.pool_blocks[group].target(taken)
    wanted = [keys[number] for number in numbers.tolist()]
    answers = blocks.store.load_many(wanted, target, deadline)
    failed: dict[int, MissReason] = {}
    for number, answer in zip(numbers.tolist(), answers, strict=True):
        if answer is None:
            blocks.device.drop(group, block_ids[number : number + 1, group])
            failed[number] = MissReason.LOST
        else:
            tiers[number] = answer
    return failed
