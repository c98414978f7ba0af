"""float8_e4m3fn as float16, in which it is exact; loaded as bytes, or as pairs of them."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_FLOAT8 = tl.constexpr("""{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}""")
# For Ampere, by shifting the bits into a float16. Its exponent's bias is 15 instead of 7, so the
# number comes out 256 times too small and is multiplied. The one NaN, all bits set, would become a
# number: of all numbers it alone overflows when multiplied by 36000 (0x7865), and infinity times 0
# is a NaN, which is added.
_FLOAT8_BY_BITS = tl.constexpr("""{
.reg .b32 low, high, sign, test, factor, most, zero;
mov.b32 factor, 0x5C005C00;
mov.b32 most, 0x78657865;
mov.b32 zero, 0;
prmt.b32 low, $2, 0, 0x1404;
prmt.b32 high, $2, 0, 0x3424;
and.b32 sign, low, 0x80008000;
and.b32 low, low, 0x7F007F00;
shr.u32 low, low, 1;
or.b32 low, low, sign;
mul.f16x2 test, low, most;
mul.f16x2 test, test, zero;
fma.rn.f16x2 $0, low, factor, test;
and.b32 sign, high, 0x80008000;
and.b32 high, high, 0x7F007F00;
shr.u32 high, high, 1;
or.b32 high, high, sign;
mul.f16x2 test, high, most;
mul.f16x2 test, test, zero;
fma.rn.f16x2 $1, high, factor, test;
}""")


# Even channels, then odd ones; see `pairs`.
_FLOAT8_PAIRS = tl.constexpr("""{
.reg .b32 sorted;
.reg .b16 even, odd;
prmt.b32 sorted, $2, 0, 0x3120;
mov.b32 {even, odd}, sorted;
cvt.rn.f16x2.e4m3x2 $0, even;
cvt.rn.f16x2.e4m3x2 $1, odd;
}""")


@triton.jit
def from_float8(bits, dtype: tl.constexpr, HAS_FLOAT8: tl.constexpr, IS_PURE: tl.constexpr):
    """float8_e4m3fn, given as bytes, by way of float16, in which it is exact."""
    if _INTERPRETED:
        magnitude = (bits & 0x7F).to(tl.int16)
        half = (magnitude << 7).to(tl.float16, bitcast=True) * 256.0
        half = tl.where(magnitude == 0x7F, float("nan"), half).to(tl.float16)
        half = tl.where(bits >= 0x80, -half, half)
    elif HAS_FLOAT8:
        half = tl.inline_asm_elementwise(
            _FLOAT8, "=&r,=&r,r", [bits], tl.float16, is_pure=IS_PURE, pack=4
        )
    else:
        half = tl.inline_asm_elementwise(
            _FLOAT8_BY_BITS, "=&r,=&r,r", [bits], tl.float16, is_pure=IS_PURE, pack=4
        )
    return half.to(dtype)


@triton.jit
def from_float8_pairs(words, dtype: tl.constexpr):
    """float8_e4m3fn, given as words of two: the even channels and the odd ones."""
    if _INTERPRETED:
        even = from_float8((words & 0xFF).to(tl.uint8), dtype, True, True)
        odd = from_float8(((words >> 8) & 0xFF).to(tl.uint8), dtype, True, True)
    else:
        even, odd = tl.inline_asm_elementwise(
            _FLOAT8_PAIRS, "=&r,=&r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2
        )
    return even.to(dtype), odd.to(dtype)
