"""Attention over a stretch of a sequence whose blocks may be of several kinds.

The stretch is taken in runs of blocks of one kind, so that each kind has a loop of its own, with
its own tile and its loads in flight::

    kinds   [ int4 int4 int4 int4 | int8 int8 | float float float ]
    loops     a                     b           c
"""

import triton
import triton.language as tl

from kvkernels.quantized_cache import KIND_SHIFT, KINDS
from kvkernels.triton_kernels.quantized import as_half, attend_codes
from kvkernels.triton_kernels.tiles import attend, select_head

_SHIFT = tl.constexpr(KIND_SHIFT)
_FLOAT = tl.constexpr(KINDS["float"])
_INT8 = tl.constexpr(KINDS["int8"])
_ENTRIES = tl.constexpr(128)


@triton.jit
def _find_run(table_ptr, first, last, BLOCK_SIZE: tl.constexpr):
    """Kind of the block that holds token `first`, and the end of the run of such blocks.

    A run ends at `last`, and after as many table entries as one load looks at.
    """
    first_block = first // BLOCK_SIZE
    kind = tl.load(table_ptr + first_block) >> _SHIFT
    blocks = first_block + tl.arange(0, _ENTRIES)
    entries = tl.load(table_ptr + blocks, mask=blocks * BLOCK_SIZE < last, other=0)
    others = tl.where((entries >> _SHIFT) == kind, first_block + _ENTRIES, blocks)
    return kind, tl.minimum(tl.min(others) * BLOCK_SIZE, last)


@triton.jit
def attend_cache(
    q,
    acc,
    row_max,
    row_sum,
    first_tile,
    last_tile,
    rows,
    lo,
    hi,
    scale,
    rules,
    float_cache,
    int8_cache,  # None for none
    int4_cache,
    kv_head,  # int64
    table_ptr,
    BLOCK_SIZE: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    IS_LATENT: tl.constexpr,
    HAS_FLOAT8: tl.constexpr,
    INT8_LAYOUT: tl.constexpr,  # see `CodesLayout`
    INT4_LAYOUT: tl.constexpr,
    TILE_N: tl.constexpr,
    FLOAT_TILE_N: tl.constexpr,  # of floats among codes
    MASKED: tl.constexpr,
    RULES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """`attend`, for blocks of every kind of which there is a cache."""
    cache = select_head(float_cache, kv_head)
    float_q = q
    float_scale = scale
    half_q, half_scale = as_half(q, scale)
    # float8 is loaded as bytes and converted to float16, as codes are, which holds it exactly.
    if cache[0].dtype.element_ty == tl.uint8 or cache[0].dtype.element_ty == tl.int16:
        float_q = half_q
        float_scale = half_scale
    if int8_cache is None and int4_cache is None:
        acc, row_max, row_sum = attend(
            float_q, acc, row_max, row_sum, first_tile, last_tile, rows, lo, hi, float_scale,
            rules, cache, table_ptr, BLOCK_SIZE, KEY_PARTS, VALUE_PARTS, IS_LATENT, HAS_FLOAT8,
            TILE_N, MASKED, RULES, EVICTION,
        )  # fmt: skip
    else:
        # Masked throughout: masks cost little beside decoding codes, and a second, unmasked loop
        # for each kind would double the kernel.
        token = first_tile * TILE_N
        last = tl.minimum(last_tile * TILE_N, hi)
        while token < last:
            kind, end = _find_run(table_ptr, token, last, BLOCK_SIZE)
            if kind == _FLOAT:
                acc, row_max, row_sum = attend(
                    float_q, acc, row_max, row_sum, token // FLOAT_TILE_N,
                    (end + FLOAT_TILE_N - 1) // FLOAT_TILE_N, rows, lo, hi, float_scale, rules,
                    cache, table_ptr, BLOCK_SIZE, KEY_PARTS, VALUE_PARTS, IS_LATENT, HAS_FLOAT8,
                    FLOAT_TILE_N, True, RULES, EVICTION,
                )  # fmt: skip
            elif kind == _INT8:
                if int8_cache is not None:
                    acc, row_max, row_sum = attend_codes(
                        half_q, acc, row_max, row_sum, token, end, rows, lo, hi, half_scale, rules,
                        int8_cache, kv_head, table_ptr, BLOCK_SIZE, KEY_PARTS, VALUE_PARTS,
                        INT8_LAYOUT, 8, RULES, EVICTION,
                    )  # fmt: skip
            else:
                if int4_cache is not None:
                    acc, row_max, row_sum = attend_codes(
                        half_q, acc, row_max, row_sum, token, end, rows, lo, hi, half_scale, rules,
                        int4_cache, kv_head, table_ptr, BLOCK_SIZE, KEY_PARTS, VALUE_PARTS,
                        INT4_LAYOUT, 4, RULES, EVICTION,
                    )  # fmt: skip
            token = end
    return acc, row_max, row_sum
