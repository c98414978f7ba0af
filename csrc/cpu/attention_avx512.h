// What the AVX-512 attention kernels share. Only for files compiled for AVX-512.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/simd_avx512.h"

namespace kvkernels {

constexpr int64_t kTileKeys = 64;  // keys per tile

// With at most this many query rows attend_few_rows reads keys and values straight from the cache;
// with more it pays to convert and transpose the keys first. Up to here decoding waits for memory.
constexpr int64_t kFewRows = 8;

namespace {

// Adds vector `i` of a row's weights to `total`; vector 0 starts it with the decayed sum of the
// tiles before. Which operations are fused is written out: left to the compiler, functions that
// must give the same bits might fuse different ones.
inline __m512 add_weight(__m512 total, int i, __m512 weight, const float* sum, __m512 decay) {
  return i == 0 ? _mm512_fmadd_ps(_mm512_load_ps(sum), decay, weight)
                : _mm512_add_ps(total, weight);
}

// Turns one row's raw scores of up to kTileKeys keys into weights, for results of the element type
// E, and updates the running maximum and sum (16 lanes). Of the columns below 16 * kVectors, those
// outside [first, last) get the weight 0 whatever their scores; kIsMasked is false where there are
// none. Returns the factor for what was summed up before.
template <typename E, int kVectors, bool kIsMasked>
inline float softmax_vectors(float* scores, int64_t first, int64_t last, float scale, float* max,
                             float* sum) {
  const __m512 scales = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(-kInfinity);
  __m512 s[kVectors], top = lowest;
  __mmask16 seen[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    s[i] = _mm512_load_ps(scores + 16 * i);
    seen[i] = kIsMasked ? first_lanes(last - 16 * i) & ~first_lanes(first - 16 * i) : 0xffff;
    top = _mm512_max_ps(top, _mm512_mask_mul_ps(lowest, seen[i], s[i], scales));
  }
  const float old_max = *max, tile_max = _mm512_reduce_max_ps(top);
  const float new_max = old_max > tile_max ? old_max : tile_max;
  // If every score so far is minus infinity, the weights must come out as 0, not as NaN.
  const __m512 base = _mm512_set1_ps(new_max == -kInfinity ? 0.0f : new_max);
  const __m512 decay = exp2_of<E>(_mm512_sub_ps(_mm512_set1_ps(old_max), base));
  __m512 total;
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const __m512 weight =
        _mm512_maskz_mov_ps(seen[i], exp2_of<E>(_mm512_fmsub_ps(s[i], scales, base)));
    _mm512_store_ps(scores + 16 * i, weight);
    total = add_weight(total, i, weight, sum, decay);
  }
  _mm512_store_ps(sum, total);
  *max = new_max;
  return _mm512_cvtss_f32(decay);
}

// Whether a row sees every key of a whole tile.
inline bool sees_all(const KeyRange& columns, int64_t num_keys) {
  return num_keys == kTileKeys && columns.begin <= 0 && columns.end >= kTileKeys;
}

// softmax_vectors with as many vectors as `num_keys` columns fill.
template <typename E>
inline float softmax_step(float* scores, int64_t num_keys, int64_t first, int64_t last, float scale,
                          float* max, float* sum) {
  if (sees_all({first, last}, num_keys)) {
    return softmax_vectors<E, 4, false>(scores, first, last, scale, max, sum);
  }
  switch ((num_keys - 1) / 16) {
    case 0:
      return softmax_vectors<E, 1, true>(scores, first, last, scale, max, sum);
    case 1:
      return softmax_vectors<E, 2, true>(scores, first, last, scale, max, sum);
    case 2:
      return softmax_vectors<E, 3, true>(scores, first, last, scale, max, sum);
    default:
      return softmax_vectors<E, 4, true>(scores, first, last, scale, max, sum);
  }
}

// softmax_step, to the same bits, for a whole tile of which up to 4 rows see every key, and a scale
// that is not negative. The rows' maxima are found together: one row at a time waits for each step
// of its reduction. `max` and `decay` have one float per row, `sum` 16.
template <typename E, int kRows>
inline void softmax_whole_rows(float* scores, float scale, float* max, float* sum, float* decay) {
  constexpr int kVectors = kTileKeys / 16;
  const __m512 scales = _mm512_set1_ps(scale);
  __m512 top[4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __m512 s[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) s[i] = _mm512_load_ps(scores + r * kTileKeys + 16 * i);
    top[r] = _mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3]));
  }
