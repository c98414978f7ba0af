// Multiplies rows of floats by the scales of codes ("folds" them) and rounds the products to
// integers of up to 16 bits, so that sums of their products with codes are exact (see
// attention_codes_avx512_vnni.cpp). Only for files compiled for AVX-512, on processors with
// AVX512-VNNI.
#pragma once

#include <array>

#include "cpu/attention_codes_avx512.h"

namespace kvkernels {
namespace {

// sum + a * b, products of neighbouring 16-bit integers added in pairs. Written out because GCC 12
// copies the sum to another register and back around the intrinsic.
[[gnu::always_inline]] inline __m512i add_products(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// What the integers of up to 16 sets stand for: x = integer * unit.
struct Units {
  __m512 unit, inverse;
};

// Units for which each set's largest magnitude becomes the integer `limit_number`.
inline Units units_of(__m512 largest, float limit_number) {
  const __m512 limit = _mm512_set1_ps(limit_number);
  const __mmask16 is_some = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return {_mm512_div_ps(largest, limit), _mm512_maskz_div_ps(is_some, limit, largest)};
}

// Rounds a and b, divided by the unit, to 32 integers, stores them in order, and adds them to
// `total` in pairs.
inline void round(__m512 a, __m512 b, __m512 inverse, int16_t* numbers, __m512i& total) {
  // A float of this size has a last bit that counts units: the low half of the sum is the integer.
  const __m512 magic = _mm512_set1_ps(0x1.8p23f);
  const __m512i even = _mm512_set_epi32(0x3e003c, 0x3a0038, 0x360034, 0x320030, 0x2e002c, 0x2a0028,
                                        0x260024, 0x220020, 0x1e001c, 0x1a0018, 0x160014, 0x120010,
                                        0x0e000c, 0x0a0008, 0x060004, 0x020000);
  const __m512i x =
      _mm512_permutex2var_epi16(_mm512_castps_si512(_mm512_fmadd_ps(a, inverse, magic)), even,
                                _mm512_castps_si512(_mm512_fmadd_ps(b, inverse, magic)));
  _mm512_store_si512(numbers, x);
  total = add_products(total, x, _mm512_set1_epi16(1));
}

// Sum of x times the codes' middle: by this much the sum of products with unsigned codes exceeds
// that with codes around 0.
template <bool kIsInt4>
__m512i excess_of(__m512i total) {
  constexpr int kBits = kIsInt4 ? 3 : 7;
  static_assert(1 << kBits == static_cast<int>(middle_code(kIsInt4)));
  return _mm512_slli_epi32(total, kBits);
}

struct alignas(64) RoundedQuery {
  int16_t x[kMaxBatch][kMaxCodeDim];  // in the order of pieces
  // score = (sum of products - excess) * unit + base; quarter r is for row r.
  int32_t excess[16];
  float unit[16], base[16];
};

// Multiplies rows of the query by the scales of a group of keys, and rounds them.
template <bool kIsInt4, int kRows>
void round_query(const float* query, int64_t dim, const uint16_t* pairs, float limit,
                 RoundedQuery& rounded) {
  const Pieces<kIsInt4> pieces = {dim};
  const int64_t num_halves = 2 * pieces.count();
  alignas(64) float folded[kMaxBatch][kMaxCodeDim];
  __m512 largest[kRows], base[kRows], total[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) largest[r] = base[r] = _mm512_setzero_ps();
  for (int64_t part = 0; part < 2 * num_halves; ++part) {
    const int64_t half = part / 2 % 2, first = pieces.begin(part / 4, half) + part % 2 * 16;
    const __mmask16 mask = first_lanes(pieces.end(half) - first);
    const Scales scales = load_scales(pairs + 2 * first, mask, middle_code(kIsInt4));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512 q = _mm512_maskz_loadu_ps(mask, query + r * dim + first);
      const __m512 x = _mm512_mul_ps(q, scales.scale);
      _mm512_store_ps(folded[r] + 16 * part, x);
      largest[r] = _mm512_max_ps(largest[r], _mm512_abs_ps(x));
      base[r] = _mm512_fmadd_ps(q, scales.middle, base[r]);
    }
  }
  const Units units = units_of(combine_rows<kRows>(largest, MaxOf()), limit);
  _mm512_store_ps(rounded.unit, units.unit);
  _mm512_store_ps(rounded.base, combine_rows<kRows>(base, SumOf()));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512 inverse = _mm512_permutexvar_ps(_mm512_set1_epi32(4 * r), units.inverse);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t half = 0; half < num_halves; ++half) {
      const float* x = folded[r] + 32 * half;
      round(_mm512_load_ps(x), _mm512_load_ps(x + 16), inverse, rounded.x[r] + 32 * half, sum);
    }
    total[r] = _mm512_castsi512_ps(sum);
  }
  const __m512 totals = combine_rows<kRows>(total, IntegerSumOf());
  _mm512_store_si512(rounded.excess, excess_of<kIsInt4>(_mm512_castps_si512(totals)));
}

