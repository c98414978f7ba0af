// The lanes of the codecs' kernels for AVX-512: sixteen numbers at a time. The other
// codec_lanes_*.h have functions of the same names with the same results.
#pragma once

#include <cstddef>

#include "cpu/simd_avx512.h"
#include "kvkernels/attention.h"

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

// a where the magnitude of `test` is below float16's normal numbers, else b.
inline Floats where_small(Floats test, Floats a, Floats b) {
  const __mmask16 is_small =
      _mm512_cmp_ps_mask(_mm512_abs_ps(test), _mm512_set1_ps(0x1p-14f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(b, is_small, a);
}
// Whether some lane of either is nonzero and small: below float16's normal numbers or a little
// above.
inline bool any_small(Floats a, Floats b) {
  const auto less_one = [](Floats v) {  // zero wraps around to the largest
    return _mm512_sub_epi32(_mm512_castps_si512(_mm512_abs_ps(v)), _mm512_set1_epi32(1));
  };
  const Words least = _mm512_min_epu32(less_one(a), less_one(b));
  return _mm512_cmplt_epu32_mask(least, _mm512_castps_si512(all(0x1.1p-14f))) != 0;
}

inline Floats load_floats(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
inline void store_floats(float* to, Floats v) { _mm512_storeu_ps(to, v); }

// float16 in the low half of each word: to the nearest, or rounded down.
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

// The nearest integer to a code that is not negative, ties to even, shifted to its part of a byte;
// with 8 bits not yet bounded.
template <int kBits>
inline Words code_at(Floats code, int part) {
  if (kBits == 8) return _mm512_cvtps_epi32(code);  // `store_bytes` saturates
  const Words nearest = _mm512_cvtps_epi32(_mm512_min_ps(code, _mm512_set1_ps((1 << kBits) - 1)));
  return part == 0 ? nearest : _mm512_slli_epi32(nearest, kBits * part);
}
inline Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
inline Words no_words() { return _mm512_setzero_si512(); }
inline void store_bytes(uint8_t* to, Words v, int64_t count) {
  if (count >= kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(v));
  } else {
    _mm_mask_storeu_epi8(to, first_lanes(count), _mm512_cvtusepi32_epi8(v));
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

// Lane i of the result is the least, or the greatest, of the lanes of v[i].
inline Floats least_of_each(const Floats* v) {
  return combine_lanes_of_16(v, [](Floats a, Floats b) { return _mm512_min_ps(a, b); });
}
inline Floats greatest_of_each(const Floats* v) { return max_lanes_of_16(v); }

// Sixteen 16-bit floats as integers of the same order: half the width of floats, and a NaN lies
// beyond all numbers.
using Ordered = __m256i;

// To that order and back, being its own inverse: flips all bits but the sign of negative numbers.
inline Ordered order(__m256i bits) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  return _mm256_ternarylogic_epi64(bits, _mm256_srai_epi16(bits, 15), magnitude, 0x78);
}
inline __m512i order(__m512i bits) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  return _mm512_ternarylogic_epi64(bits, _mm512_srai_epi16(bits, 15), magnitude, 0x78);
}

template <typename Combine>
inline Ordered combine_each(const Ordered* v, const Combine& combine) {
  Ordered pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i) {
    pairs[i] = combine(_mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]),
                       _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    fours[i] = combine(_mm256_unpacklo_epi32(pairs[2 * i], pairs[2 * i + 1]),
                       _mm256_unpackhi_epi32(pairs[2 * i], pairs[2 * i + 1]));
  }
  for (int i = 0; i < 2; ++i) {
    eights[i] = combine(_mm256_unpacklo_epi64(fours[2 * i], fours[2 * i + 1]),
                        _mm256_unpackhi_epi64(fours[2 * i], fours[2 * i + 1]));
  }
  return combine(_mm256_permute2x128_si256(eights[0], eights[1], 0x20),
                 _mm256_permute2x128_si256(eights[0], eights[1], 0x31));
}
inline Ordered least_of_each(const Ordered* v) {
  return combine_each(v, [](Ordered a, Ordered b) { return _mm256_min_epi16(a, b); });
}
inline Ordered greatest_of_each(const Ordered* v) {
  return combine_each(v, [](Ordered a, Ordered b) { return _mm256_max_epi16(a, b); });
}

inline void stream(std::byte* to, __m512i line) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
}

