"""Attention that reads the block-table cache where it lies, and the union of two attentions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch.compiler import is_dynamo_compiling

from kvkernels import native
from kvkernels.checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_inference,
    check_shape,
)
from kvkernels.ops.attention_checks import (
    check_attention_inputs,
    check_index_values,
    check_kinds,
    check_scoring,
)
from kvkernels.ops.library import LIBRARY
from kvkernels.quantized_cache import QuantizedCache
from kvkernels.reference import attention as reference
from kvkernels.scoring import WIDEST_WINDOW, Scoring
from kvkernels.signatures import CheckedCalls, is_checked_at_launch
from kvkernels.threads import num_threads

if TYPE_CHECKING:
    from typing import Unpack

    from kvkernels.ops.attention_options import AttentionOptions

_checked_merges = CheckedCalls()


@overload
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...


@overload
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    sm_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    int8_cache: QuantizedCache | None = None,
    int4_cache: QuantizedCache | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from each sequence's newest tokens to all of its cached tokens.

    One call serves decode (one query a sequence), prefill (as many queries as tokens), extend
    (new tokens after cached ones) and any mix. The new tokens' keys and values must be in the
    cache already (`store_kv`).

    The last query of a sequence stands at position ``seq_len - 1``, the one before it at
    ``seq_len - 2``, and so on. A query that sees no key (an empty sequence, or a position below
    zero) gives zeros and a log-sum-exp of minus infinity, or of its head's sink.

    Blocks may also lie quantised, beside those of the pool and named by the same table
    (`QuantizedCache`, `tag_blocks`): older ones as int8 or int4, newer ones as they are.

    Latent attention (MLA) is a cache of one head whose values are the first channels of its keys:
    ``key_cache`` 576 wide, ``value_cache`` the view ``key_cache[..., :512]``.

    Under ``torch.compile(dynamic=True)``, a graph over several layers of one pool takes the pool's
    ``data`` and slices it inside, as `KVPool.key_cache` does: PyTorch cannot trace with dynamic
    shapes when it gets several layers' views as inputs.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``, the sequences one after another, last
            stride 1; float32, float16 or bfloat16.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, dtype of ``query`` or
            float8_e4m3fn; any strides with the last one 1. ``num_heads`` is a multiple of
            ``num_kv_heads``. A scale of float8 keys belongs into ``sm_scale``, one of values to the
            result.
        value_cache: ``[num_blocks, num_kv_heads, block_size, value_dim]``, else like
            ``key_cache``; ``value_dim`` is mostly ``head_dim``.
        block_table: ``[num_seqs, max_blocks_per_seq]``, int32, last stride 1: a sequence's block
            ids in order. Entries past its length, or wholly before its window, are never read.
        seq_lens: ``[num_seqs]``, int32: tokens in each sequence, cached and new.
        cu_seqlens_q: ``[num_seqs + 1]``, int32: running sum of the numbers of queries, from 0 to
            ``num_tokens``. Default one query a sequence.
        sm_scale: Multiplies scores before softmax; finite. Default ``head_dim ** -0.5``.
        causal: Whether a query sees only keys at its own position and before.
        window: Whether a query at position p sees only keys after ``p - window``; None for all.
        soft_cap: Bounds scaled scores: ``soft_cap * tanh(score / soft_cap)``; None for none.
        sinks: ``[num_heads]``, float32: logit of each head's attention sink, a key without a value
            that takes its share of the softmax. The log-sum-exp counts it.
        alibi_slopes: ``[num_heads]``, float32: a head's score falls by this for each position
            between query and key.
        tree_mask: ``[num_tokens]``, int32, for speculative decoding with trees of up to 16 new
            tokens a sequence: bit j says whether the token sees the j-th new token of its
            sequence. All see what came before. A token's position is that of the first new token
            plus the number of other new tokens that it sees.
        int8_cache: Blocks that table entries tagged "int8" name; same heads, block size and device.
        int4_cache: Like ``int8_cache``, for "int4".
        return_lse: Whether to return the log-sum-exp too.
        batch_invariant: Whether a result must be the same, bit for bit, in any batch. On the CPU
            that is the result of a query, also among any other number of queries of its sequence
            (that of a sequence always is the same there), and few queries take longer. On a GPU it
            is that of a sequence, alone and beside others; it costs parallelism of short batches,
            and holds among calls without ``cu_seqlens_q`` and among calls with it.

    Returns:
        ``[num_tokens, num_heads, value_dim]`` in the dtype of ``query``; with ``return_lse`` a pair
        of it and ``[num_tokens, num_heads]``, float32: natural logarithm of the sum of the
        exponentials of the scaled scores. Where a score is infinity, the log-sum-exp is too, and
        the output is not a number; where one is not a number, neither is the output or the
        log-sum-exp, which may be infinity if a score is infinity beside it.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree, a tensor requires grad
            or has a tangent, or (on the CPU; on a GPU looking would stop the stream) a length or
            a block id in use is out of range.
    """
    if native.reads_tensors and not is_dynamo_compiling():
        result = native.extension.attend_tensors(
            *(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q),
            *(sm_scale, causal, window, soft_cap, sinks, alibi_slopes, tree_mask),
            *(int8_cache, int4_cache, return_lse, batch_invariant),
            *(native.isa(), num_threads()),
        )
        if result is not None:
            return result
    check_kinds(int8_cache, int4_cache)
    if not is_checked_at_launch(query):
        check_attention_inputs(
            *(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q),
            *(int8_cache, int4_cache),
        )
    check_scoring(query, sm_scale, causal, window, soft_cap, sinks, alibi_slopes, tree_mask)
    sm_scale = query.shape[2] ** -0.5 if sm_scale is None else sm_scale
    window, soft_cap = min(window or 0, WIDEST_WINDOW), soft_cap or 0.0
    out, lse = torch.ops.kvkernels.paged_attention.default(
        *(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q),
        *(sm_scale, causal, window, soft_cap, sinks, alibi_slopes, tree_mask),
        *(int8_cache or (), int4_cache or (), return_lse, batch_invariant),
    )
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of two disjoint sets of keys, from the attention over each.

    Exact up to rounding: each output is weighted by its share of the softmax sum.

    Args:
        out_a: ``[num_tokens, num_heads, head_dim]``, contiguous; float32, float16 or bfloat16.
        lse_a: ``[num_tokens, num_heads]``, float32, contiguous, natural logarithm; minus infinity
            where no key was seen, and then ``out_a`` is not read as a number. Infinity, a sum
            beyond all numbers, stays infinity, and the output is not a number: no share of it is.
        out_b: Like ``out_a``.
        lse_b: Like ``lse_a``.

    Returns:
        The merged output, like ``out_a``, and log-sum-exp, like ``lse_a``.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree or a tensor requires grad.
    """
    if native.reads_tensors and not is_dynamo_compiling():
        merged = native.extension.merge_tensors(
            out_a, lse_a, out_b, lse_b, native.isa(), num_threads()
        )
        if merged is not None:
            return merged
    if not is_checked_at_launch(out_a):
        _check_merge(out_a, lse_a, out_b, lse_b)
    return torch.ops.kvkernels.merge_attention.default(out_a, lse_a, out_b, lse_b)


def _check_merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> None:
    tensors = (out_a, lse_a, out_b, lse_b)
    if _checked_merges.has(tensors):
        return
    check_shape("out_a", out_a, (None, None, None))
    num_tokens, num_heads, head_dim = out_a.shape
    check_dtype("out_a", out_a, *FLOAT_DTYPES)
    check_shape("out_b", out_b, (num_tokens, num_heads, head_dim))
    check_dtype("out_b", out_b, out_a.dtype)
    check_shape("lse_a", lse_a, (num_tokens, num_heads))
    check_shape("lse_b", lse_b, (num_tokens, num_heads))
    check_dtype("lse_a", lse_a, torch.float32)
    check_dtype("lse_b", lse_b, torch.float32)
    for name, tensor in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_device(name, tensor, out_a.device)
        check_inference(name, tensor)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got {tensor.stride()}")
    _checked_merges.add(tensors)


LIBRARY.define(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table,"
    " Tensor seq_lens, Tensor? cu_seqlens_q, float sm_scale, bool causal, int window,"
    " float soft_cap, Tensor? sinks, Tensor? alibi_slopes, Tensor? tree_mask,"
    " Tensor[] int8_cache, Tensor[] int4_cache, bool return_lse, bool batch_invariant)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)"
)

_NUM_INPUTS = 6  # of the op's arguments, those before the rules of scoring
_NUM_RULES = 7


def _gather_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """An implementation's arguments from those of the op, which knows no classes."""
    inputs = arguments[:_NUM_INPUTS]
    scoring = Scoring(*arguments[_NUM_INPUTS : _NUM_INPUTS + _NUM_RULES])
    int8, int4, return_lse, batch_invariant = arguments[_NUM_INPUTS + _NUM_RULES :]
    int8_cache = QuantizedCache(*int8) if int8 else None
    int4_cache = QuantizedCache(*int4) if int4 else None
    return (*inputs, scoring, return_lse, int8_cache, int4_cache, batch_invariant)