constexpr int64_t kMaxSets = kMaxBatch * kMaxGroups;

// One set of integers per row and group of channels; the set's other numbers are at r * groups + g.
struct alignas(64) RoundedWeights {
  int16_t x[kMaxBatch][kMaxGroups][kMaxKeys];
  int32_t excess[kMaxSets];
  float unit[kMaxSets], base[kMaxSets];
};

// For one number of groups: the lanes of find_tops() that hold the largest weight of each set's
// row, and the largest scale of its group.
struct alignas(64) SetLanes {
  int32_t row[kMaxSets], group[kMaxSets];
};

constexpr std::array<SetLanes, kMaxGroups + 1> make_set_lanes() {
  std::array<SetLanes, kMaxGroups + 1> lanes = {};
  for (int64_t groups = 1; groups <= kMaxGroups; ++groups) {
    for (int64_t set = 0; set < kMaxSets; ++set) {
      lanes[groups].row[set] = static_cast<int32_t>(set / groups % kMaxBatch);
      lanes[groups].group[set] = static_cast<int32_t>(kMaxBatch + set % groups);
    }
  }
  return lanes;
}

constexpr std::array<SetLanes, kMaxGroups + 1> kSetLanes = make_set_lanes();

// Masks for the keys of a tile that a run has.
struct KeyMasks {
  __mmask16 is_key[kMaxKeys / 16];

  explicit KeyMasks(int64_t count) {
    for (int64_t i = 0; i < kMaxKeys / 16; ++i) is_key[i] = first_lanes(count - 16 * i);
  }

  // The numbers of 16 keys from t on, 0 past the last.
  __m512 load(const float* keys, int64_t t) const {
    return _mm512_maskz_loadu_ps(is_key[t / 16], keys + t);
  }
};

inline __m512 largest_of(const KeyMasks& masks, const float* keys) {
  __m512 found = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int64_t t = 0; t < kMaxKeys; t += 16) {
    found = _mm512_max_ps(found, _mm512_abs_ps(masks.load(keys, t)));
  }
  return found;
}

// Combines the lanes of each of kCount vectors, 4 or 16: lane i of the result is vector i's.
template <int kCount, typename Combine>
inline __m512 combine_lanes(const __m512* v, const Combine& combine) {
  static_assert(kCount == 4 || kCount == 16);
  if constexpr (kCount == 16) return combine_lanes_of_16(v, combine);
  const __m512i quarters = _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0);
  return _mm512_permutexvar_ps(quarters, combine_lanes_of_4(v, combine));
}

