// Scalar conversions and powers that a compiler can turn into vectors of any width. All static,
// because files compiled for different instruction sets include this.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvkernels {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kInfinity = __builtin_inff();

// Coefficients of 2^f for f in [-0.5, 0.5], minimax. Relative error: 2e-9 with degree 6; with
// degree 4, for results that are rounded to 16 bits, 3e-6: a hundredth of what float16 rounds off.
template <int kDegree>
constexpr float kExp2Poly[kDegree + 1] = {};
template <>
constexpr float kExp2Poly<4>[] = {1.0f, 6.9312417507e-01f, 2.4024099112e-01f, 5.5906426162e-02f,
                                  9.5828529447e-03f};
template <>
constexpr float kExp2Poly<6>[] = {1.0f,
                                  6.9314720574e-01f,
                                  2.4022646890e-01f,
                                  5.5503287772e-02f,
                                  9.6184889937e-03f,
                                  1.3399931140e-03f,
                                  1.5345802159e-04f};

static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  return static_cast<uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16);
}

// x = n + rest, where n is the nearest integer: power is 2^n. x must lie in [-126, 0].
struct SplitExponent {
  float power, rest;
};

static inline SplitExponent split_exponent(float x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const float shifted = x + 12582912.0f;
  const uint32_t exponent = bits_from_float(shifted) - bits_from_float(12582912.0f) + 127;
  return {float_from_bits(exponent << 23), x - (shifted - 12582912.0f)};
}

// 2^x for x <= 0, minus infinity included; NaN stays NaN. Results below 2^-126 are 0.
static inline float exp2_scalar(float x) {
  const auto [power, rest] = split_exponent(x > -126.0f ? x : -126.0f);
  float poly = kExp2Poly<6>[6];
  for (int i = 5; i >= 0; --i) poly = poly * rest + kExp2Poly<6>[i];
  const float value = x < -126.0f ? 0.0f : poly * power;
  return x != x ? x : value;
}

// 1 - 2^x for x <= 0, minus infinity included; NaN stays NaN. Exact to the last places also where
// 2^x is almost 1.
static inline float one_minus_exp2(float x) {
  const auto [power, rest] = split_exponent(x > -126.0f ? x : -126.0f);
  float poly = kExp2Poly<6>[6];
  for (int i = 5; i >= 1; --i) poly = poly * rest + kExp2Poly<6>[i];
  const float value = (1.0f - power) - power * (poly * rest);
  return x != x ? x : value;
}

}  // namespace kvkernels
