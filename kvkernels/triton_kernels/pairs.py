"""Tiles of codes loaded two bytes at a time, as the products of decode take them.

::

    bytes in memory        c0 c1 | c2 c3 | c4 c5 | ..
    a 16-bit word          a channel pair
    a register of a thread c0 c1 c2 c3  ->  (c0, c2) and (c1, c3), as float16

The instruction that loads a product's operand from shared memory, transposed for values, moves 16
bits at a time. So words go straight into the registers of the product and become floats there: even
channels in one tile and odd ones in another, each with a product of its own. Codes loaded byte by
byte would have to go back to shared memory as floats.

Tiles lie in one block, which is full, so codes are loaded without masks: addresses are the block's
plus what never changes from tile to tile.
"""

# Kernels build tuples with `+`, which changes their type: Triton compiles no iterable unpacking.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from kvkernels.triton_kernels.parts import at, end_of, first_of, width_of

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# 0x6400 is 1024 in float16, whose last place is then 1: a code put there by bits is 1024 + code.
_EIGHT_BITS = tl.constexpr("""{
.reg .b32 magic;
mov.b32 magic, 0x64006400;
prmt.b32 $0, $2, magic, 0x5250;
prmt.b32 $1, $2, magic, 0x5351;
sub.f16x2 $0, $0, magic;
sub.f16x2 $1, $1, magic;
}""")
# The high half of a byte stays where it is, 16 times its worth: 0x2C00 is 1 / 16, 0xD400 is -64.
_FOUR_BITS = tl.constexpr("""{
.reg .b32 magic, sixteenth, offset, odd;
mov.b32 magic, 0x64006400;
mov.b32 sixteenth, 0x2C002C00;
mov.b32 offset, 0xD400D400;
shr.u32 odd, $4, 8;
lop3.b32 $0, $4, 0x000F000F, magic, 0xEA;
lop3.b32 $1, odd, 0x000F000F, magic, 0xEA;
lop3.b32 $2, $4, 0x00F000F0, magic, 0xEA;
lop3.b32 $3, odd, 0x00F000F0, magic, 0xEA;
sub.f16x2 $0, $0, magic;
sub.f16x2 $1, $1, magic;
fma.rn.f16x2 $2, $2, sixteenth, offset;
fma.rn.f16x2 $3, $3, sixteenth, offset;
}""")


@triton.jit
def _load_words(
    base_ptr,
    PARTS: tl.constexpr,
    INDEX: tl.constexpr,  # of the part; codes from its end on are zero
    ROW_WORDS: tl.constexpr,
    TILE_N: tl.constexpr,
    EVICTION: tl.constexpr,
    AS_COLUMNS: tl.constexpr,
):
    """A part of a tile's codes, `[TILE_N, width / 2]`, or the other way around."""
    FIRST: tl.constexpr = first_of(PARTS, INDEX) // 2
    WIDTH: tl.constexpr = width_of(PARTS, INDEX) // 2
    END: tl.constexpr = end_of(PARTS, INDEX) // 2
    columns = tl.expand_dims(FIRST + tl.arange(0, WIDTH), 1 if AS_COLUMNS else 0)
    rows = tl.expand_dims(tl.arange(0, TILE_N) * ROW_WORDS, 0 if AS_COLUMNS else 1)
    pointers = base_ptr + (rows + columns)
    if FIRST + WIDTH > END:
        inside = (columns < END) & (rows >= 0)
        return tl.load(pointers, mask=inside, other=0, eviction_policy=EVICTION)
    return tl.load(pointers, eviction_policy=EVICTION)


