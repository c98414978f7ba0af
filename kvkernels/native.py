"""Turns checked tensors into addresses, sizes and strides for the C++ kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvkernels.checks import address_of
from kvkernels.quantized_cache import QuantizedCache
from kvkernels.scoring import Scoring
from kvkernels.threads import num_threads

try:
    import _kvkernels
except ModuleNotFoundError:  # only when the extension is absent: a broken build raises
    _kvkernels = None

is_available = _kvkernels is not None and hasattr(_kvkernels, "paged_attention")

# Instruction sets this processor has, best first, and the number C++ knows each by.
_ISAS: dict[str, int] = dict(_kvkernels.attention_paths()) if is_available else {}
_isa = next(iter(_ISAS.values()), 0)

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def available_isas() -> tuple[str, ...]:
    """Names that `use_isa` accepts here, the one in use by default first."""
    return tuple(_ISAS)


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the attention ops on another instruction set than the best one, to test or compare it.

    For the whole process, not only for the calling thread. Where an instruction set does not serve
    a dtype or head_dim, the next lower one does.

    Args:
        name: One of `available_isas()`. "amx_emulated" does what "amx" does without its
            instructions, on processors with AVX512-BF16.

    Raises:
        ValueError: If this processor does not have it.
    """
    global _isa
    if name not in _ISAS:
        raise ValueError(f"name: expected one of {available_isas()}, got {name!r}")
    previous, _isa = _isa, _ISAS[name]
    try:
        yield
    finally:
        _isa = previous


def isa() -> int:
    """The instruction set that ops are to run on now, as C++ knows it."""
    return _isa


