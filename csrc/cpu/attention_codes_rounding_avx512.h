// Rows of floats, folded with the scales of codes and rounded to whole numbers of up to 16 bits:
// what sums of products with codes are exact with (see attention_codes_avx512_vnni.cpp). Only for
// files compiled for AVX-512, on processors with AVX512-VNNI.
#pragma once

#include "cpu/attention_codes_avx512.h"

namespace kvkernels {
namespace {

// sum + a * b, of pairs of 16-bit numbers. Written out because GCC 12 copies the sum to another
// register and back around the intrinsic.
[[gnu::always_inline]] inline void add_products(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// A row of codes goes in pieces of 64 channels, two halves of 32: neighbours, or of 4-bit codes
// those that share their bytes.
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

// What whole numbers stand for, of up to 16 sets of them: x = number * unit.
struct Units {
  __m512 unit, inverse;
};

// From each set's largest magnitude, which becomes the number `limit`.
inline Units units_of(__m512 largest, float limit_number) {
  const __m512 limit = _mm512_set1_ps(limit_number);
  const __mmask16 is_some = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return {_mm512_div_ps(largest, limit), _mm512_maskz_div_ps(is_some, limit, largest)};
}

// Writes 32 numbers, and adds them to `total`.
inline void round(__m512 a, __m512 b, __m512 inverse, int16_t* numbers, __m512i& total) {
  // A float of this size ends at the units: the last bits of the sum are the number.
  const __m512 magic = _mm512_set1_ps(0x1.8p23f);
  const __m512i even = _mm512_set_epi32(0x3e003c, 0x3a0038, 0x360034, 0x320030, 0x2e002c, 0x2a0028,
                                        0x260024, 0x220020, 0x1e001c, 0x1a0018, 0x160014, 0x120010,
                                        0x0e000c, 0x0a0008, 0x060004, 0x020000);
  const __m512i x =
      _mm512_permutex2var_epi16(_mm512_castps_si512(_mm512_fmadd_ps(a, inverse, magic)), even,
                                _mm512_castps_si512(_mm512_fmadd_ps(b, inverse, magic)));
  _mm512_store_si512(numbers, x);
  add_products(total, x, _mm512_set1_epi16(1));
}

// Times the codes' middle: what unsigned codes add to the sum of products.
template <bool kIsInt4>
__m512i excess_of(__m512i total) {
  constexpr int kBits = kIsInt4 ? 3 : 7;
  static_assert(1 << kBits == static_cast<int>(middle_code(kIsInt4)));
  return _mm512_slli_epi32(total, kBits);
}

struct alignas(64) RoundedQuery {
  int16_t x[kMaxBatch][kMaxCodeDim];  // piece by piece
  // score = (sum of products - excess) * unit + base; each row's as often as there are keys at a
  // time.
  __m512i excess;
  __m512 unit, base;
};

// One vector for each row, repeated for the keys at a time.
template <int kRows, typename Vector>
[[gnu::always_inline]] inline void repeat_rows(const Vector* rows, Vector* repeated) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int row = i / keys_at_once(kRows);
    repeated[i] = rows[row < kRows ? row : kRows - 1];
  }
}

// Rounds rows of the query, folded with the scales of a group of keys.
template <bool kIsInt4, int kRows>
void round_query(const float* query, int64_t dim, const uint16_t* pairs, float limit,
                 RoundedQuery& rounded) {
  const Pieces<kIsInt4> pieces = {dim};
  const int64_t num_halves = 2 * pieces.count();
  alignas(64) float folded[kMaxBatch][kMaxCodeDim];
  __m512 largest[kRows], base[kRows], repeated[16];
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
  repeat_rows<kRows>(largest, repeated);
  const Units units = units_of(max_lanes_of_16(repeated), limit);
  repeat_rows<kRows>(base, repeated);
  rounded.unit = units.unit;
  rounded.base = sum_lanes_of_16(repeated);
  __m512i total[kRows], totals[16];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512 inverse =
        _mm512_permutexvar_ps(_mm512_set1_epi32(r * keys_at_once(kRows)), units.inverse);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t half = 0; half < num_halves; ++half) {
      const float* x = folded[r] + 32 * half;
      round(_mm512_load_ps(x), _mm512_load_ps(x + 16), inverse, rounded.x[r] + 32 * half, sum);
    }
    total[r] = sum;
  }
  repeat_rows<kRows>(total, totals);
  rounded.excess = excess_of<kIsInt4>(sum_lanes_of_16(totals));
}

