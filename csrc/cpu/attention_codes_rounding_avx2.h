// Multiplies rows of floats by the scales of codes ("folds" them) and rounds the products to 16-bit
// integers, so that sums of their products with codes are exact (see
// attention_codes_avx512_vnni.cpp). Only for files compiled for AVX2.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/attention_codes.h"
#include "cpu/simd_avx2.h"

namespace kvkernels {
namespace {

constexpr int kMaxBatch = 4;  // rows multiplied with a vector of codes while it is in a register
constexpr int kSums = 8;      // sums of products kept at a time: half of the registers
constexpr int64_t kPieceChannels = 16;  // channels of a row of codes that are multiplied together
constexpr int64_t kMaxKeys = kCodeRowStride, kMaxGroups = kMaxCodeDim / kPieceChannels;

// |x| <= kLargest keeps 256 products with codes up to 255 within 31 bits.
constexpr float kLargest = 32767;

// Sums over channels are added across lanes 8 together, so this many keys are scored at a time with
// this many rows.
constexpr int keys_at_once(int num_rows) { return num_rows == 1 ? 8 : num_rows == 2 ? 4 : 2; }

// A row of codes is worked on in pieces of 16 channels; of 4-bit codes, first those in the low
// halves of 16 bytes, then those in their high halves.
template <bool kIsInt4>
int64_t first_channel(int64_t piece, int64_t dim) {
  return kIsInt4 ? piece % 2 * (dim / 2) + piece / 2 * 16 : piece * 16;
}

inline int64_t bytes_of_row(bool is_int4, int64_t dim) { return is_int4 ? dim / 2 : dim; }

// Lane i of the result is the sum over the lanes of v[i].
inline __m256i sum_lanes_of_8(const __m256i* v) {
  const __m256i low =
      _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m256i high =
      _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                          _mm256_permute2x128_si256(low, high, 0x31));
}

inline int32_t sum_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// Widened from pairs of float16, scale and minimum.
struct Scales {
  __m256 scale, middle;  // middle: minimum + c * scale, what code c stands for
};

inline Scales widen_scales(__m256i pairs, float c) {
  __m256 scale, minimum;
  widen_float16_pairs(pairs, scale, minimum);
  return {scale, _mm256_fmadd_ps(_mm256_set1_ps(c), scale, minimum)};
}

// 1 / v, and 0 for 0.
inline __m256 inverse_of(__m256 v) {
  const __m256 is_some = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ);
  return _mm256_and_ps(is_some, _mm256_div_ps(_mm256_set1_ps(1.0f), v));
}

// Rounds a and b to 16 integers, stores them in order, and adds them to `total` in pairs.
inline void round(__m256 a, __m256 b, int16_t* numbers, __m256i& total) {
  const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
  const __m256i x = _mm256_permute4x64_epi64(both, 0xd8);
  _mm256_store_si256(reinterpret_cast<__m256i*>(numbers), x);
  total = _mm256_add_epi32(total, _mm256_madd_epi16(x, _mm256_set1_epi16(1)));
}

// Rounds a row of numbers, a multiple of 16, to integers; the largest magnitude, `top`, becomes
// kLargest. Returns their total, in parts.
inline __m256i round_row(const float* row, int64_t count, float top, int16_t* numbers) {
  const __m256 factor = _mm256_mul_ps(inverse_of(_mm256_set1_ps(top)), _mm256_set1_ps(kLargest));
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 16) {
    round(_mm256_mul_ps(_mm256_load_ps(row + i), factor),
          _mm256_mul_ps(_mm256_load_ps(row + i + 8), factor), numbers + i, total);
  }
  return total;
}

// Sum of x times the codes' middle: by this much the sum of products with unsigned codes exceeds
// that with codes around 0.
template <bool kIsInt4>
__m256i excess_of(__m256i total) {
  constexpr int kBits = kIsInt4 ? 3 : 7;
  static_assert(1 << kBits == static_cast<int>(middle_code(kIsInt4)));
  return _mm256_slli_epi32(total, kBits);
}

struct alignas(32) RoundedQuery {
  int16_t x[kMaxBatch][kMaxCodeDim];  // in the order of pieces
  // score = (sum of products - excess) * unit + base. Each row's value is repeated for the keys
  // that are scored at a time.
  int32_t excess[kSums];
  float unit[kSums], base[kSums];
};