def empty_pool(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """An uninitialised tensor for blocks; on a CPU in large pages, where Linux gives them.

    Uninitialised on purpose: a page is only there once a block in it is used, so a pool may be
    sized for the worst case and cost nothing until then, and it lies on the memory node of the
    thread that writes it first.
    """
    # Outside inference mode: a tensor made inside it could never be written in place outside.
    with torch.inference_mode(False):
        data = torch.empty(shape, dtype=dtype, device=device)
    if is_available and data.device.type == "cpu":
        _kvkernels.advise_huge_pages(data.data_ptr(), data.nbytes)
    return data


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `kvkernels.store_kv`."""
    num_tokens, num_kv_heads, head_dim = key.shape
    item = key.element_size()
    _kvkernels.store_kv(
        (
            address_of("key", key),
            address_of("value", value),
            address_of("key_cache", key_cache),
            address_of("value_cache", value_cache),
            address_of("slot_mapping", slot_mapping),
        ),
        (num_tokens, num_kv_heads, key_cache.shape[0], key_cache.shape[2], head_dim * item),
        [item * s for s in (*key.stride()[:2], *key_cache.stride()[:3])],
        [item * s for s in (*value.stride()[:2], *value_cache.stride()[:3])],
        slot_mapping.stride(0),
        num_threads(),
    )


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    scoring: Scoring,
    return_lse: bool,
    int8_cache: QuantizedCache | None = None,
    int4_cache: QuantizedCache | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvkernels.paged_attention`."""
    num_tokens, num_heads, head_dim = query.shape
    num_blocks, num_kv_heads, block_size, value_dim = value_cache.shape
    out = query.new_empty((num_tokens, num_heads, value_dim))
    lse = query.new_empty((num_tokens if return_lse else 0, num_heads), dtype=torch.float32)
    _kvkernels.paged_attention(
        (
            address_of("query", query),
            address_of("key_cache", key_cache),
            address_of("value_cache", value_cache),
            address_of("block_table", block_table),
            address_of("seq_lens", seq_lens),
            _optional_address("cu_seqlens_q", cu_seqlens_q),
            out.data_ptr(),
            lse.data_ptr() if return_lse else 0,
            _optional_address("sinks", scoring.sinks),
            _optional_address("alibi_slopes", scoring.alibi_slopes),
            _optional_address("tree_mask", scoring.tree_mask),
        ),
        (
            *(num_tokens, num_heads, num_kv_heads, head_dim, value_dim),
            *(*block_table.shape, num_blocks, block_size),
        ),
        (
            *query.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_table.stride(0),
        ),
        (scoring.sm_scale, scoring.soft_cap),
        scoring.causal,
        scoring.window,
        batch_invariant,
        (_describe("int8_cache", int8_cache), _describe("int4_cache", int4_cache)),
        _DTYPES[query.dtype],
        _DTYPES[key_cache.dtype],
        _isa,
        num_threads(),
    )
    return out, lse


def _optional_address(name: str, tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else address_of(name, tensor)


def _describe(name: str, cache: QuantizedCache | None) -> tuple[int, ...]:
    """Addresses, then sizes, then the strides of block and head of the four parts."""
    if cache is None:
        return ()
    sizes = (cache.key_codes.shape[0], cache.key_scales.shape[2], cache.value_scales.shape[3])
    strides = [stride for part in cache for stride in part.stride()[:2]]
    return (*(address_of(name, part) for part in cache), *sizes, *strides)


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvkernels.merge_attention`."""
    num_tokens, num_heads, head_dim = out_a.shape
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    _kvkernels.merge_attention(
        [
            address_of("out_a", out_a),
            address_of("lse_a", lse_a),
            address_of("out_b", out_b),
            address_of("lse_b", lse_b),
            out.data_ptr(),
            lse.data_ptr(),
        ],
        num_tokens * num_heads,
        head_dim,
        _DTYPES[out_a.dtype],
        _isa,
        num_threads(),
    )
    return out, lse


def has_even_rows(tensor: torch.Tensor) -> bool:
    """Whether rows are dense and a constant stride apart, as the functions below want them."""
    return tensor.is_contiguous() or (tensor.dim() == 2 and tensor.stride(1) == 1)


def _row_stride(tensor: torch.Tensor) -> int:
    return tensor.stride(0) if tensor.dim() == 2 else tensor.shape[-1]


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `kvkernels.linear`, for an input that `has_even_rows`."""
    return linear_layers(input, ((weight, bias),))[0]


def linear_layers(
    input: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
) -> list[torch.Tensor]:
    """What `linear` makes of one input with each of the weights and biases, in one call."""
    features, leading = input.shape[-1], input.shape[:-1]
    outs = [input.new_empty((*leading, weight.shape[0])) for weight, _ in layers]
    _kvkernels.linear(
        (address_of("input", input), leading.numel(), features, _row_stride(input)),
        [
            (
                address_of("weight", weight),
                _optional_address("bias", bias),
                out.data_ptr(),
                *weight.shape,
                weight.stride(0),
            )
            for (weight, bias), out in zip(layers, outs, strict=True)
        ],
        _DTYPES[input.dtype],
        _isa,
        num_threads(),
    )
    return outs


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor, eps: float, is_offset: bool
) -> torch.Tensor:
    """See `kvkernels.rms_norm`, for an input that `has_even_rows`, none of them empty."""
    out = input.new_empty(input.shape)
    size = input.shape[-1]
    _kvkernels.rms_norm(
        (address_of("input", input), address_of("weight", weight), out.data_ptr()),
        (input.numel() // size, size, _row_stride(input)),
        eps,
        is_offset,
        _DTYPES[input.dtype],
        _isa,
        num_threads(),
    )
    return out


def rotary_embedding(
    input: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
) -> None:
    """See `kvkernels.rotary_embedding`; the strides of `cos` and `sin` are equal.

    Raises:
        ValueError: If `cos` or `sin` has another shape than that of the angles of `input`.
    """
    _kvkernels.rotary_embedding(
        (
            address_of("input", input),
            address_of("cos", cos),
            address_of("sin", sin),
            out.data_ptr(),
        ),
        input.shape,
        (cos.shape, sin.shape),
        input.stride()[:3],
        out.stride()[:3],
        (cos.stride(0) if len(cos) > 1 else 0, cos.stride(1)),
        _DTYPES[input.dtype],
        _isa,
        num_threads(),
    )


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `kvkernels.gated_activation`, for tensors as in `rms_norm`."""
    out = gate.new_empty(gate.shape)
    size = gate.shape[-1]
    _kvkernels.gated_activation(
        (address_of("gate", gate), address_of("up", up), out.data_ptr()),
        (gate.numel() // size, size, _row_stride(gate), _row_stride(up)),
        _ACTIVATIONS[activation],
        _DTYPES[gate.dtype],
        _isa,
        num_threads(),
    )
    return out


def decoder_layer(
    sizes: tuple[int, int, int, int, int],
    norms: Sequence[tuple[int, float, bool]],
    linears: Sequence[tuple[int, int, int, int]],
    activation: str,
    scales: tuple[float, float],
    dtype: torch.dtype,
) -> Any:
    """The kernels of a decoder layer, on weights at the given addresses.

    Args:
        sizes: Hidden size, heads, KV heads, head_dim and intermediate size.
        norms: Address, epsilon and whether 1 is added to the weight, of six; 0 for none.
        linears: Addresses of weight and bias, features that come out and the weight's stride, of
            seven.
        activation: See `kvkernels.gated_activation`.
        scales: Scale and soft cap of the scores.
        dtype: Of all tensors.
    """
    return _kvkernels.DecoderLayer(
        sizes, norms, linears, _ACTIVATIONS[activation], scales, _DTYPES[dtype]
    )


def encode_blocks(
    blocks: torch.Tensor,
    block_ids: torch.Tensor,
    table: torch.Tensor,
    payloads: torch.Tensor,
    sums: torch.Tensor | None,
    is_good: torch.Tensor,
) -> None:
    """Write payloads and the sums of their layers; say which layers their codec holds.

    Args:
        blocks: ``[num_blocks, num_layers, num_planes, num_kv_heads, block_size, head_dim]``, the
            layers of a block in one piece.
        block_ids: ``[num_payloads]``, int64, contiguous, in range.
        table: ``[num_layers, 23]``, see `BlockFormat.table`.
        payloads: ``[num_payloads, payload_bytes or more]``, uint8, last stride 1.
        sums: ``[num_payloads, num_layers, 2]``, int64, contiguous; None to leave them out, which
            shows what they cost.
        is_good: ``[num_payloads, num_layers]``, bool, contiguous.
    """
    _run_codecs(_kvkernels.encode_blocks, blocks, block_ids, table, payloads, sums, is_good)


def decode_blocks(
    blocks: torch.Tensor,
    block_ids: torch.Tensor,
    table: torch.Tensor,
    payloads: torch.Tensor,
    sums: torch.Tensor,
    is_good: torch.Tensor,
) -> None:
    """The reverse of `encode_blocks`, for the layers whose bytes have their sums."""
    _run_codecs(_kvkernels.decode_blocks, blocks, block_ids, table, payloads, sums, is_good)


def _run_codecs(
    run: Callable[..., None],
    blocks: torch.Tensor,
    block_ids: torch.Tensor,
    table: torch.Tensor,
    payloads: torch.Tensor,
    *results: torch.Tensor | None,
) -> None:
    _, num_layers, num_planes, num_heads, block_size, head_dim = blocks.shape
    names = ("blocks", "block_ids", "table", "payloads", "sums", "is_good")
    tensors = (blocks, block_ids, table, payloads, *results)
    run(
        [_optional_address(*named) for named in zip(names, tensors, strict=True)],
        (
            *(blocks.stride(0) * blocks.itemsize, num_layers, num_planes, num_heads),
            *(block_size, head_dim, len(block_ids), payloads.stride(0)),
        ),
        _DTYPES[blocks.dtype],
        _isa,
        num_threads(),
    )
