// What the codecs' kernels ask of AVX-512: sixteen numbers at a time. The other lanes give the same
// results under the same names.
#pragma once

#include <cstddef>
#include "cpu/simd_avx512.h"

namespace kvkernels {
namespace {

constexpr int64_t kLanes = 16;
using Floats = __m512;
using Words = __m512i;

inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
// 1 / v where v is above zero, else 0.
inline Floats inverse_of(Floats v) {
  const __mmask16 is_positive = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_maskz_div_ps(is_positive, _mm512_set1_ps(1.0f), v);
}

inline Floats load_floats(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
inline void store_floats(float* to, Floats v) { _mm512_storeu_ps(to, v); }

// float16 in the low half of each word.
inline Words half_nearest(Floats v) {
  return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Words half_below(Floats v) {
  return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
inline Floats from_half(Words half) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(half)); }

inline void store_pairs(uint16_t* to, Words first, Words second, int64_t count) {
  const Words both = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
  _mm512_mask_storeu_epi32(to, first_lanes(count), both);
}
inline void load_pairs(const uint16_t* from, int64_t count, Floats& first, Floats& second) {
  const Words both = _mm512_maskz_loadu_epi32(first_lanes(count), from);
  first = from_half(both);
  second = from_half(_mm512_srli_epi32(both, 16));
}

// Codes: the last bits of a float of this size count units.
template <int kBits>
inline Words code_at(Floats code, int part) {
  const Words bits = _mm512_castps_si512(_mm512_add_ps(code, _mm512_set1_ps(0x1.8p23f)));
  const Words low = _mm512_and_si512(bits, _mm512_set1_epi32((1 << kBits) - 1));
  return part == 0 ? low : _mm512_slli_epi32(low, kBits * part);
}
inline Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
inline Words no_words() { return _mm512_setzero_si512(); }
inline void store_bytes(uint8_t* to, Words v, int64_t count) {
  if (count >= kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v));
  } else {
    _mm_mask_storeu_epi8(to, first_lanes(count), _mm512_cvtepi32_epi8(v));
  }
}
inline Words load_bytes(const uint8_t* from, int64_t count) {
  if (count >= kLanes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), from));
}
template <int kBits>
inline Floats code_from(Words packed, int part) {
  const Words shifted = part == 0 ? packed : _mm512_srli_epi32(packed, kBits * part);
  if (kBits == 8) return _mm512_cvtepi32_ps(shifted);
  return _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32((1 << kBits) - 1)));
}
// low + scale * code; the product is exact.
inline Floats restore(Floats low, Floats scale, Floats code) {
  return _mm512_fmadd_ps(scale, code, low);
}

inline Words larger_magnitude(Words largest, Floats v) {
  return _mm512_max_epu32(largest,
                          _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}
inline uint32_t largest_lane(Words v) { return _mm512_reduce_max_epu32(v); }

// Lane i: the least, or the greatest, of the lanes of v[i].
inline Floats least_of_each(const Floats* v) {
  return combine_lanes_of_16(v, [](Floats a, Floats b) { return _mm512_min_ps(a, b); });
}
inline Floats greatest_of_each(const Floats* v) { return max_lanes_of_16(v); }

// Elements of the pool.
template <DType kType>
struct Elements;

template <typename E, int64_t kSize>
struct ElementsOf {
  static constexpr int64_t kBytes = kSize;
  static Floats read(const std::byte* from, int64_t count) {
    const auto* items = reinterpret_cast<const typename E::Item*>(from);
    return count >= kLanes ? E::load(items) : E::masked_load(items, first_lanes(count));
  }
  static void write(std::byte* to, Floats v, int64_t count) {
    E::store(reinterpret_cast<typename E::Item*>(to), v, first_lanes(count));
  }
};
template <>
struct Elements<DType::kFloat32> : ElementsOf<Float32, 4> {
  static Floats round(Floats v) { return v; }
};
template <>
struct Elements<DType::kFloat16> : ElementsOf<Float16, 2> {
  static Floats round(Floats v) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};
template <>
struct Elements<DType::kBFloat16> : ElementsOf<BFloat16, 2> {
  static Floats round(Floats v) {
    alignas(64) uint16_t bits[kLanes];
    BFloat16::store(bits, v, 0xffff);
    return BFloat16::load(bits);
  }
};

}  // namespace
}  // namespace kvkernels
