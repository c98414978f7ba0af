"""Attention over blocks of 8- and 4-bit codes; see `kvkernels.quantized_cache` for what they mean.

A tile's codes become float16 and go through the same products as floats do. One packed
multiply-add, half an instruction an element, turns a code into its value, rounded once. To fold
scales into queries and weights instead was the alternative: with the 16 rows that a product has at
least, and 32 tokens or channels that share a scale, that takes as many multiplications, rounds the
folded operand, and sends it through shared memory once a tile; with the 128 rows of a long prompt
it takes four times as many.

float16 serves bfloat16 queries too: codes, scales and minima are exact in it, and conversion to
bfloat16 would go through float32. A row of queries is divided by a power of two first, so that it
fits.
"""

# Kernels build tuples with `+`, which changes their type: Triton compiles no iterable unpacking.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from kvkernels.quantized_cache import KIND_SHIFT
from kvkernels.triton_kernels.pairs import load_key_pairs, load_value_pairs
from kvkernels.triton_kernels.parts import (
    at,
    end_of,
    first_of,
    join_parts,
    load_rows,
    split_parts,
    swap_parts,
    width_of,
)
from kvkernels.triton_kernels.tiles import add_values, advance, is_swapped, load_block_ids

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
BLOCK_MASK = tl.constexpr((1 << KIND_SHIFT) - 1)

# 0x6400 is 1024 in float16, whose last place is then 1: a code put there by bits is 1024 + code.
_EIGHT_BITS = tl.constexpr("""{
.reg .b32 magic;
mov.b32 magic, 0x64006400;
prmt.b32 $0, $2, magic, 0x5150;
prmt.b32 $1, $2, magic, 0x5352;
sub.f16x2 $0, $0, magic;
sub.f16x2 $1, $1, magic;
}""")
# The high half of a byte stays where it is, 16 times its worth: 0x2C00 is 1 / 16, 0xD400 is -64.
_FOUR_BITS = tl.constexpr("""{
.reg .b32 magic, sixteenth, offset, first, second;
mov.b32 magic, 0x64006400;
mov.b32 sixteenth, 0x2C002C00;
mov.b32 offset, 0xD400D400;
prmt.b32 first, $4, 0, 0x4140;
prmt.b32 second, $4, 0, 0x4342;
lop3.b32 $0, first, 0x000F000F, magic, 0xEA;
lop3.b32 $1, second, 0x000F000F, magic, 0xEA;
lop3.b32 $2, first, 0x00F000F0, magic, 0xEA;
lop3.b32 $3, second, 0x00F000F0, magic, 0xEA;
sub.f16x2 $0, $0, magic;
sub.f16x2 $1, $1, magic;
fma.rn.f16x2 $2, $2, sixteenth, offset;
fma.rn.f16x2 $3, $3, sixteenth, offset;
}""")


@triton.jit
def as_half(q, scale):
    """Queries as float16 where they are bfloat16, and the scale that makes up for it."""
    parts = q
    if q[0].dtype == tl.bfloat16:
        largest = tl.max(tl.abs(q[0].to(tl.float32)), 1)
        for i in tl.static_range(1, len(q)):
            largest = tl.maximum(largest, tl.max(tl.abs(q[i].to(tl.float32)), 1))
        # Only the exponent is used: multiplying by a power of two is exact.
        exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, 253)
        exponent = tl.where(exponent == 0, 127, exponent)
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        parts = ()
        for i in tl.static_range(len(q)):
            parts = parts + ((q[i].to(tl.float32) * factor[:, None]).to(tl.float16),)
        scale = scale * (exponent << 23).to(tl.float32, bitcast=True)
    return parts, scale