// Multiplies rows of the query by the scales of a group of keys, and rounds them.
template <bool kIsInt4, int kRows>
void round_query(const float* query, int64_t dim, const uint16_t* pairs, RoundedQuery& rounded) {
  alignas(32) float folded[kMaxBatch][kMaxCodeDim];
  __m256 largest[kRows], base[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) largest[r] = base[r] = _mm256_setzero_ps();
  for (int64_t i = 0; i < dim; i += 8) {
    const int64_t channel = first_channel<kIsInt4>(i / 16, dim) + i % 16;
    const auto* lanes = reinterpret_cast<const __m256i*>(pairs + 2 * channel);
    const Scales scales = widen_scales(_mm256_loadu_si256(lanes), middle_code(kIsInt4));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256 q = _mm256_loadu_ps(query + r * dim + channel);
      const __m256 x = _mm256_mul_ps(q, scales.scale);
      _mm256_store_ps(folded[r] + i, x);
      largest[r] = _mm256_max_ps(largest[r], abs_lanes(x));
      base[r] = _mm256_fmadd_ps(q, scales.middle, base[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const float top = max_lane(largest[r]);
    const __m256i total = round_row(folded[r], dim, top, rounded.x[r]);
    constexpr int kKeys = keys_at_once(kRows);
    std::fill_n(rounded.excess + r * kKeys, kKeys, sum_lanes(excess_of<kIsInt4>(total)));
    std::fill_n(rounded.unit + r * kKeys, kKeys, top / kLargest);
    std::fill_n(rounded.base + r * kKeys, kKeys, sum_lanes(base[r]));
  }
}

// Scale and middle of each group of channels, key by key; 0 past the last key.
struct alignas(32) KeyScales {
  float scale[kMaxGroups][kMaxKeys], middle[kMaxGroups][kMaxKeys];
};

// Keys rounded up to 16, which are rounded together.
inline int64_t whole_vectors(int64_t num_keys) { return (num_keys + 15) / 16 * 16; }

// Transposes the pairs of 8 keys with four groups each, as heads of 128 channels have.
inline void transpose_four_groups(const uint32_t* pairs, __m256i* groups) {
  __m256i v[4], t[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs) + i);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  // The even keys are in the low half now, the odd ones in the high half.
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
#pragma GCC unroll 4
  for (int group = 0; group < 4; ++group) {
    const __m256i both = group % 2 == 0 ? _mm256_unpacklo_epi64(t[group / 2], t[2 + group / 2])
                                        : _mm256_unpackhi_epi64(t[group / 2], t[2 + group / 2]);
    groups[group] = _mm256_permutevar8x32_epi32(both, order);
  }
}

inline void spread_scales(const CodeRun& run, float c, KeyScales& spread) {
  alignas(32) uint32_t words[8 * kMaxGroups];
  for (int64_t t = 0; t < whole_vectors(run.count); t += 8) {
    const int64_t num_words = std::clamp<int64_t>(run.count - t, 0, 8) * run.groups;
    if (num_words < 8 * run.groups) std::fill_n(words, 8 * run.groups, 0);
    std::memcpy(words, run.scales + 2 * (run.slot + t) * run.groups, 4 * num_words);
    __m256i groups[kMaxGroups];
    if (run.groups == 4) {
      transpose_four_groups(words, groups);
    } else {
      const auto stride = static_cast<int32_t>(run.groups);
      const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
      const __m256i places = _mm256_mullo_epi32(lanes, _mm256_set1_epi32(stride));
      for (int64_t group = 0; group < run.groups; ++group) {
        groups[group] =
            _mm256_i32gather_epi32(reinterpret_cast<const int*>(words + group), places, 4);
      }
    }
    for (int64_t group = 0; group < run.groups; ++group) {
      const Scales scales = widen_scales(groups[group], c);
      _mm256_store_ps(spread.scale[group] + t, scales.scale);
      _mm256_store_ps(spread.middle[group] + t, scales.middle);
    }
  }
}

constexpr int64_t kMaxSets = kMaxBatch * kMaxGroups;

// One set of integers per row and group: set r * groups + g is row r's for group g of channels.
struct alignas(32) RoundedWeights {
  int16_t x[kMaxSets][kMaxKeys];
  int32_t excess[kMaxSets];
  float unit[kMaxSets], base[kMaxSets];
};

// Rounds weight times scale. (The largest weight times the largest scale bounds the products, but
// where these are of different keys, a unit from it may round all products to 0.)
template <bool kIsInt4>
void round_weights(const float* weights, int64_t num_rows, const CodeRun& run,
                   const KeyScales& scales, RoundedWeights& rounded) {
  const int64_t num_keys = whole_vectors(run.count);
  __m256 base[kMaxSets];
  __m256i total[kMaxSets];
  for (int64_t r = 0; r < num_rows; ++r) {
    alignas(32) float row[kMaxKeys], products[kMaxKeys];
    std::copy_n(weights + r * kCodeRowStride, run.count, row);
    std::fill(row + run.count, row + num_keys, 0.0f);
    for (int64_t group = 0; group < run.groups; ++group) {
      const int64_t set = r * run.groups + group;
      __m256 sum = _mm256_setzero_ps(), largest = _mm256_setzero_ps();
      for (int64_t t = 0; t < num_keys; t += 8) {
        const __m256 w = _mm256_load_ps(row + t);
        const __m256 x = _mm256_mul_ps(w, _mm256_load_ps(scales.scale[group] + t));
        _mm256_store_ps(products + t, x);
        largest = _mm256_max_ps(largest, abs_lanes(x));
        sum = _mm256_fmadd_ps(w, _mm256_load_ps(scales.middle[group] + t), sum);
      }
      base[set] = sum;
      rounded.unit[set] = max_lane(largest) / kLargest;
      total[set] = round_row(products, num_keys, max_lane(largest), rounded.x[set]);
    }
  }
  const int64_t num_sets = num_rows * run.groups;
  for (int64_t set = num_sets; set % 8 != 0; ++set) {
    base[set] = _mm256_setzero_ps();
    total[set] = _mm256_setzero_si256();
  }
  for (int64_t set = 0; set < num_sets; set += 8) {
    _mm256_store_ps(rounded.base + set, sum_lanes_of_8(base + set));
    _mm256_store_si256(reinterpret_cast<__m256i*>(rounded.excess + set),
                       excess_of<kIsInt4>(sum_lanes_of_8(total + set)));
  }
}

}  // namespace
}  // namespace kvkernels
