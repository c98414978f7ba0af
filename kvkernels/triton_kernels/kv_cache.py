"""Triton kernel that writes new keys and values into the block-table cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kvkernels.triton_kernels.launch import Launch, largest_power_of_2
from kvkernels.triton_kernels.replay import Replays, addresses, signature

_TILE_ELEMENTS = 2048
_stores = Replays(("key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr", "slot_mapping_ptr"))


@triton.jit(do_not_specialize_on_alignment=["slot_mapping_ptr"])
def _store_kv_kernel(
    key_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM]
    value_ptr,
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, HEAD_DIM]
    value_cache_ptr,
    slot_mapping_ptr,  # [num_tokens], int64
    num_kv_heads,
    block_size,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_key_cache_block,
    stride_key_cache_head,
    stride_key_cache_slot,
    stride_value_cache_block,
    stride_value_cache_head,
    stride_value_cache_slot,
    stride_slot_mapping,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # next power of two of HEAD_DIM
    TILE: tl.constexpr,  # heads of a program
):
    # One program copies some heads of one token. int64: a token or block times a stride overflows
    # int32 on large caches.
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token * stride_slot_mapping)
    if slot < 0:
        return
    block = slot // block_size
    offset = slot % block_size
    heads = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    channels = tl.arange(0, WIDTH)[None, :]
    inside = (heads < num_kv_heads) & (channels < HEAD_DIM)

    source = key_ptr + token * stride_key_token + heads * stride_key_head + channels
    target = block * stride_key_cache_block + offset * stride_key_cache_slot
    target = key_cache_ptr + target + heads * stride_key_cache_head + channels
    tl.store(target, tl.load(source, mask=inside), mask=inside)

    source = value_ptr + token * stride_value_token + heads * stride_value_head + channels
    target = block * stride_value_cache_block + offset * stride_value_cache_slot
    target = value_cache_ptr + target + heads * stride_value_cache_head + channels
    tl.store(target, tl.load(source, mask=inside), mask=inside)


def plan_store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> list[Launch]:
    """The launch that stores `key` and `value`."""
    num_tokens, num_kv_heads, head_dim = key.shape
    width = triton.next_power_of_2(head_dim)
    tile = min(
        triton.next_power_of_2(num_kv_heads), largest_power_of_2(max(1, _TILE_ELEMENTS // width))
    )
    store = Launch(
        _store_kv_kernel,
        (num_tokens, triton.cdiv(num_kv_heads, tile)),
        {
            "key_ptr": key,
            "value_ptr": value,
            "key_cache_ptr": key_cache,
            "value_cache_ptr": value_cache,
            "slot_mapping_ptr": slot_mapping,
            "num_kv_heads": num_kv_heads,
            "block_size": key_cache.shape[2],
            "stride_key_token": key.stride(0),
            "stride_key_head": key.stride(1),
            "stride_value_token": value.stride(0),
            "stride_value_head": value.stride(1),
            "stride_key_cache_block": key_cache.stride(0),
            "stride_key_cache_head": key_cache.stride(1),
            "stride_key_cache_slot": key_cache.stride(2),
            "stride_value_cache_block": value_cache.stride(0),
            "stride_value_cache_head": value_cache.stride(1),
            "stride_value_cache_slot": value_cache.stride(2),
            "stride_slot_mapping": slot_mapping.stride(0),
            "HEAD_DIM": head_dim,
            "WIDTH": width,
            "TILE": tile,
        },
        num_warps=4,
    )
    return [store]


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    check: Callable[..., None] | None = None,
) -> None:
    """Write each token's key and value into its slot; see `kvkernels.store_kv`.

    Slots are not checked: looking at them would stop the stream. `check` is given the tensors,
    unless they are laid out like those of a call before.
    """
    tensors = (key, value, key_cache, value_cache, slot_mapping)
    pointers = addresses(tensors)
    call = signature(tensors, pointers, ())
    if replay := _stores.find(call):
        replay.run(pointers, key)
        return
    if check is not None:
        check(*tensors)
    if key.numel():
        _stores.run(call, plan_store_kv(*tensors), key)