@triton.jit
def _split_words(words):
    """Scales and minima, float16, from words that hold one of each."""
    scales = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return scales, (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _dequantize(codes, scales, minima, dtype: tl.constexpr):
    if _INTERPRETED or dtype == tl.float32:  # numpy has no fused multiply-add
        values = codes.to(tl.float32) * scales.to(tl.float32) + minima.to(tl.float32)
    else:
        scales, minima = tl.broadcast_to(scales, codes.shape), tl.broadcast_to(minima, codes.shape)
        values = tl.fma(codes, scales, minima)
    return values.to(dtype)


@triton.jit
def _load_codes(
    base_ptr,
    offsets,
    keep,
    PARTS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    dtype: tl.constexpr,
    IS_PURE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Codes as floats, one tile a part. Of 4 bits, a part and the one after it share bytes.

    For `IS_PURE` see `load_parts`.
    """
    parts = ()
    for i in tl.static_range(0, len(PARTS), 8 // NUM_BITS):
        codes = load_rows(base_ptr, offsets, keep, PARTS, i, True, EVICTION)
        if NUM_BITS == 8:
            if _INTERPRETED or dtype == tl.float32:
                parts = parts + (codes.to(dtype),)
            else:
                whole = tl.inline_asm_elementwise(
                    _EIGHT_BITS, "=&r,=&r,r", [codes], tl.float16, is_pure=IS_PURE, pack=4
                )
                parts = parts + (whole,)
        else:
            if _INTERPRETED or dtype == tl.float32:
                parts = parts + ((codes & 15).to(dtype), (codes >> 4).to(dtype))
            else:
                low, high = tl.inline_asm_elementwise(
                    _FOUR_BITS,
                    "=&r,=&r,=&r,=&r,r",
                    [codes],
                    (tl.float16, tl.float16),
                    is_pure=IS_PURE,
                    pack=4,
                )
                parts = parts + (low, high)
    return parts


@triton.jit
def _load_keys(
    codes_ptr, codes_rows, words_ptr, keep,
    PARTS: tl.constexpr, NUM_BITS: tl.constexpr, dtype: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Keys of a tile whose tokens share scales: a word for each channel at `words_ptr`."""
    codes = _load_codes(codes_ptr, codes_rows, keep, PARTS, NUM_BITS, dtype, True, EVICTION)
    parts = ()
    for i in tl.static_range(len(PARTS)):
        channels = first_of(PARTS, i) + tl.arange(0, width_of(PARTS, i))
        words = tl.load(words_ptr + channels, mask=channels < end_of(PARTS, i), other=0)
        scales, minima = _split_words(words)
        parts = parts + (_dequantize(codes[i], scales[None, :], minima[None, :], dtype),)
    return parts


@triton.jit
def _load_values(
    codes_ptr, codes_rows, words_ptr, words_rows, keep,
    PARTS: tl.constexpr, GROUP: tl.constexpr, RUNS: tl.constexpr,
    NUM_BITS: tl.constexpr, dtype: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Values of a tile: a token has a word for each `GROUP` of its channels."""
    codes = _load_codes(codes_ptr, codes_rows, keep, PARTS, NUM_BITS, dtype, False, EVICTION)
    TILE_N: tl.constexpr = codes_rows.shape[0]
    parts = ()
    for i in tl.static_range(len(PARTS)):
        # RUNS[i] neighbouring channels always share a group, and divide the part evenly: one word
        # is loaded for each run and repeated.
        firsts = tl.arange(0, width_of(PARTS, i) // at(RUNS, i))
        firsts = first_of(PARTS, i) + at(RUNS, i) * firsts
        # Slots nobody sees may have scales of NaN, which a weight of zero would not silence.
        inside = keep[:, None] & (firsts < end_of(PARTS, i))[None, :]
        pointers = words_ptr + words_rows[:, None] + (firsts // GROUP)[None, :]
        words = tl.load(pointers, mask=inside, other=0, eviction_policy=EVICTION)
        if width_of(PARTS, i) > at(RUNS, i):
            words = tl.broadcast_to(
                words[:, :, None], [TILE_N, width_of(PARTS, i) // at(RUNS, i), at(RUNS, i)]
            )
            words = tl.reshape(words, [TILE_N, width_of(PARTS, i)])
        scales, minima = _split_words(words)
        parts = parts + (_dequantize(codes[i], scales, minima, dtype),)
    return parts


@triton.jit
def attend_codes(
    q,
    acc,
    row_max,
    row_sum,
    first_token,  # a multiple of the tile
    last_token,
    rows,
    lo,
    hi,
    scale,
    rules,
    cache,  # see `Call`
    kv_head,
    table_ptr,
    BLOCK_SIZE: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    LAYOUT: tl.constexpr,  # see `CodesLayout`
    NUM_BITS: tl.constexpr,
    RULES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """`attend` for tokens whose blocks are all of one quantised kind."""
    TILE_N: tl.constexpr = LAYOUT[0]
    KEY_TOKENS: tl.constexpr = LAYOUT[1]
    VALUE_CHANNELS: tl.constexpr = LAYOUT[2]
    KEY_DIM: tl.constexpr = LAYOUT[3]
    VALUE_DIM: tl.constexpr = LAYOUT[4]
    RUNS: tl.constexpr = LAYOUT[5]
    IN_PAIRS: tl.constexpr = LAYOUT[6]
    key_ptr = cache[0] + kv_head * cache[5]
    key_words_ptr = cache[1] + kv_head * cache[7]
    value_ptr = cache[2] + kv_head * cache[9]
    value_words_ptr = cache[3] + kv_head * cache[11]
    dtype: tl.constexpr = q[0].dtype
    if IN_PAIRS:
        q = split_parts(q)
        acc = split_parts(acc)
    IS_SWAPPED: tl.constexpr = is_swapped(q[0].shape[0])
    if IS_SWAPPED:
        q = swap_parts(q)
        acc = swap_parts(acc)
    first_tile = first_token // TILE_N
    last_tile = (last_token + TILE_N - 1) // TILE_N
    next_entry = load_block_ids(table_ptr, first_tile * TILE_N, lo, hi, BLOCK_SIZE, TILE_N)
    for tile in range(first_tile, last_tile):
        start = tile * TILE_N
        tokens = start + tl.arange(0, TILE_N)
        keep = (tokens >= lo) & (tokens < hi)
        block = (next_entry & BLOCK_MASK).to(tl.int64)
        next_entry = load_block_ids(table_ptr, start + TILE_N, lo, hi, BLOCK_SIZE, TILE_N)
        slot = start % BLOCK_SIZE
        slots = tokens % BLOCK_SIZE

        if IN_PAIRS:
            k = load_key_pairs(
                key_ptr + block * cache[4] + slot * (KEY_DIM * NUM_BITS // 16),
                key_words_ptr + block * cache[6] + slot // KEY_TOKENS * (KEY_DIM // 2),
                KEY_PARTS, KEY_DIM, NUM_BITS, TILE_N, dtype, EVICTION,
            )  # fmt: skip
        else:
            k = _load_keys(
                key_ptr,
                block * cache[4] + slots * (KEY_DIM * NUM_BITS // 8),
                key_words_ptr + block * cache[6] + slot // KEY_TOKENS * KEY_DIM,
                keep,
                KEY_PARTS,
                NUM_BITS,
                dtype,
                EVICTION,
            )
        p, acc, row_max, row_sum = advance(
            q, k, acc, row_max, row_sum, scale, rows, rules, tokens, True, RULES, IS_SWAPPED
        )
        if IN_PAIRS:
            v = load_value_pairs(
                value_ptr + block * cache[8] + slot * (VALUE_DIM * NUM_BITS // 16),
                value_words_ptr + block * cache[10] + slot * (VALUE_DIM // VALUE_CHANNELS),
                keep, VALUE_PARTS, VALUE_DIM, VALUE_CHANNELS, RUNS, NUM_BITS, TILE_N, dtype,
                EVICTION, IS_SWAPPED,
            )  # fmt: skip
        else:
            v = _load_values(
                value_ptr,
                block * cache[8] + slots * (VALUE_DIM * NUM_BITS // 8),
                value_words_ptr,
                block * cache[10] + slots * (VALUE_DIM // VALUE_CHANNELS),
                keep,
                VALUE_PARTS,
                VALUE_CHANNELS,
                RUNS,
                NUM_BITS,
                dtype,
                EVICTION,
            )
            if IS_SWAPPED:
                v = swap_parts(v)
        acc = add_values(p, v, acc, IS_SWAPPED)
    if IS_SWAPPED:
        acc = swap_parts(acc)
    if IN_PAIRS:
        acc = join_parts(acc)
    return acc, row_max, row_sum
