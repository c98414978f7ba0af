// Floats of 32, 16 and 8 bits in plain C++. In an anonymous namespace: each file that includes this
// gets its own copy, compiled with that file's flags.
#pragma once

#include "cpu/float_bits.h"

namespace kvkernels {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// e4m3fn: has no infinities; NaN has all bits of exponent and mantissa set.
struct Float8 {
  uint8_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  if (value.bits & 0x7c00) {
    const bool is_special = (value.bits & 0x7c00) == 0x7c00;  // infinity or not a number
    return float_from_bits(sign |
                           (magnitude + (is_special ? (255u - 31) << 23 : (127u - 15) << 23)));
  }
  // Subnormal: put into the low bits of a float whose last bit counts 2^-24; that float's base is
  // subtracted again.
  const float base = float_from_bits((127u - 14) << 23);
  return float_from_bits(sign |
                         bits_from_float(float_from_bits(((127u - 14) << 23) + magnitude) - base));
}

inline void from_float(float value, float& out) { out = value; }

inline void from_float(float value, BFloat16& out) { out.bits = bfloat16_from_float(value); }

inline void from_float(float value, Float16& out) {
  const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds past the largest finite value, 65504
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the adder rounds to a multiple of 2^-24
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
  } else {
    half = (magnitude - ((127u - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000));
}

inline float to_float(Float8 value) {
  const uint32_t magnitude = value.bits & 0x7f;
  float result = __builtin_nanf("");
  if (magnitude < 8) {  // subnormal
    result = static_cast<float>(magnitude) * 0x1p-9f;
  } else if (magnitude < 0x7f) {
    result = float_from_bits((magnitude << 20) + ((127u - 7) << 23));
  }
  return value.bits & 0x80 ? -result : result;
}

}  // namespace
}  // namespace kvkernels
