// Vectors of 8 floats: loads of every dtype, exp2, reductions. Only for files compiled for AVX2.
#pragma once

#include <immintrin.h>

#include "cpu/float_bits.h"

namespace kvkernels {
namespace {

// Element types. `load` widens 8 neighbours to floats, `store` rounds them back. `load_half` 0 and
// 1 together widen 16 neighbours in whatever order is cheapest; `arrange` brings two vectors of
// neighbours into that order, `restore` out of it. kExp2Degree: of exp2_lanes, as exact as results
// of the type can show.
struct Float32 {
  using Item = float;
  static constexpr int kExp2Degree = 6;
  static __m256 load(const Item* p) { return _mm256_loadu_ps(p); }
  template <int kHalf>
  static __m256 load_half(const Item* p) {
    return load(p + 8 * kHalf);
  }
  static void arrange(__m256&, __m256&) {}
  static void restore(__m256&, __m256&) {}
  static void store(Item* p, __m256 v) { _mm256_storeu_ps(p, v); }
};

struct Float16 {
  using Item = uint16_t;
  static constexpr int kExp2Degree = 4;
  static __m256 load(const Item* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int kHalf>
  static __m256 load_half(const Item* p) {
    return load(p + 8 * kHalf);
  }
  static void arrange(__m256&, __m256&) {}
  static void restore(__m256&, __m256&) {}
  static void store(Item* p, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct BFloat16 {
  using Item = uint16_t;
  static constexpr int kExp2Degree = 4;
  static __m256 load(const Item* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // Those at even indices, then those at odd ones: half the instructions of keeping their order.
  template <int kHalf>
  static __m256 load_half(const Item* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(kHalf == 0 ? _mm256_slli_epi32(bits, 16)
                                          : _mm256_and_si256(bits, _mm256_set1_epi32(-0x10000)));
  }
  static void arrange(__m256& a, __m256& b) {
    const auto in_order = [](__m256 halves) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(halves), 0xd8));
    };
    const __m256 even = in_order(_mm256_shuffle_ps(a, b, 0x88));
    b = in_order(_mm256_shuffle_ps(a, b, 0xdd));
    a = even;
  }
  static void restore(__m256& a, __m256& b) {
    const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static void store(Item* p, __m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(tie, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
};

// Widens the first, and the second, float16 of 8 pairs.
inline void widen_float16_pairs(__m256i pairs, __m256& first, __m256& second) {
  const __m256i apart = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(pairs, apart), 0xd8);
  first = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  second = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

// 2^x for x <= 0, minus infinity included; NaN stays NaN. Results below 2^-127 are 0. As exact as
// kExp2Poly<kDegree>.
template <int kDegree = 6>
inline __m256 exp2_lanes(__m256 x) {
  // vmaxps returns its second operand if either is NaN.
  x = _mm256_max_ps(_mm256_set1_ps(-127.0f), x);
  const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 rest = _mm256_sub_ps(x, whole);
  constexpr auto& kPoly = kExp2Poly<kDegree>;
  __m256 poly = _mm256_set1_ps(kPoly[kDegree]);
  for (int i = kDegree - 1; i >= 0; --i) {
    poly = _mm256_fmadd_ps(poly, rest, _mm256_set1_ps(kPoly[i]));
  }
  // For -127 the exponent field is 0, which makes the power 0.
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_mul_ps(poly, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

// exp2_lanes for results of the element type E.
template <typename E>
inline __m256 exp2_of(__m256 x) {
  return exp2_lanes<E::kExp2Degree>(x);
}

inline __m256 abs_lanes(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

inline float max_lane(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline float sum_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Lane i of the result is the sum over the lanes of v[i].
inline __m256 sum_lanes_of_8(const __m256* v) {
  // Each half of low, and of high, holds the sums of that half of four vectors.
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                       _mm256_permute2f128_ps(low, high, 0x31));
}

// Transposes 8 x 8 floats in registers.
inline void transpose_8x8(__m256* v) {
  __m256 t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const __m256 a = t[4 * i + j], b = t[4 * i + j + 2];
      v[4 * i + 2 * j] = _mm256_shuffle_ps(a, b, 0x44);
      v[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a, b, 0xee);
    }
  }
  // v[4 i + c] holds columns c and 4 + c of rows 4 i .. 4 i + 3 in its halves.
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x20);
    t[4 + c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x31);
  }
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}

}  // namespace
}  // namespace kvkernels
