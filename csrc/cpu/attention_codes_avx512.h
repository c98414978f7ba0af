// What the AVX-512 kernels for codes share: pieces of rows, groups of keys, scales. Only for files
// compiled for AVX-512.
#pragma once

#include <algorithm>

#include "cpu/attention_codes.h"
#include "cpu/row_batches.h"
#include "cpu/simd_avx512.h"

namespace kvkernels {
namespace {

constexpr int kMaxBatch = 4;  // rows multiplied with a vector of codes while it is in a register
constexpr int64_t kMaxKeys = kCodeRowStride, kMaxGroups = kMaxCodeDim / 32;

// How the rarer kernels prefetch, so that they are not compiled for every way: those for rows that
// end within a piece, and the integer ones for 4-bit codes, in place of which processors with
// another way (see Asking) have the AVX512-BF16 kernels.
constexpr Asking kUsually = Asking::kOnceL2;

// Combines all lanes of each row's vector; the result is in every lane of the row's quarter.
template <int kRows, typename Combine>
[[gnu::always_inline]] inline __m512 combine_rows(const __m512* rows, const Combine& combine) {
  __m512 repeated[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) repeated[i] = rows[i < kRows ? i : kRows - 1];
  return combine_lanes_of_4(repeated, combine);
}

// A row of codes is worked on in pieces of 64 channels, two halves of 32. The halves are
// neighbours; with 4-bit codes they are the channels in the low and in the high halves of the same
// 32 bytes.
template <bool kIsInt4>
struct Pieces {
  int64_t dim;

  int64_t row_bytes() const { return kIsInt4 ? dim / 2 : dim; }
  int64_t count() const { return kIsInt4 ? (dim / 2 + 31) / 32 : (dim + 63) / 64; }
  bool are_whole() const { return dim % 64 == 0; }
  int64_t begin(int64_t piece, int64_t half) const {
    return kIsInt4 ? half * dim / 2 + 32 * piece : 64 * piece + 32 * half;
  }
  int64_t end(int64_t half) const { return kIsInt4 && half == 0 ? dim / 2 : dim; }
};

// Loads 32 bytes of a row from `first` on; bytes past the row's end are 0. kIsWhole: none are.
template <bool kIsWhole>
inline __m256i load_bytes(const uint8_t* row, int64_t first, int64_t num_bytes) {
  const int64_t left = num_bytes - first;
  if (kIsWhole || left >= 32) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + first));
  }
  const __mmask32 mask = left <= 0 ? 0 : (__mmask32{1} << left) - 1;
  return _mm256_maskz_loadu_epi8(mask, row + first);
}

// Widened from pairs of float16, scale and minimum.
struct Scales {
  __m512 scale, middle;  // middle: minimum + c * scale, what code c stands for
};

// `numbers` holds 16 scales, then their minimums.
inline Scales widen_scales(__m512i numbers, float c) {
  const __m512 scale = _mm512_cvtph_ps(_mm512_castsi512_si256(numbers));
  const __m512 minimum = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(numbers, 1));
  return {scale, _mm512_fmadd_ps(_mm512_set1_ps(c), scale, minimum)};
}

inline Scales load_scales(const uint16_t* pairs, __mmask16 mask, float c) {
  const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,
                                         30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i both = _mm512_maskz_loadu_epi32(mask, pairs);
  return widen_scales(_mm512_permutexvar_epi16(order, both), c);
}

// Calls visit(slot, count, pairs) for each set of neighbouring keys that share their scales,
// `pairs`.
template <typename Visit>
inline void for_each_key_group(const CodeRun& run, const Visit& visit) {
  const int64_t group_size = run.block_size / run.groups, end = run.slot + run.count;
  for (int64_t slot = run.slot, next; slot < end; slot = next) {
    next = std::min((slot / group_size + 1) * group_size, end);
    visit(slot, next - slot, run.scales + slot / group_size * run.dim * 2);
  }
}

// Scale and middle of each group of channels, key by key.
struct alignas(64) KeyScales {
  float scale[kMaxGroups][kMaxKeys], middle[kMaxGroups][kMaxKeys];
};

