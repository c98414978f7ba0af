// What the kernels for codes share: reading scales. Only for files compiled for AVX-512.
#pragma once

#include <algorithm>

#include "cpu/attention_codes.h"
#include "cpu/simd_avx512.h"

namespace kvkernels {
namespace {

constexpr int kMaxBatch = 4;  // rows that share a vector of codes
constexpr int64_t kMaxKeys = kCodeRowStride, kMaxGroups = kMaxCodeDim / 32;

// Sums over channels are found 16 together: so many keys are scored at once with so many rows.
constexpr int keys_at_once(int num_rows) { return num_rows == 1 ? 16 : num_rows == 2 ? 8 : 4; }

// Stores the 16 scores of kRows rows.
template <int kRows>
[[gnu::always_inline]] inline void store_sixteen(__m512 result, float* scores) {
  if constexpr (kRows == 1) {
    _mm512_storeu_ps(scores, result);
  } else if constexpr (kRows == 2) {
    _mm256_storeu_ps(scores, _mm512_castps512_ps256(result));
    _mm256_storeu_ps(scores + kCodeRowStride, _mm512_extractf32x8_ps(result, 1));
  } else {
    _mm_storeu_ps(scores, _mm512_castps512_ps128(result));
    _mm_storeu_ps(scores + kCodeRowStride, _mm512_extractf32x4_ps(result, 1));
    _mm_storeu_ps(scores + 2 * kCodeRowStride, _mm512_extractf32x4_ps(result, 2));
    if (kRows == 4) {
      _mm_storeu_ps(scores + 3 * kCodeRowStride, _mm512_extractf32x4_ps(result, 3));
    }
  }
}

// Sums of products are taken with codes around 0: what is rounded is then small.
constexpr float middle_code(bool is_int4) { return is_int4 ? 8.0f : 128.0f; }

// float16 pairs of scale and minimum.
struct Scales {
  __m512 scale, middle;  // middle: minimum + c * scale
};

inline Scales load_scales(const uint16_t* pairs, __mmask16 mask, float c) {
  const __m512i both = _mm512_maskz_loadu_epi32(mask, pairs);
  const __m512 scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
  const __m512 minimum = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
  return {scale, _mm512_fmadd_ps(_mm512_set1_ps(c), scale, minimum)};
}

// Scale and middle of one group of channels, key by key.
struct alignas(64) KeyScales {
  float scale[kMaxGroups][kMaxKeys], middle[kMaxGroups][kMaxKeys];
};

// Keys are rounded 32 together; what lies past the last gets 0.
inline int64_t whole_pairs(int64_t num_keys) { return (num_keys + 31) / 32 * 32; }

// Quarter q of v[i] becomes quarter i of v[q].
inline void transpose_quarters(__m512* v) {
  const __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44);
  const __m512 b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
  const __m512 c = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
  const __m512 d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

// Four groups, as heads of 128 have them, 16 keys at a time.
inline void spread_scales_of_four(const uint16_t* pairs, int64_t num_keys, float c,
                                  KeyScales& spread) {
  // Pair i of 16 belongs to key i / 4 and group i % 4.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  for (int64_t t = 0; t < whole_pairs(num_keys); t += 16) {
    __m512 scale[4], middle[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Scales both =
          load_scales(pairs + 8 * (t + 4 * i), first_lanes(4 * (num_keys - t) - 16 * i), c);
      scale[i] = _mm512_permutexvar_ps(order, both.scale);
      middle[i] = _mm512_permutexvar_ps(order, both.middle);
    }
    transpose_quarters(scale);
    transpose_quarters(middle);
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group) {
      _mm512_store_ps(spread.scale[group] + t, scale[group]);
      _mm512_store_ps(spread.middle[group] + t, middle[group]);
    }
  }
}

inline void spread_scales(const CodeRun& run, float c, KeyScales& spread) {
  const uint16_t* pairs = run.scales + run.slot * run.groups * 2;
  if (run.groups == 4) return spread_scales_of_four(pairs, run.count, c, spread);
  if (run.groups == 1) {
    for (int64_t t = 0; t < whole_pairs(run.count); t += 16) {
      const Scales both = load_scales(pairs + 2 * t, first_lanes(run.count - t), c);
      _mm512_store_ps(spread.scale[0] + t, both.scale);
      _mm512_store_ps(spread.middle[0] + t, both.middle);
    }
    return;
  }
  alignas(64) float scale[16 * kMaxGroups], middle[16 * kMaxGroups];
  for (int64_t t = 0; t < whole_pairs(run.count); t += 16) {
    const int64_t num_pairs = std::clamp<int64_t>(run.count - t, 0, 16) * run.groups;
    for (int64_t i = 0; i < num_pairs; i += 16) {
      const Scales both =
          load_scales(pairs + 2 * (t * run.groups + i), first_lanes(num_pairs - i), c);
      _mm512_store_ps(scale + i, both.scale);
      _mm512_store_ps(middle + i, both.middle);
    }
    for (int64_t group = 0; group < run.groups; ++group) {
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t from = i * run.groups + group;
        spread.scale[group][t + i] = from < num_pairs ? scale[from] : 0.0f;
        spread.middle[group][t + i] = from < num_pairs ? middle[from] : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace kvkernels
