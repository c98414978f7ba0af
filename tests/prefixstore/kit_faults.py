"""Faults to plant in a cache, which the kit must notice; each is a context manager.

Keys carry their positions, so the order of blocks, or of tokens in a block, does not matter to
attention: a fault only shows if it loses, repeats or swaps in foreign tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from kvkernels import KVPool
from prefixstore.cache import PrefixCache
from prefixstore.device import DeviceBlocks
from prefixstore.pool_blocks import PoolTarget

Damage = Callable[[KVPool, list[int]], None]


@contextlib.contextmanager
def damaged_restores(damage: Damage) -> Iterator[None]:
    """Apply a damage to blocks right after they were restored from a tier."""
    start = PoolTarget.start

    def damaged(self: PoolTarget, records: Sequence[Any]) -> Callable[[], list[str | None]]:
        finish = start(self, records)

        def finish_damaged() -> list[str | None]:
            problems = finish()
            damage(self._transfer.pool, self._block_ids[[one.index for one in records]].tolist())
            return problems

        return finish_damaged

    with mock.patch.object(PoolTarget, "start", damaged):
        yield


class BlockOfAnother:
    """The last block becomes one that an earlier call restored for another prompt."""

    def __init__(self) -> None:
        self._earlier: torch.Tensor | None = None

    def __call__(self, pool: KVPool, block_ids: list[int]) -> None:
        last = pool.data[block_ids[-1]].clone()
        if self._earlier is not None:
            pool.data[block_ids[-1]] = self._earlier
        self._earlier = last


def shift_tokens(pool: KVPool, block_ids: list[int]) -> None:
    """Each token's KV moves to the next slot; the first one's also stays."""
    blocks = pool.data[block_ids]
    blocks[..., 1:, :] = blocks[..., :-1, :].clone()
    pool.data[block_ids] = blocks


def empty_last_block(pool: KVPool, block_ids: list[int]) -> None:
    """The last block is reported as restored, but was not."""
    pool.data[block_ids[-1]] = 0


def round_to_bfloat16(pool: KVPool, block_ids: list[int]) -> None:
    """Half of the bits are lost, though the codec is "raw"."""
    pool.data[block_ids] = pool.data[block_ids].to(torch.bfloat16).to(pool.data.dtype)


def negate(pool: KVPool, block_ids: list[int]) -> None:
    """Every number changes its sign: an error of twice its size."""
    pool.data[block_ids] = -pool.data[block_ids]


@contextlib.contextmanager
def dropped_last_block() -> Iterator[None]:
    """The last block of each call becomes a miss."""
    start = PoolTarget.start

    def dropped(self: PoolTarget, records: Sequence[Any]) -> Callable[[], list[str | None]]:
        finish = start(self, records)
        return lambda: [*finish()[:-1], "payload: dropped"]

    with mock.patch.object(PoolTarget, "start", dropped):
        yield


@contextlib.contextmanager
def overwritten_on_device() -> Iterator[None]:
    """The first block that the index finds has been overwritten, as if given to another request."""

    def overwriting(find: Callable[..., Any]) -> Callable[..., Any]:
        def overwritten(self: DeviceBlocks, tokens: Any, salt: str) -> Any:
            match, block_ids = find(self, tokens, salt)
            if len(block_ids):
                self.groups[0].pool.data[block_ids[0, 0]].normal_()
            return match, block_ids

        return overwritten

    with (
        mock.patch.object(DeviceBlocks, "find", overwriting(DeviceBlocks.find)),
        mock.patch.object(DeviceBlocks, "find_usable", overwriting(DeviceBlocks.find_usable)),
    ):
        yield


@contextlib.contextmanager
def ignored_salts() -> Iterator[None]:
    """All tenants share one namespace."""
    checked = PrefixCache.checked_prompt

    def unsalted(self: PrefixCache, token_ids: Any, salt: str | None) -> Any:
        return checked(self, token_ids, "")

    with mock.patch.object(PrefixCache, "checked_prompt", unsalted):
        yield
