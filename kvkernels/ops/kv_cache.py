"""Write new keys and values into the block-table cache."""

import torch
from torch.compiler import is_dynamo_compiling

from kvkernels import native
from kvkernels.checks import (
    check_caches,
    check_device,
    check_dtype,
    check_inference,
    check_last_stride,
    check_shape,
)
from kvkernels.ops.library import LIBRARY
from kvkernels.reference import kv_cache as reference
from kvkernels.signatures import CheckedCalls, is_checked_at_launch
from kvkernels.threads import num_threads

_checked = CheckedCalls()


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write each token's key and value into its cache slot, in place.

    Args:
        key: New keys, ``[num_tokens, num_kv_heads, head_dim]``, last stride 1.
        value: New values, like ``key``.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, dtype of ``key``; any
            strides with the last one 1.
        value_cache: Like ``key_cache``.
        slot_mapping: ``[num_tokens]``, int64. ``block_id * block_size + offset``;
            negative skips the token. Slots must be distinct, which is not checked, and below
            ``num_blocks * block_size``: checked on the CPU, not on a GPU, where looking would
            stop the stream.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree, a tensor requires grad, or (on
            the CPU) a slot is out of range.
    """
    tensors = (key, value, key_cache, value_cache, slot_mapping)
    if (
        native.reads_tensors
        and not is_dynamo_compiling()
        and native.extension.store_tensors(*tensors, num_threads())
    ):
        return
    if not is_checked_at_launch(key):
        _check(*tensors)
    torch.ops.kvkernels.store_kv.default(*tensors)


def _check(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    tensors = (key, value, key_cache, value_cache, slot_mapping)
    if _checked.has(tensors):
        return
    check_caches(key_cache, value_cache)
    _, num_kv_heads, _, head_dim = key_cache.shape
    check_shape("key", key, (None, num_kv_heads, head_dim))
    num_tokens = key.shape[0]
    check_shape("value", value, (num_tokens, num_kv_heads, head_dim))
    check_shape("slot_mapping", slot_mapping, (num_tokens,))
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    for name, tensor in (("key", key), ("value", value)):
        check_dtype(name, tensor, key_cache.dtype)
        check_last_stride(name, tensor)
        check_inference(name, tensor)
        check_device(name, tensor, key_cache.device)
    check_device("slot_mapping", slot_mapping, key_cache.device)
    _checked.add(tensors)


LIBRARY.define(
    "store_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor slot_mapping) -> ()"
)


@torch.library.impl(LIBRARY, "store_kv", "CPU")
def _store_kv_cpu(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    if native.is_available:
        native.store_kv(key, value, key_cache, value_cache, slot_mapping)
        return
    num_slots = key_cache.shape[0] * key_cache.shape[2]
    if slot_mapping.numel() and int(slot_mapping.max()) >= num_slots:
        raise ValueError(
            f"slot_mapping: expected slots below {num_slots}, got {int(slot_mapping.max())}"
        )
    reference.store_kv(key, value, key_cache, value_cache, slot_mapping)


@torch.library.impl(LIBRARY, "store_kv", "CUDA")
def _store_kv_cuda(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    from kvkernels.triton_kernels import kv_cache as triton_kernels

    triton_kernels.store_kv(key, value, key_cache, value_cache, slot_mapping, check=_check)


@torch.library.register_fake("kvkernels::store_kv", lib=LIBRARY)
def _store_kv_fake(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    return None
