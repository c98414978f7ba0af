// What the AVX-512 attention kernels share. Only for files compiled for AVX-512.
#pragma once

#include <type_traits>

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

// How weights take the place of scores: as floats. Another such type of weights may write less.
template <typename E>
struct FloatWeights {
  using Element = E;  // of the results

  template <int kVectors>
  static void store(const __m512* weights, float* row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) _mm512_store_ps(row + 16 * i, weights[i]);
  }
};

// Whether a row sees every key of a whole tile.
inline bool sees_all(const KeyRange& columns, int64_t num_keys) {
  return num_keys == kTileKeys && columns.begin <= 0 && columns.end >= kTileKeys;
}

// Which of a row's first 16 * kVectors columns it sees. kIsMasked is false where it sees all.
template <int kVectors, bool kIsMasked>
struct SeenColumns {
  __mmask16 masks[kVectors];

  explicit SeenColumns(const KeyRange* columns) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      masks[i] = kIsMasked
                     ? first_lanes(columns->end - 16 * i) & ~first_lanes(columns->begin - 16 * i)
                     : 0xffff;
    }
  }
};

// Turns raw scores of kRows rows into weights of the type W, and updates the rows' running maxima
// and sums (16 lanes each); `decay` gets the factors for what was summed up before. Of the columns
// below 16 * kVectors, those that a row does not see (see SeenColumns) get the weight 0 whatever
// their scores. A row's results have the same bits whatever the numbers of rows and vectors, and
// masked or not.
//
// The rows' maxima are found together: one row at a time waits for each step of its reduction.
template <typename W, int kRows, int kVectors, bool kIsMasked>
inline void softmax_some_rows(float* scores, const KeyRange* columns, float scale, float* max,
                              float* sum, float* decay) {
  using Seen = SeenColumns<kVectors, kIsMasked>;
  const __m512 scales = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(-kInfinity);
  // With a scale below 0 the smallest score counts.
  const __m512 sign = _mm512_and_ps(scales, _mm512_set1_ps(-0.0f));
  __m512 top[4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Seen seen(kIsMasked ? columns + r : nullptr);
    __m512 s[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const __m512 score = _mm512_load_ps(scores + r * kTileKeys + 16 * i);
      s[i] = _mm512_mask_xor_ps(lowest, seen.masks[i], score, sign);
    }
    top[r] = s[0];
#pragma GCC unroll 4
    for (int i = 1; i < kVectors; ++i) top[r] = _mm512_max_ps(top[r], s[i]);
  }
#pragma GCC unroll 4
  for (int r = kRows; r < 4; ++r) top[r] = top[0];
  // Quarter r of `largest` and of what follows from it belongs to row r. The largest score is also
  // the largest once multiplied, as rounding keeps the order. (With a scale of 0, a row that sees
  // none of the columns others see becomes NaN here, and is computed again: attention_tiles.cpp.)
  const __m512 unscaled = _mm512_xor_ps(combine_lanes_of_4(top, MaxOf()), sign);
  const __m512 largest = _mm512_mul_ps(unscaled, scales);
  const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m512i gather = _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0);
  constexpr __mmask16 kIsRow = (1 << kRows) - 1;
  const __m512 old_max = _mm512_permutexvar_ps(spread, _mm512_maskz_loadu_ps(kIsRow, max));
  const __m512 new_max = _mm512_max_ps(old_max, largest);
  // If every score so far is minus infinity, the weights must come out as 0, not as NaN.
  const __mmask16 is_seen = _mm512_cmp_ps_mask(new_max, lowest, _CMP_NEQ_UQ);
  const __m512 base = _mm512_maskz_mov_ps(is_seen, new_max);
  const __m512 factors = exp2_of<typename W::Element>(_mm512_sub_ps(old_max, base));
  _mm512_mask_storeu_ps(max, kIsRow, _mm512_permutexvar_ps(gather, new_max));
  _mm512_mask_storeu_ps(decay, kIsRow, _mm512_permutexvar_ps(gather, factors));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Seen seen(kIsMasked ? columns + r : nullptr);
    const __m512i quarter = _mm512_set1_epi32(4 * r);
    const __m512 row_base = _mm512_permutexvar_ps(quarter, base);
    const __m512 factor = _mm512_permutexvar_ps(quarter, factors);
    float* const row = scores + r * kTileKeys;
    __m512 weights[kVectors], total;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const __m512 scaled = rounded_product(_mm512_load_ps(row + 16 * i), scales);
      const __m512 score = _mm512_sub_ps(scaled, row_base);
      weights[i] = _mm512_maskz_mov_ps(seen.masks[i], exp2_of<typename W::Element>(score));
      total = add_weight(total, i, weights[i], sum + 16 * r, factor);
    }
    W::template store<kVectors>(weights, row);
    _mm512_store_ps(sum + 16 * r, total);
  }
}

// softmax_some_rows for rows that see every key of a whole tile.
template <typename W>
inline void softmax_whole(float* scores, int64_t count, float scale, float* max, float* sum,
                          float* decay) {
  const auto weigh = [&](auto num_rows, int64_t r) {
    softmax_some_rows<W, num_rows(), kTileKeys / 16, false>(scores + r * kTileKeys, nullptr, scale,
                                                            max + r, sum + 16 * r, decay + r);
  };
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) weigh(std::integral_constant<int, 4>(), r);
  switch (count - r) {
    case 1:
      return weigh(std::integral_constant<int, 1>(), r);
    case 2:
      return weigh(std::integral_constant<int, 2>(), r);
    case 3:
      return weigh(std::integral_constant<int, 3>(), r);
  }
}

// softmax_some_rows with as many vectors as `num_keys` columns fill.
template <typename W, int kRows>
inline void softmax_masked(float* scores, int64_t num_keys, const KeyRange* columns, float scale,
                           float* max, float* sum, float* decay) {
  switch ((num_keys - 1) / 16) {
    case 0:
      return softmax_some_rows<W, kRows, 1, true>(scores, columns, scale, max, sum, decay);
    case 1:
      return softmax_some_rows<W, kRows, 2, true>(scores, columns, scale, max, sum, decay);
    case 2:
      return softmax_some_rows<W, kRows, 3, true>(scores, columns, scale, max, sum, decay);
    default:
      return softmax_some_rows<W, kRows, 4, true>(scores, columns, scale, max, sum, decay);
  }
}

// Turns the scores of `count` rows into weights; row r sees the columns [begin, end) of seen[r].
template <typename W>
inline void softmax_rows(float* scores, int64_t num_keys, const KeyRange* seen, int64_t count,
                         float scale, float* max, float* sum, float* decay) {
  for (int64_t r = 0, end; r < count; r = end) {
    for (end = r; end < count && sees_all(seen[end], num_keys);) ++end;
    softmax_whole<W>(scores + r * kTileKeys, end - r, scale, max + r, sum + 16 * r, decay + r);
    for (r = end; end < count && !sees_all(seen[end], num_keys);) ++end;
    for (; r + 4 <= end; r += 4) {
      softmax_masked<W, 4>(scores + r * kTileKeys, num_keys, seen + r, scale, max + r, sum + 16 * r,
                           decay + r);
    }
    for (; r < end; ++r) {
      softmax_masked<W, 1>(scores + r * kTileKeys, num_keys, seen + r, scale, max + r, sum + 16 * r,
                           decay + r);
    }
  }
}

}  // namespace
}  // namespace kvkernels