@torch.library.impl(LIBRARY, "paged_attention", "CPU")
def _paged_attention_cpu(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    gathered = _gather_arguments(arguments)
    if native.is_available:
        return native.paged_attention(*gathered)
    check_index_values(*gathered)
    return reference.paged_attention(*gathered)


@torch.library.impl(LIBRARY, "paged_attention", "CUDA")
def _paged_attention_cuda(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from kvkernels.triton_kernels import attention as triton_kernels

    gathered = _gather_arguments(arguments)
    return triton_kernels.paged_attention(*gathered, check=check_attention_inputs)


@torch.library.register_fake("kvkernels::paged_attention", lib=LIBRARY)
def _paged_attention_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, _, value_cache = arguments[:3]
    return_lse = arguments[-2]
    num_tokens, num_heads, _ = query.shape
    out = query.new_empty((num_tokens, num_heads, value_cache.shape[-1]))
    return out, query.new_empty((num_tokens if return_lse else 0, num_heads), dtype=torch.float32)


@torch.library.impl(LIBRARY, "merge_attention", "CPU")
def _merge_attention_cpu(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    implementation = native if native.is_available else reference
    return implementation.merge_attention(out_a, lse_a, out_b, lse_b)


@torch.library.impl(LIBRARY, "merge_attention", "CUDA")
def _merge_attention_cuda(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from kvkernels.triton_kernels import attention as triton_kernels

    return triton_kernels.merge_attention(out_a, lse_a, out_b, lse_b, check=_check_merge)


@torch.library.register_fake("kvkernels::merge_attention", lib=LIBRARY)
def _merge_attention_fake(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a)