// The dtype of the pool's elements.
template <DType kType>
struct Elements;

template <typename E, int64_t kSize>
struct ElementsOf {
  static constexpr int64_t kBytes = kSize;
  static constexpr bool kHasPairs =
      kSize == 2;  // whether two vectors can be read together, see Elements16
  static constexpr int kLineVectors = 64 / (kLanes * kSize);  // vectors that make a cache line
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
  static void stream_line(std::byte* to, const Floats* v) { stream(to, _mm512_castps_si512(v[0])); }

  // The type in which minima and maxima are found, and whether they show every NaN.
  using Range = Floats;
  static constexpr bool kRangesSeeAll = false;
  static Range read_range(const std::byte* from, int64_t count) { return read(from, count); }
  static Range least(Range a, Range b) { return min(a, b); }
  static Range greatest(Range a, Range b) { return max(a, b); }
  // Lanes from `count` on repeat the first.
  static Range repeat_first(Range v, int64_t count) {
    return _mm512_mask_mov_ps(_mm512_broadcastss_ps(_mm512_castps512_ps128(v)), first_lanes(count),
                              v);
  }
  static Floats floats(Range v) { return v; }
};

template <typename E>
struct Elements16 : ElementsOf<E, 2> {
  // Two vectors at a time. Ranges of them are found in the order of memory, numbers come in the
  // order of `load_pair`.
  using PairRange = __m512i;
  static PairRange read_pair_range(const std::byte* from) {
    return order(_mm512_loadu_si512(from));
  }
  static PairRange least(PairRange a, PairRange b) { return _mm512_min_epi16(a, b); }
  static PairRange greatest(PairRange a, PairRange b) { return _mm512_max_epi16(a, b); }
  static Ordered first_half(PairRange v) { return _mm512_castsi512_si256(v); }
  static Ordered last_half(PairRange v) { return _mm512_extracti64x4_epi64(v, 1); }
  static void read_pair(const std::byte* from, Floats& a, Floats& b) {
    E::load_pair(reinterpret_cast<const uint16_t*>(from), a, b);
  }
  static void arrange(Floats& a, Floats& b) { E::arrange(a, b); }
  static void store_codes(uint8_t* to, Words a, Words b) {
    store_bytes(to, a, kLanes);
    store_bytes(to + kLanes, b, kLanes);
  }

  static void stream_line(std::byte* to, const Floats* v) {
    alignas(64) uint16_t items[2 * kLanes];
    E::store(items, v[0], 0xffff);
    E::store(items + kLanes, v[1], 0xffff);
    stream(to, _mm512_load_si512(items));
  }

  using Range = Ordered;
  static constexpr bool kRangesSeeAll = true;
  static Range read_range(const std::byte* from, int64_t count) {
    if (count < kLanes) return order(_mm256_maskz_loadu_epi16(first_lanes(count), from));
    return order(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Range least(Range a, Range b) { return _mm256_min_epi16(a, b); }
  static Range greatest(Range a, Range b) { return _mm256_max_epi16(a, b); }
  static Range repeat_first(Range v, int64_t count) {
    return _mm256_mask_mov_epi16(_mm256_broadcastw_epi16(_mm256_castsi256_si128(v)),
                                 first_lanes(count), v);
  }
  static Floats floats(Range v) { return E::widen(order(v)); }
};
template <>
struct Elements<DType::kFloat16> : Elements16<Float16> {
  static Floats round(Floats v) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};
template <>
struct Elements<DType::kBFloat16> : Elements16<BFloat16> {
  // a holds the codes at even indices, b those at odd ones.
  static void store_codes(uint8_t* to, Words a, Words b) {
    const Words words = either(a, _mm512_slli_epi32(b, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtusepi16_epi8(words));
  }

#if defined(__AVX512BF16__)
  // The instruction takes numbers below float32's normal ones for zero. Codes restore none of
  // those: all restored numbers are multiples of float16's smallest.
  static void write(std::byte* to, Floats v, int64_t count) {
    const auto bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
    if (count >= kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
    } else {
      _mm256_mask_storeu_epi16(to, first_lanes(count), bits);
    }
  }
  static void stream_line(std::byte* to, const Floats* v) {
    stream(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1], v[0])));
  }
#endif
  static Floats round(Floats v) { return BFloat16::round(v); }
};

}  // namespace
}  // namespace kvkernels