// The largest weight of each row in the first lanes, and from lane kMaxBatch on the largest scale
// of each group. Their product bounds weight times scale, and takes one pass less than the largest
// product.
inline __m512 find_tops(const float* weights, int64_t num_rows, const KeyScales& scales,
                        int64_t groups, const KeyMasks& keys) {
  static_assert(kMaxBatch == 4 && kMaxGroups <= 12);
  __m512 of_row[kMaxBatch], of_group[16];
  for (int64_t r = 0; r < kMaxBatch; ++r) {
    of_row[r] = r < num_rows ? largest_of(keys, weights + r * kCodeRowStride) : _mm512_setzero_ps();
  }
  for (int64_t group = 0; group < groups; ++group) {
    of_group[group] = largest_of(keys, scales.scale[group]);
  }
  for (int64_t group = groups; group < 16; ++group) of_group[group] = _mm512_setzero_ps();
  const __m512i rows_then_groups =
      _mm512_set_epi32(27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512 rows = combine_lanes<4>(of_row, MaxOf());
  const __m512 tops =
      groups <= 4 ? combine_lanes<4>(of_group, MaxOf()) : combine_lanes<16>(of_group, MaxOf());
  return _mm512_permutex2var_ps(rows, rows_then_groups, tops);
}

// Rounds the sets [first, end), at most kCount.
template <bool kIsInt4, int kCount>
void round_sets(int64_t first, int64_t end, const float* weights, const CodeRun& run,
                const KeyScales& scales, const KeyMasks& keys, __m512 tops, float limit,
                RoundedWeights& rounded) {
  const SetLanes& lanes = kSetLanes[run.groups];
  const __m512 top_weight = _mm512_permutexvar_ps(_mm512_load_si512(lanes.row + first), tops);
  const __m512 top_scale = _mm512_permutexvar_ps(_mm512_load_si512(lanes.group + first), tops);
  const Units units = units_of(_mm512_mul_ps(top_weight, top_scale), limit);
  __m512 base[kCount], total[kCount];
  for (int64_t i = 0; i < kCount; ++i) base[i] = total[i] = _mm512_setzero_ps();
  for (int64_t set = first; set < end; ++set) {
    const int64_t r = set / run.groups, group = set % run.groups;
    const float* row = weights + r * kCodeRowStride;
    const __m512i lane = _mm512_set1_epi32(static_cast<int32_t>(set - first));
    const __m512 inverse = _mm512_permutexvar_ps(lane, units.inverse);
    __m512 sum = _mm512_setzero_ps();
    __m512i numbers = _mm512_setzero_si512();
    for (int64_t t = 0; t < run.count; t += 32) {
      const __m512 a = keys.load(row, t), b = keys.load(row, t + 16);
      const float *scale = scales.scale[group] + t, *middle = scales.middle[group] + t;
      sum = _mm512_fmadd_ps(a, _mm512_load_ps(middle), sum);
      sum = _mm512_fmadd_ps(b, _mm512_load_ps(middle + 16), sum);
      round(_mm512_mul_ps(a, _mm512_load_ps(scale)), _mm512_mul_ps(b, _mm512_load_ps(scale + 16)),
            inverse, rounded.x[r][group] + t, numbers);
    }
    base[set - first] = sum;
    total[set - first] = _mm512_castsi512_ps(numbers);
  }
  const __m512i totals = _mm512_castps_si512(combine_lanes<kCount>(total, IntegerSumOf()));
  _mm512_store_ps(rounded.unit + first, units.unit);
  _mm512_store_ps(rounded.base + first, combine_lanes<kCount>(base, SumOf()));
  _mm512_store_si512(rounded.excess + first, excess_of<kIsInt4>(totals));
}

template <bool kIsInt4>
void round_weights(const float* weights, int64_t num_rows, const CodeRun& run,
                   const KeyScales& scales, float limit, RoundedWeights& rounded) {
  const int64_t num_sets = num_rows * run.groups;
  const KeyMasks keys(run.count);
  const __m512 tops = find_tops(weights, num_rows, scales, run.groups, keys);
  if (num_sets <= 4) {
    return round_sets<kIsInt4, 4>(0, num_sets, weights, run, scales, keys, tops, limit, rounded);
  }
  for (int64_t first = 0; first < num_sets; first += 16) {
    round_sets<kIsInt4, 16>(first, std::min(first + 16, num_sets), weights, run, scales, keys, tops,
                            limit, rounded);
  }
}

}  // namespace
}  // namespace kvkernels
