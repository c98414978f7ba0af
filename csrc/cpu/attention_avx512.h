// What the AVX-512 attention kernels share. Only for files compiled for AVX-512.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/simd_avx512.h"

namespace kvkernels {

constexpr int64_t kTileKeys = 64;  // keys worked on at a time

// A tile with at most this many rows is read straight from the cache by attend_few_rows; with more
// it pays to convert and transpose keys first. Up to here, decoding is faster than memory.
constexpr int64_t kFewRows = 8;

namespace {

inline float infinity() { return __builtin_inff(); }

// Turns one row's raw scores of up to kTileKeys keys into weights, and the running maximum and sum
// (16 lanes) with them. Of the columns below 16 * kVectors, those outside [first, last) get the
// weight 0, whatever their scores; kIsMasked is false where there are none. Returns what earlier
// sums must be scaled by.
template <int kVectors, bool kIsMasked>
inline float softmax_vectors(float* scores, int64_t first, int64_t last, float scale, float* max,
                             float* sum) {
  const __m512 scales = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(-infinity());
  __m512 s[kVectors], top = lowest;
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    s[i] = _mm512_load_ps(scores + 16 * i);
    if constexpr (kIsMasked) {
      const __mmask16 seen = first_lanes(last - 16 * i) & ~first_lanes(first - 16 * i);
      s[i] = _mm512_mask_mul_ps(lowest, seen, s[i], scales);
    } else {
      s[i] = _mm512_mul_ps(s[i], scales);
    }
    top = _mm512_max_ps(top, s[i]);
  }
  const float old_max = *max, tile_max = _mm512_reduce_max_ps(top);
  const float new_max = old_max > tile_max ? old_max : tile_max;
  // Where every score is minus infinity so far, the weights must come out as 0, not as NaN.
  const __m512 base = _mm512_set1_ps(new_max == -infinity() ? 0.0f : new_max);
  const __m512 decay = exp2_lanes(_mm512_sub_ps(_mm512_set1_ps(old_max), base));
  __m512 total = _mm512_mul_ps(_mm512_load_ps(sum), decay);
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    s[i] = exp2_lanes(_mm512_sub_ps(s[i], base));
    _mm512_store_ps(scores + 16 * i, s[i]);
    total = _mm512_add_ps(total, s[i]);
  }
  _mm512_store_ps(sum, total);
  *max = new_max;
  return _mm512_cvtss_f32(decay);
}

// The same for the number of vectors that hold `num_keys` columns.
inline float softmax_step(float* scores, int64_t num_keys, int64_t first, int64_t last, float scale,
                          float* max, float* sum) {
  if (num_keys == kTileKeys && first <= 0 && last >= kTileKeys) {
    return softmax_vectors<4, false>(scores, first, last, scale, max, sum);
  }
  switch ((num_keys - 1) / 16) {
    case 0:
      return softmax_vectors<1, true>(scores, first, last, scale, max, sum);
    case 1:
      return softmax_vectors<2, true>(scores, first, last, scale, max, sum);
    case 2:
      return softmax_vectors<3, true>(scores, first, last, scale, max, sum);
    default:
      return softmax_vectors<4, true>(scores, first, last, scale, max, sum);
  }
}

// The end of the tile of keys that starts at `begin`: at a multiple of kTileKeys, so that tiles and
// blocks of the cache end together.
inline int64_t key_tile_end(const AttentionTile& tile, int64_t begin) {
  const int64_t end = (begin / kTileKeys + 1) * kTileKeys;
  return end < tile.key_end ? end : tile.key_end;
}

}  // namespace
}  // namespace kvkernels
