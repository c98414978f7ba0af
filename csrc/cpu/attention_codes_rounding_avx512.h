// Multiplies rows of floats by the scales of codes ("folds" them) and rounds the products to
// integers of up to 16 bits, so that sums of their products with codes are exact (see
// attention_codes_avx512_vnni.cpp). Only for files compiled for AVX-512, on processors with
// AVX512-VNNI.
#pragma once

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

// The larger magnitude, lane by lane; a number where the other is NaN.
inline __m512 larger_magnitude(__m512 a, __m512 b) { return _mm512_range_ps(a, b, 0b1011); }

// Combines the lanes of each of kCount vectors, 4 or 16: lane i of the result is vector i's.
template <int kCount, typename Combine>
inline __m512 combine_lanes(const __m512* v, const Combine& combine) {
  static_assert(kCount == 4 || kCount == 16);
  if constexpr (kCount == 16) return combine_lanes_of_16(v, combine);
  const __m512i quarters = _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0);
  return _mm512_permutexvar_ps(quarters, combine_lanes_of_4(v, combine));
}

// Rounds the sets [first, end), at most kCount. (The largest weight times the largest scale bounds
// the products, but where these are of different keys, a unit from it may round all products to 0.)
template <bool kIsInt4, int kCount>
void round_sets(int64_t first, int64_t end, const float* weights, const CodeRun& run,
                const KeyScales& scales, const KeyMasks& keys, float limit,
                RoundedWeights& rounded) {
  const int64_t num_keys = whole_pairs(run.count);
  alignas(64) float products[kCount][kMaxKeys];
  __m512 largest[kCount], base[kCount], total[kCount];
  for (int64_t i = 0; i < kCount; ++i) largest[i] = base[i] = total[i] = _mm512_setzero_ps();
  for (int64_t set = first; set < end; ++set) {
    const int64_t r = set / run.groups, group = set % run.groups;
    __m512 found = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < num_keys; t += 16) {
      const __m512 weight = keys.load(weights + r * kCodeRowStride, t);
      const __m512 x = _mm512_mul_ps(weight, _mm512_load_ps(scales.scale[group] + t));
      _mm512_store_ps(products[set - first] + t, x);
      found = larger_magnitude(found, x);
      sum = _mm512_fmadd_ps(weight, _mm512_load_ps(scales.middle[group] + t), sum);
    }
    largest[set - first] = found;
    base[set - first] = sum;
  }
  const Units units = units_of(combine_lanes<kCount>(largest, MaxOf()), limit);
  for (int64_t set = first; set < end; ++set) {
    const float* row = products[set - first];
    int16_t* numbers = rounded.x[set / run.groups][set % run.groups];
    const __m512i lane = _mm512_set1_epi32(static_cast<int32_t>(set - first));
    const __m512 inverse = _mm512_permutexvar_ps(lane, units.inverse);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t t = 0; t < num_keys; t += 32) {
      round(_mm512_load_ps(row + t), _mm512_load_ps(row + t + 16), inverse, numbers + t, sum);
    }
    total[set - first] = _mm512_castsi512_ps(sum);
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
  if (num_sets <= 4) {
    return round_sets<kIsInt4, 4>(0, num_sets, weights, run, scales, keys, limit, rounded);
  }
  for (int64_t first = 0; first < num_sets; first += 16) {
    round_sets<kIsInt4, 16>(first, std::min(first + 16, num_sets), weights, run, scales, keys,
                            limit, rounded);
  }
}

}  // namespace
}  // namespace kvkernels