#pragma GCC unroll 4
  for (int r = kRows; r < 4; ++r) top[r] = top[0];
  // Quarter r of `largest` and of what follows from it belongs to row r. The largest score is also
  // the largest once multiplied, as rounding keeps the order.
  const __m512 largest = _mm512_mul_ps(combine_lanes_of_4(top, MaxOf()), scales);
  const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m512i gather = _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0);
  constexpr __mmask16 kIsRow = (1 << kRows) - 1;
  const __m512 old_max = _mm512_permutexvar_ps(spread, _mm512_maskz_loadu_ps(kIsRow, max));
  const __m512 new_max = _mm512_max_ps(old_max, largest);
  const __m512 lowest = _mm512_set1_ps(-kInfinity);
  // If every score so far is minus infinity, the weights must come out as 0, not as NaN.
  const __mmask16 is_seen = _mm512_cmp_ps_mask(new_max, lowest, _CMP_NEQ_UQ);
  const __m512 base = _mm512_maskz_mov_ps(is_seen, new_max);
  const __m512 factors = exp2_of<E>(_mm512_sub_ps(old_max, base));
  _mm512_mask_storeu_ps(max, kIsRow, _mm512_permutexvar_ps(gather, new_max));
  _mm512_mask_storeu_ps(decay, kIsRow, _mm512_permutexvar_ps(gather, factors));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512i quarter = _mm512_set1_epi32(4 * r);
    const __m512 row_base = _mm512_permutexvar_ps(quarter, base);
    const __m512 factor = _mm512_permutexvar_ps(quarter, factors);
    __m512 total;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      float* const row = scores + r * kTileKeys + 16 * i;
      const __m512 weight = exp2_of<E>(_mm512_fmsub_ps(_mm512_load_ps(row), scales, row_base));
      _mm512_store_ps(row, weight);
      total = add_weight(total, i, weight, sum + 16 * r, factor);
    }
    _mm512_store_ps(sum + 16 * r, total);
  }
}

// softmax_step, to the same bits, for `count` rows that see every key of a whole tile.
template <typename E>
inline void softmax_whole(float* scores, int64_t count, float scale, float* max, float* sum,
                          float* decay) {
  const int64_t step = scale >= 0.0f ? 4 : 1;
  for (int64_t r = 0; r < count; r += step) {
    float* const row = scores + r * kTileKeys;
    switch (std::min(count - r, step)) {
      case 1:
        decay[r] = softmax_vectors<E, 4, false>(row, 0, kTileKeys, scale, max + r, sum + 16 * r);
        break;
      case 2:
        softmax_whole_rows<E, 2>(row, scale, max + r, sum + 16 * r, decay + r);
        break;
      case 3:
        softmax_whole_rows<E, 3>(row, scale, max + r, sum + 16 * r, decay + r);
        break;
      default:
        softmax_whole_rows<E, 4>(row, scale, max + r, sum + 16 * r, decay + r);
    }
  }
}

// softmax_step for `count` rows; row r sees the columns [begin, end) of seen[r].
template <typename E>
inline void softmax_rows(float* scores, int64_t num_keys, const KeyRange* seen, int64_t count,
                         float scale, float* max, float* sum, float* decay) {
  for (int64_t r = 0; r < count;) {
    int64_t end = r;
    while (end < count && sees_all(seen[end], num_keys)) ++end;
    softmax_whole<E>(scores + r * kTileKeys, end - r, scale, max + r, sum + 16 * r, decay + r);
    for (r = end; r < count && !sees_all(seen[r], num_keys); ++r) {
      decay[r] = softmax_step<E>(scores + r * kTileKeys, num_keys, seen[r].begin, seen[r].end,
                                 scale, max + r, sum + 16 * r);
    }
  }
}

}  // namespace
}  // namespace kvkernels