// Keys rounded up to 32, which are rounded together; entries past the last key are 0.
inline int64_t whole_pairs(int64_t num_keys) { return (num_keys + 31) / 32 * 32; }

// Separates groups: kGroups vectors hold elements of the groups in turn; afterwards vector g holds
// those of group g.
template <int kGroups>
inline void split_groups(__m512* v) {
  if constexpr (kGroups > 1) {
    const __m512i evens =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    constexpr int kHalf = kGroups / 2;
    __m512 even[kHalf], odd[kHalf];
#pragma GCC unroll 4
    for (int i = 0; i < kHalf; ++i) {
      even[i] = _mm512_permutex2var_ps(v[2 * i], evens, v[2 * i + 1]);
      odd[i] = _mm512_permutex2var_ps(v[2 * i], odds, v[2 * i + 1]);
    }
    split_groups<kHalf>(even);
    split_groups<kHalf>(odd);
#pragma GCC unroll 4
    for (int i = 0; i < kHalf; ++i) {
      v[2 * i] = even[i];
      v[2 * i + 1] = odd[i];
    }
  }
}

template <int kGroups>
inline void spread_scales_of(const uint16_t* pairs, int64_t num_keys, float c, KeyScales& spread) {
  for (int64_t t = 0; t < whole_pairs(num_keys); t += 16) {
    __m512 scale[kGroups], middle[kGroups];
#pragma GCC unroll 8
    for (int i = 0; i < kGroups; ++i) {
      const Scales both = load_scales(pairs + 2 * (kGroups * t + 16 * i),
                                      first_lanes(kGroups * (num_keys - t) - 16 * i), c);
      scale[i] = both.scale;
      middle[i] = both.middle;
    }
    split_groups<kGroups>(scale);
    split_groups<kGroups>(middle);
#pragma GCC unroll 8
    for (int group = 0; group < kGroups; ++group) {
      _mm512_store_ps(spread.scale[group] + t, scale[group]);
      _mm512_store_ps(spread.middle[group] + t, middle[group]);
    }
  }
}

inline void spread_scales(const CodeRun& run, float c, KeyScales& spread) {
  const uint16_t* pairs = run.scales + run.slot * run.groups * 2;
  switch (run.groups) {
    case 1:
      return spread_scales_of<1>(pairs, run.count, c, spread);
    case 2:
      return spread_scales_of<2>(pairs, run.count, c, spread);
    case 4:
      return spread_scales_of<4>(pairs, run.count, c, spread);
    case 8:
      return spread_scales_of<8>(pairs, run.count, c, spread);
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

// row = row * decay + (low, high), for 32 channels of a row of sums.
inline void add_32_to_row(__m512 low, __m512 high, __m512 decay, float* row) {
  _mm512_storeu_ps(row, _mm512_fmadd_ps(_mm512_loadu_ps(row), decay, low));
  _mm512_storeu_ps(row + 16, _mm512_fmadd_ps(_mm512_loadu_ps(row + 16), decay, high));
}

// The same where `count` channels are left.
inline void add_to_row(__m512 low, __m512 high, int64_t count, float decay, float* row) {
  const __m512 factor = _mm512_set1_ps(decay);
  if (count >= 32) return add_32_to_row(low, high, factor, row);
  const __mmask16 is_low = first_lanes(count), is_high = first_lanes(count - 16);
  const __m512 old_low = _mm512_maskz_loadu_ps(is_low, row);
  const __m512 old_high = _mm512_maskz_loadu_ps(is_high, row + 16);
  _mm512_mask_storeu_ps(row, is_low, _mm512_fmadd_ps(old_low, factor, low));
  _mm512_mask_storeu_ps(row + 16, is_high, _mm512_fmadd_ps(old_high, factor, high));
}

inline bool suits_vectors(const CodeShape& shape) {
  return shape.head_dim <= kMaxCodeDim && shape.value_dim <= kMaxCodeDim &&
         shape.head_dim % 16 == 0 && shape.value_dim % 16 == 0 && shape.has_groups_of(32);
}

}  // namespace
}  // namespace kvkernels
