// Turns scores into weights, for the matrix-tile attention: each lane is a row of the query.
#pragma once

#include "cpu/attention_amx_work.h"
#include "cpu/simd_avx512_bf16.h"

namespace kvkernels {
namespace {

// Soft cap, ALiBi and tree mask for a group. Scores lie as [key, row], but adjust_scores() takes
// one row at a time: so they are transposed there and back.
void adjust_group(const Work& work, int64_t group, int64_t begin, int64_t num_keys, float* scores) {
  alignas(64) float by_row[kLanes][kKeys];
  for (int64_t part = 0; part < kParts; ++part) {
    __m512 block[kLanes];
    for (int64_t t = 0; t < kLanes; ++t) {
      block[t] = _mm512_load_ps(scores + (part * kLanes + t) * kLanes);
    }
    transpose_16x16(block);
    for (int64_t n = 0; n < kLanes; ++n) _mm512_store_ps(by_row[n] + part * kLanes, block[n]);
  }
  for (int64_t n = 0; n < kLanes && group * kLanes + n < work.count; ++n) {
    adjust_scores(*work.tile, work.tile->row_begin + group * kLanes + n, 0, begin, num_keys,
                  by_row[n]);
  }
  const int64_t set_lanes = kLanes / work.num_sets;
  for (int64_t n = set_lanes; n < kLanes; ++n) {
    std::memcpy(by_row[n], by_row[n % set_lanes], sizeof(by_row[n]));
  }
  for (int64_t part = 0; part < kParts; ++part) {
    __m512 block[kLanes];
    for (int64_t n = 0; n < kLanes; ++n) block[n] = _mm512_load_ps(by_row[n] + part * kLanes);
    transpose_16x16(block);
    for (int64_t t = 0; t < kLanes; ++t) {
      _mm512_store_ps(scores + (part * kLanes + t) * kLanes, block[t]);
    }
  }
}

// With up to 8 rows each row has a lane in both of two sets of lanes, and set s goes through the
// keys from s * kKeys / 2 on: half as many vectors of scores.
template <int kSets>
constexpr int64_t kSetKeys = kKeys / kSets;
template <int kSets>
constexpr int64_t kSetLanes = kLanes / kSets;

// Loads the scores of one key of each set.
template <int kSets>
__m512 load_scores(const float* scores, int64_t key) {
  const __m512 first = _mm512_load_ps(scores + key * kLanes);
  if constexpr (kSets == 1) return first;
  return _mm512_mask_load_ps(first, 0xff00, scores + (kSetKeys<kSets> + key) * kLanes);
}

// The maximum over each row's lanes, in all of them.
template <int kSets>
__m512 max_of_sets(__m512 v) {
  return kSets == 1 ? v : _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
}

// Which lanes' rows see a key. kIsMasked is false where all rows see all keys; the results then are
// the same bits.
template <bool kIsMasked>
struct Seen {
  __m512i first, last;

  __mmask16 at(int64_t key) const {
    if constexpr (!kIsMasked) return 0xffff;
    const __m512i keys = _mm512_set1_epi32(static_cast<int32_t>(key));
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(keys, first), keys, last);
  }
};

// Turns a group's scores of the keys from `begin` on into weights, updates the running maxima and
// sums, and multiplies the rows' earlier output by their decay.
template <bool kIsMasked, int kSets>
void weigh_group(Work& work, int64_t group, int64_t begin, const float* scores, uint16_t* weights) {
  const int64_t row = group * kLanes;
  const Seen<kIsMasked> seen = {_mm512_load_si512(work.first + row),
                                _mm512_load_si512(work.last + row)};
  const __m512 scales = _mm512_set1_ps(work.scale), lowest = _mm512_set1_ps(-kInfinity);
  __m512 top[4] = {lowest, lowest, lowest, lowest};
  for (int64_t t = 0; t < kSetKeys<kSets>; t += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 score = load_scores<kSets>(scores, t + i);
      top[i] =
          _mm512_max_ps(top[i], _mm512_mask_mul_ps(lowest, seen.at(begin + t + i), score, scales));
    }
  }
  const __m512 old_max = _mm512_load_ps(work.max + row);
  const __m512 tile_max =
      _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
  const __m512 new_max = _mm512_max_ps(old_max, max_of_sets<kSets>(tile_max));
  _mm512_store_ps(work.max + row, new_max);
  // If every score so far is minus infinity, the weights must come out as 0, not as NaN.
  const __m512 base =
      _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(new_max, lowest, _CMP_NEQ_UQ), new_max);
  const __m512 decay = exp2_of<BFloat16>(_mm512_sub_ps(old_max, base));
  __m512 sums[4] = {_mm512_mul_ps(_mm512_load_ps(work.sum + row), decay)};
  sums[1] = sums[2] = sums[3] = _mm512_setzero_ps();
  constexpr int64_t kSetHalves = kHalves / kSets;
  for (int64_t half = 0; half < kSetHalves; ++half) {
    __m512 pairs[kLanes];
#pragma GCC unroll 16
    for (int64_t j = 0; j < kLanes; ++j) {
      const int64_t key = half * kStep + 2 * j;
      const __m512 even = rounded_product(load_scores<kSets>(scores, key), scales);
      const __m512 odd = rounded_product(load_scores<kSets>(scores, key + 1), scales);
      const __m512 a =
          _mm512_maskz_mov_ps(seen.at(begin + key), exp2_of<BFloat16>(_mm512_sub_ps(even, base)));
      const __m512 b = _mm512_maskz_mov_ps(seen.at(begin + key + 1),
                                           exp2_of<BFloat16>(_mm512_sub_ps(odd, base)));
      sums[j % 2 * 2] = _mm512_add_ps(sums[j % 2 * 2], a);
      sums[j % 2 * 2 + 1] = _mm512_add_ps(sums[j % 2 * 2 + 1], b);
      pairs[j] = round_pairs(a, b);
    }
    transpose_16x16(pairs);
    for (int64_t n = 0; n < kLanes; ++n) {
      const int64_t part = n / kSetLanes<kSets> * kSetHalves + half, row = n % kSetLanes<kSets>;
      _mm512_store_ps(weights + (part * kLanes + row) * kStep, pairs[n]);
    }
  }
  _mm512_store_ps(work.sum + row,
                  _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
  if (_mm512_cmp_ps_mask(decay, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) return;
  alignas(64) float factors[kLanes];
  _mm512_store_ps(factors, decay);
  float* out = work.out + row * work.value_dim;
  for (int64_t n = 0; n < kSetLanes<kSets>; ++n) {
    const __m512 factor = _mm512_set1_ps(factors[n]);
    for (int64_t i = 0; i < work.value_dim; i += kLanes) {
      float* lanes = out + i * kLanes + n * kLanes;
      _mm512_store_ps(lanes, _mm512_mul_ps(_mm512_load_ps(lanes), factor));
    }
  }
}

// weigh_group, masked or not by what the group sees of the keys from `begin` on.
void weigh(Work& work, int64_t group, int64_t begin, const float* scores, uint16_t* weights) {
  // Later rows see later ranges, so the first and the last row bound them.
  const int64_t row = group * kLanes, last_set = kKeys - kKeys / work.num_sets;
  const bool is_masked =
      work.first[row + kLanes - 1] + last_set > begin || work.last[row] < begin + kKeys;
  const auto weigh_these = work.num_sets == 2
                               ? (is_masked ? weigh_group<true, 2> : weigh_group<false, 2>)
                               : (is_masked ? weigh_group<true, 1> : weigh_group<false, 1>);
  weigh_these(work, group, begin, scores, weights);
}

}  // namespace
}  // namespace kvkernels
