"""Calls on tensors without storage: enough to plan launches, and so to compile, with no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvkernels.codecs import BlockFormat
from kvkernels.layout import KVLayout
from kvkernels.quantized_cache import QuantizedCache
from kvkernels.scoring import Scoring
from kvkernels.triton_kernels import codecs_plan
from kvkernels.triton_kernels.calls import Call
from kvkernels.triton_kernels.codecs_work import Work
from kvkernels.triton_kernels.decode import plan_decode
from kvkernels.triton_kernels.kv_cache import plan_store_kv
from kvkernels.triton_kernels.launch import Device, Launch
from kvkernels.triton_kernels.merge import plan_merge
from kvkernels.triton_kernels.prefill import plan_prefill

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MAX_BLOCKS = 4096


@dataclass(frozen=True)
class Shape:
    """One call: of store_kv, merge, attention as decode or prefill, or of a codec.

    Attributes:
        op: See above.
        dtype: A name in `DTYPES`.
        head_dim: Width of a key.
        value_dim: Width of a value that is a view of the key, if not wider, or of a codec's latent;
            0 where it is like the key.
        block_size: Tokens in a block.
        group: Query heads to a key-value head.
        num_kv_heads: Key-value heads.
        num_queries: Queries a sequence, which pick the prefill kernel's tile.
        num_seqs: Sequences, of which many leave decode a single split.
        window: 0 for none.
        kinds: Of quantised blocks beside those of floats: "int8" or "int4" or both.
        is_float8: Whether the floats are float8.
        rules: Of "soft_cap", "sinks", "alibi", "tree".
        has_lse: Whether the log-sum-exp is asked for.
        batch_invariant: Whether the batch must not matter.
        codec: Of encode_blocks and decode_blocks.
    """

    op: str
    dtype: str
    head_dim: int
    value_dim: int = 0
    block_size: int = 64
    group: int = 4
    num_kv_heads: int = 2
    num_queries: int = 1
    num_seqs: int = 1
    window: int = 0
    kinds: tuple[str, ...] = ()
    is_float8: bool = False
    rules: tuple[str, ...] = ()
    has_lse: bool = True
    batch_invariant: bool = False
    codec: str = ""

    def __str__(self) -> str:
        text = f"{self.op} {self.dtype} d{self.head_dim}"
        if self.value_dim:
            text += f"/{self.value_dim}"
        if self.op in ("decode", "prefill"):
            text += f" block {self.block_size} group {self.group}"
        if self.codec:
            text += f" block {self.block_size} {self.codec}"
        if self.op == "prefill":
            text += f" queries {self.num_queries}"
        if self.num_seqs > 1:
            text += f" seqs {self.num_seqs}"
        kinds = (*(("float8",) if self.is_float8 else ()), *self.kinds)
        return " ".join([text, *kinds, *self.rules, *(("window",) if self.window else ())])


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _quantized(shape: Shape, kind: str) -> QuantizedCache | None:
    """Views of blocks as `QuantizedPool` lays them out, with a distance that fits all parts."""
    if kind not in shape.kinds:
        return None
    size, width = shape.block_size, shape.head_dim
    value_dim = shape.value_dim or width
    tokens = size if kind == "int8" else math.gcd(size, 32)
    channels = value_dim if kind == "int8" else math.gcd(value_dim, 32)
    codes_per_byte = 1 if kind == "int8" else 2

    def part(*dims: int, dtype: torch.dtype) -> torch.Tensor:
        block = _empty(_MAX_BLOCKS, 1 << 20, dtype=dtype)
        return block[:, : math.prod(dims)].unflatten(1, dims)

    heads = shape.num_kv_heads
    return QuantizedCache(
        part(heads, size, width // codes_per_byte, dtype=torch.uint8),
        part(heads, size // tokens, width, 2, dtype=torch.float16),
        part(heads, size, value_dim // codes_per_byte, dtype=torch.uint8),
        part(heads, size, value_dim // channels, 2, dtype=torch.float16),
    )


def _scoring(shape: Shape, num_tokens: int, num_heads: int) -> Scoring:
    return Scoring(
        1.0,
        True,
        shape.window,
        30.0 if "soft_cap" in shape.rules else 0.0,
        _empty(num_heads, dtype=torch.float32) if "sinks" in shape.rules else None,
        _empty(num_heads, dtype=torch.float32) if "alibi" in shape.rules else None,
        _empty(num_tokens, dtype=torch.int32) if "tree" in shape.rules else None,
    )


def plan(shape: Shape, device: Device) -> list[Launch]:
    """The launches of a call."""
    if shape.codec:
        return _plan_codec(shape, device)
    call = make_call(shape)
    num_tokens, num_heads, _ = call.query.shape
    lse = _empty(num_tokens if shape.has_lse else 0, num_heads, dtype=torch.float32)
    out = _empty(num_tokens, num_heads, call.value_dim, dtype=call.query.dtype)
    if shape.op == "store_kv":
        key = call.query[:, : shape.num_kv_heads].contiguous()
        slots = _empty(num_tokens, dtype=torch.int64)
        return plan_store_kv(key, key, call.key_cache, call.value_cache, slots)
    if shape.op == "merge":
        return plan_merge(out, lse, out, lse, out, lse)
    plan_attention = plan_decode if call.cu_seqlens_q is None else plan_prefill
    return plan_attention(call, out, lse, device)


def make_call(shape: Shape) -> Call:
    """A call of attention, as decode where that is its op."""
    dtype = DTYPES[shape.dtype]
    num_tokens, num_heads = shape.num_seqs * shape.num_queries, shape.num_kv_heads * shape.group
    cache_dtype = torch.float8_e4m3fn if shape.is_float8 else dtype
    # Keys and values of a block lie one after another, as in a pool.
    width = max(shape.head_dim, shape.value_dim)
    pool = _empty(*(_MAX_BLOCKS, 2, shape.num_kv_heads, shape.block_size, width), dtype=cache_dtype)
    key_cache, value_cache = pool.unbind(1)
    if shape.value_dim > shape.head_dim:
        key_cache = key_cache[..., : shape.head_dim]
    elif shape.value_dim:
        value_cache = key_cache[..., : shape.value_dim]
    return Call(
        _empty(num_tokens, num_heads, shape.head_dim, dtype=dtype),
        key_cache,
        value_cache,
        _empty(shape.num_seqs, _MAX_BLOCKS, dtype=torch.int32),
        _empty(shape.num_seqs, dtype=torch.int32),
        None if shape.op == "decode" else _empty(shape.num_seqs + 1, dtype=torch.int32),
        _scoring(shape, num_tokens, num_heads),
        _quantized(shape, "int8"),
        _quantized(shape, "int4"),
        shape.batch_invariant,
    )


def _plan_codec(shape: Shape, device: Device) -> list[Launch]:
    """The launches of a call; those for blocks that are raw in spite of the codec, with "raw"."""
    layout = KVLayout(
        2,
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
        DTYPES[shape.dtype],
        shape.value_dim or None,
    )
    block_format = BlockFormat(layout, shape.codec)
    num_rows = 64
    work = Work(
        _empty(_MAX_BLOCKS, *layout.block_shape, dtype=layout.dtype),
        _empty(num_rows, dtype=torch.int64),
        block_format,
        _empty(num_rows, block_format.payload_bytes, dtype=torch.uint8),
        _empty(num_rows, dtype=torch.bool),
        device,
        None,
    )
    sums = _empty(num_rows, layout.num_layers, 2, dtype=torch.int64)
    is_good = _empty(num_rows, layout.num_layers, dtype=torch.bool)
    if shape.op == "decode_blocks":
        return codecs_plan.plan_sums(work, sums) + codecs_plan.plan_decode(work, is_good)
    launches = codecs_plan.plan_encode(work, sums)
    if shape.codec == "raw":
        launches += codecs_plan.plan_encode_raw(work, sums)
    return launches