constexpr int64_t kMaxSets = kMaxBatch * kMaxGroups;

// Set r * groups + g: row r's for group g of channels.
struct alignas(64) RoundedWeights {
  int16_t x[kMaxSets][kMaxKeys];
  int32_t excess[kMaxSets];
  float unit[kMaxSets], base[kMaxSets];
};

// The largest weight of each row times the largest scale of each group: of the numbers, a bound
// that costs a pass less than their maximum.
inline void bound_weights(const float* weights, int64_t num_rows, const CodeRun& run,
                          const KeyScales& scales, float* bounds) {
  __m512 largest[16];  // of rows, then of groups
  for (__m512& one : largest) one = _mm512_setzero_ps();
  for (int64_t t = 0; t < run.count; t += 16) {
    const __mmask16 mask = first_lanes(run.count - t);
    for (int64_t r = 0; r < num_rows; ++r) {
      const __m512 weight = _mm512_maskz_loadu_ps(mask, weights + r * kCodeRowStride + t);
      largest[r] = _mm512_max_ps(largest[r], weight);
    }
    for (int64_t group = 0; group < run.groups; ++group) {
      const __m512 scale = _mm512_abs_ps(_mm512_load_ps(scales.scale[group] + t));
      largest[kMaxBatch + group] = _mm512_max_ps(largest[kMaxBatch + group], scale);
    }
  }
  alignas(64) float top[16];
  _mm512_store_ps(top, max_lanes_of_16(largest));
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t group = 0; group < run.groups; ++group) {
      *bounds++ = top[r] * top[kMaxBatch + group];
    }
  }
}

template <bool kIsInt4>
void round_weights(const float* weights, int64_t num_rows, const CodeRun& run,
                   const KeyScales& scales, float limit, RoundedWeights& rounded) {
  const int64_t num_sets = num_rows * run.groups;
  alignas(64) float bounds[kMaxSets], inverse[kMaxSets];
  __mmask16 is_key[kMaxKeys / 16];
  for (int64_t i = 0; i < kMaxKeys / 16; ++i) is_key[i] = first_lanes(run.count - 16 * i);
  bound_weights(weights, num_rows, run, scales, bounds);
  for (int64_t first = 0; first < num_sets; first += 16) {
    const __mmask16 mask = first_lanes(num_sets - first);
    const Units units = units_of(_mm512_maskz_load_ps(mask, bounds + first), limit);
    _mm512_store_ps(inverse + first, units.inverse);
    _mm512_store_ps(rounded.unit + first, units.unit);
    __m512 base[16];
    __m512i total[16];
    for (int64_t i = 0; i < 16; ++i) {
      base[i] = _mm512_setzero_ps();
      total[i] = _mm512_setzero_si512();
    }
    for (int64_t set = first; set < std::min(first + 16, num_sets); ++set) {
      const float* row = weights + set / run.groups * kCodeRowStride;
      const int64_t group = set % run.groups;
      const __m512 set_inverse = _mm512_set1_ps(inverse[set]);
      __m512 sum = _mm512_setzero_ps();
      __m512i numbers = _mm512_setzero_si512();
      for (int64_t t = 0; t < run.count; t += 32) {
        const __m512 a = _mm512_maskz_loadu_ps(is_key[t / 16], row + t);
        const __m512 b = _mm512_maskz_loadu_ps(is_key[t / 16 + 1], row + t + 16);
        const float *scale = scales.scale[group] + t, *middle = scales.middle[group] + t;
        sum = _mm512_fmadd_ps(a, _mm512_load_ps(middle), sum);
        sum = _mm512_fmadd_ps(b, _mm512_load_ps(middle + 16), sum);
        round(_mm512_mul_ps(a, _mm512_load_ps(scale)), _mm512_mul_ps(b, _mm512_load_ps(scale + 16)),
              set_inverse, rounded.x[set] + t, numbers);
      }
      base[set - first] = sum;
      total[set - first] = numbers;
    }
    _mm512_store_ps(rounded.base + first, sum_lanes_of_16(base));
    _mm512_store_si512(rounded.excess + first, excess_of<kIsInt4>(sum_lanes_of_16(total)));
  }
}

}  // namespace
}  // namespace kvkernels