@triton.jit
def _load_codes(
    base_ptr,  # of the tile's first token, int16
    PARTS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    TILE_N: tl.constexpr,
    dtype: tl.constexpr,
    EVICTION: tl.constexpr,
    AS_COLUMNS: tl.constexpr,
):
    """Codes as floats, in the order of `split_parts`."""
    pairs = ()
    for i in tl.static_range(0, len(PARTS), 8 // NUM_BITS):
        # 4-bit codes: one load holds this part (low halves of the bytes) and the next (high
        # halves).
        words = _load_words(base_ptr, PARTS, i, ROW_WORDS, TILE_N, EVICTION, AS_COLUMNS)
        if _INTERPRETED or dtype == tl.float32:
            bits = words.to(tl.int32)
            if NUM_BITS == 8:
                pairs = pairs + ((bits & 0xFF).to(dtype), ((bits >> 8) & 0xFF).to(dtype))
            else:
                pairs = pairs + ((bits & 15).to(dtype), ((bits >> 8) & 15).to(dtype))
                pairs = pairs + (((bits >> 4) & 15).to(dtype), ((bits >> 12) & 15).to(dtype))
        elif NUM_BITS == 8:
            even, odd = tl.inline_asm_elementwise(
                _EIGHT_BITS, "=&r,=&r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2
            )
            pairs = pairs + (even, odd)
        else:
            low_even, low_odd, high_even, high_odd = tl.inline_asm_elementwise(
                _FOUR_BITS,
                "=&r,=&r,=&r,=&r,r",
                [words],
                (tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
            pairs = pairs + (low_even, low_odd, high_even, high_odd)
    return pairs


@triton.jit
def _split_words(words, dtype: tl.constexpr):
    """Scales and minima, float16, from words that hold one of each."""
    if _INTERPRETED or dtype == tl.float32:
        scales = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        minima = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        scales, minima = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=&r,=&r,r,r",
            [words],
            (tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return scales, minima


@triton.jit
def _dequantize(codes, scales, minima, dtype: tl.constexpr):
    """`minima + scales * codes`, rounded once."""
    if _INTERPRETED or dtype == tl.float32:  # numpy has no fused multiply-add
        values = codes.to(tl.float32) * scales.to(tl.float32) + minima.to(tl.float32)
    else:
        scales, minima = tl.broadcast_to(scales, codes.shape), tl.broadcast_to(minima, codes.shape)
        values = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [codes, scales, minima],
            tl.float16,
            is_pure=True,
            pack=2,
        )
    return values.to(dtype)


@triton.jit
def _repeat(words, NUM_TIMES: tl.constexpr, AS_COLUMNS: tl.constexpr):
    """Each word so many times in a row, or one below another."""
    FIRST: tl.constexpr = words.shape[0]
    SECOND: tl.constexpr = words.shape[1]
    if AS_COLUMNS:
        words = tl.broadcast_to(words[:, None, :], [FIRST, NUM_TIMES, SECOND])
        words = tl.reshape(words, [FIRST * NUM_TIMES, SECOND])
    else:
        words = tl.broadcast_to(words[:, :, None], [FIRST, SECOND, NUM_TIMES])
        words = tl.reshape(words, [FIRST, SECOND * NUM_TIMES])
    return words


@triton.jit
def load_key_pairs(
    codes_ptr,  # of the tile's first token, int16
    words_ptr,  # int64: scale and minimum of an even channel, then of the odd one after it
    PARTS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    NUM_BITS: tl.constexpr,
    TILE_N: tl.constexpr,
    dtype: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Keys of a tile whose tokens share scales, in the order of `split_parts`."""
    codes = _load_codes(
        codes_ptr, PARTS, KEY_DIM * NUM_BITS // 16, NUM_BITS, TILE_N, dtype, EVICTION, False
    )
    pairs = ()
    for i in tl.static_range(len(PARTS)):
        columns = first_of(PARTS, i) // 2 + tl.arange(0, width_of(PARTS, i) // 2)
        words = tl.load(words_ptr + columns, mask=columns < end_of(PARTS, i) // 2, other=0)
        scales, minima = _split_words(words.to(tl.int32), dtype)
        even = _dequantize(codes[2 * i], scales[None, :], minima[None, :], dtype)
        scales, minima = _split_words((words >> 32).to(tl.int32), dtype)
        odd = _dequantize(codes[2 * i + 1], scales[None, :], minima[None, :], dtype)
        pairs = pairs + (even, odd)
    return pairs


@triton.jit
def load_value_pairs(
    codes_ptr,  # of the tile's first token, int16
    words_ptr,  # of the tile's first token, int32
    keep,  # [TILE_N]
    PARTS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,  # channels that share a word
    RUNS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    TILE_N: tl.constexpr,
    dtype: tl.constexpr,
    EVICTION: tl.constexpr,
    AS_COLUMNS: tl.constexpr,  # [width / 2, TILE_N] instead of [TILE_N, width / 2]
):
    """Values of a tile, in the order of `split_parts`."""
    codes = _load_codes(
        codes_ptr, PARTS, VALUE_DIM * NUM_BITS // 16, NUM_BITS, TILE_N, dtype, EVICTION, AS_COLUMNS
    )
    rows = tl.expand_dims(tl.arange(0, TILE_N) * (VALUE_DIM // GROUP), 0 if AS_COLUMNS else 1)
    # Slots nobody sees may have scales of NaN, which a weight of zero would not silence.
    keep = tl.expand_dims(keep, 0 if AS_COLUMNS else 1)
    pairs = ()
    for i in tl.static_range(len(PARTS)):
        # RUNS[i] neighbouring channels always share a group, and divide the part evenly: one word
        # is loaded for each run and repeated.
        firsts = tl.arange(0, width_of(PARTS, i) // at(RUNS, i))
        firsts = first_of(PARTS, i) + at(RUNS, i) * firsts
        firsts = tl.expand_dims(firsts, 1 if AS_COLUMNS else 0)
        inside = keep & (firsts < end_of(PARTS, i))
        pointers = words_ptr + (rows + firsts // GROUP)
        words = tl.load(pointers, mask=inside, other=0, eviction_policy=EVICTION)
        if width_of(PARTS, i) > at(RUNS, i):
            words = _repeat(words, at(RUNS, i) // 2, AS_COLUMNS)
        scales, minima = _split_words(words, dtype)
        pairs = pairs + (
            _dequantize(codes[2 * i], scales, minima, dtype),
            _dequantize(codes[2 * i + 1], scales, minima, dtype),
        )
    return pairs
