"""Turns checked tensors into addresses, sizes and strides for the C++ kernels on pools.

Those of a model's layers are in native_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._C import _parse_dispatch_key
from torch.autograd import forward_ad

from kvkernels.checks import address_of, needs_dispatcher
from kvkernels.quantized_cache import QuantizedCache
from kvkernels.scoring import Scoring
from kvkernels.threads import num_threads

try:
    import _kvkernels as extension
except ModuleNotFoundError:  # only when the extension is absent: a broken build raises
    extension = None

is_available = extension is not None and hasattr(extension, "paged_attention")

# Instruction sets this processor has, best first, and the number C++ knows each by.
_ISAS: dict[str, int] = dict(extension.attention_paths()) if is_available else {}
_isa = next(iter(_ISAS.values()), 0)

# Whether C++ reads tensors itself: through a table of functions that PyTorch has from 2.10 on. Then
# it also finds out whether PyTorch's dispatcher has to see a call; not so whether TorchDynamo does.
reads_tensors = (
    is_available
    and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    and extension.use_tensor_exchange(
        torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, torch.nn.Parameter
    )
)
if is_available:
    extension.set_class_of_caches(QuantizedCache)

# Whether C++ finds the functions of PyTorch that tell whether its dispatcher has to see a call. It
# asks Python if not.
knows_dispatcher = is_available and extension.watch_dispatcher(
    needs_dispatcher,
    vars(forward_ad),
    _parse_dispatch_key("FuncTorchDynamicLayerFrontMode"),
    _parse_dispatch_key("Tracer"),
)

# The number C++ knows each dtype by.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}


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
        extension.advise_huge_pages(data.data_ptr(), data.nbytes)
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
    extension.store_kv(
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
    extension.paged_attention(
        (
            address_of("query", query),
            address_of("key_cache", key_cache),
            address_of("value_cache", value_cache),
            address_of("block_table", block_table),
            address_of("seq_lens", seq_lens),
            optional_address("cu_seqlens_q", cu_seqlens_q),
            out.data_ptr(),
            lse.data_ptr() if return_lse else 0,
            optional_address("sinks", scoring.sinks),
            optional_address("alibi_slopes", scoring.alibi_slopes),
            optional_address("tree_mask", scoring.tree_mask),
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
        DTYPES[query.dtype],
        DTYPES[key_cache.dtype],
        _isa,
        num_threads(),
    )
    return out, lse


def optional_address(name: str, tensor: torch.Tensor | None) -> int:
    """`address_of`, or 0 for a tensor that is not there."""
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
    extension.merge_attention(
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
        DTYPES[out_a.dtype],
        _isa,
        num_threads(),
    )
    return out, lse


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
    _run_codecs(extension.encode_blocks, blocks, block_ids, table, payloads, sums, is_good)


def decode_blocks(
    blocks: torch.Tensor,
    block_ids: torch.Tensor,
    table: torch.Tensor,
    payloads: torch.Tensor,
    sums: torch.Tensor,
    is_good: torch.Tensor,
) -> None:
    """The reverse of `encode_blocks`, for the layers whose bytes have their sums."""
    _run_codecs(extension.decode_blocks, blocks, block_ids, table, payloads, sums, is_good)


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
        [optional_address(*named) for named in zip(names, tensors, strict=True)],
        (
            *(blocks.stride(0) * blocks.itemsize, num_layers, num_planes, num_heads),
            *(block_size, head_dim, len(block_ids), payloads.stride(0)),
        ),
        DTYPES[blocks.dtype],
        _isa,
        num_threads(),
    )
