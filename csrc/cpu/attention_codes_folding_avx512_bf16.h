// Multiplies rows of floats by the scales of 4-bit codes ("folds" them) and rounds the products to
// bfloat16 (see attention_codes_avx512_bf16.cpp). Only for files compiled for AVX512-BF16.
#pragma once

#include <array>
#include <bit>

#include "cpu/attention_codes_avx512.h"
#include "cpu/simd_avx512_bf16.h"

namespace kvkernels {
namespace {

using Piece = Pieces<true>;

constexpr float kMiddle = middle_code(true);

inline __m512i round_to_pairs(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// ---- queries -------------------------------------------------------------------------------

// Pairs of bfloat16 in the order that transpose_keys and the nibbles of its columns give: 4 pairs
// for each column.
struct alignas(64) FoldedQuery {
  int32_t pairs[kMaxBatch][kMaxCodeDim / 2];
  float base[16];  // quarter r is for row r: the part of its scores that codes do not change
};

// kIsWhole: the channels fill all pieces.
template <bool kIsWhole, int kRows>
void fold_query(const float* query, int64_t dim, const uint16_t* scales, FoldedQuery& folded) {
  const Piece pieces = {dim};
  // Pairs take from the halves of a piece: channels 0 and 2 of the first half, of the second half,
  // channels 1 and 3 of both; then those 4 channels further on, and so on.
  const __m512i first_columns =
      _mm512_set_epi16(47, 45, 15, 13, 46, 44, 14, 12, 43, 41, 11, 9, 42, 40, 10, 8, 39, 37, 7, 5,
                       38, 36, 6, 4, 35, 33, 3, 1, 34, 32, 2, 0);
  const __m512i last_columns = _mm512_add_epi16(first_columns, _mm512_set1_epi16(16));
  __m512 base[kRows], more[kRows];  // two sums, so that additions need not wait for each other
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) base[r] = more[r] = _mm512_setzero_ps();
  for (int64_t piece = 0; piece < pieces.count(); ++piece) {
    __m512i halves[kRows][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t first = pieces.begin(piece, half);
      const int64_t count = kIsWhole ? 32 : pieces.end(half) - first;
      const Scales low = load_scales(scales + 2 * first, first_lanes(count), kMiddle);
      const Scales high = load_scales(scales + 2 * first + 32, first_lanes(count - 16), kMiddle);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const float* row = query + r * dim + first;
        const __m512 a = _mm512_maskz_loadu_ps(first_lanes(count), row);
        const __m512 b = _mm512_maskz_loadu_ps(first_lanes(count - 16), row + 16);
        base[r] = _mm512_fmadd_ps(a, low.middle, base[r]);
        more[r] = _mm512_fmadd_ps(b, high.middle, more[r]);
        halves[r][half] = round_to_pairs(_mm512_mul_ps(a, low.scale), _mm512_mul_ps(b, high.scale));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      int32_t* const pairs = folded.pairs[r] + 32 * piece;
      const auto [low, high] = halves[r];
      _mm512_store_si512(pairs, _mm512_permutex2var_epi16(low, first_columns, high));
      _mm512_store_si512(pairs + 16, _mm512_permutex2var_epi16(low, last_columns, high));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) base[r] = _mm512_add_ps(base[r], more[r]);
  _mm512_store_ps(folded.base, combine_rows<kRows>(base, SumOf()));
}

// ---- weights -------------------------------------------------------------------------------

// Weights are multiplied by the scales of two keys and a group of channels per pair: pair by pair
// of keys, `stride` pairs of weights each, which is the number of groups rounded up to a power of
// two. 16 floats belong to 16 / stride keys, whose scales fill one vector. Index vectors take the
// numbers of these 16 from those vectors.
struct alignas(64) LaneOrder {
  int16_t scales[32];   // indices of 16 scales, then of their minimums
  int32_t weights[16];  // indices of weights, one a key
  int64_t stride;
};

constexpr std::array<LaneOrder, kMaxGroups + 1> make_lane_orders() {
  std::array<LaneOrder, kMaxGroups + 1> orders = {};
  for (int groups = 1; groups <= kMaxGroups; ++groups) {
    LaneOrder& order = orders[groups];
    order.stride = static_cast<int64_t>(std::bit_ceil(static_cast<unsigned>(groups)));
    const int stride = static_cast<int>(order.stride);
    for (int lane = 0; lane < 16; ++lane) {
      const int pair = lane / 2, key = pair / stride * 2 + lane % 2;
      const int group = pair % stride < groups ? pair % stride : 0;
      order.scales[lane] = static_cast<int16_t>(2 * (key * groups + group));
      order.scales[lane + 16] = static_cast<int16_t>(order.scales[lane] + 1);
      order.weights[lane] = key;
    }
  }
  return orders;
}

constexpr std::array<LaneOrder, kMaxGroups + 1> kLaneOrders = make_lane_orders();

constexpr int64_t kPairsOfRow = kMaxKeys / 2 * kMaxGroups;

// For each row: pairs of neighbouring keys, as bfloat16, in the order of LaneOrder; and in lane
// 2 * group of `base` the part of the group's sums that codes do not change.
struct alignas(64) FoldedWeights {
  int32_t pairs[kMaxBatch][kPairsOfRow];
  float base[kMaxBatch][16];
};

// Adds the lanes of each group, of which every 2 * stride lanes hold two.
inline __m512 sum_keys(__m512 lanes, int64_t stride) {
  if (stride <= 4) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4e));
  if (stride <= 2) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xb1));
  if (stride == 1) lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0x4e));
  return _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0xb1));
}

// Keys go lot by lot: those that 16 pairs belong to, in two parts of 16 floats. kStride is
// LaneOrder's.
template <int kStride>
struct Lot {
  static constexpr int64_t kKeysAPart = 16 / kStride, kKeys = 2 * kKeysAPart;

  __mmask16 keys[2], scales[2];  // lanes of the keys that are there, and of their scales

  Lot(int64_t num_keys, int64_t groups)
      : keys{first_lanes(num_keys), first_lanes(num_keys - kKeysAPart)},
        scales{first_lanes(num_keys * groups), first_lanes((num_keys - kKeysAPart) * groups)} {}
};

// Loads `kCount` floats into the lowest lanes; the others hold anything.
template <int64_t kCount>
[[gnu::always_inline]] inline __m512 load_lowest(const float* p) {
  if constexpr (kCount == 16) return _mm512_loadu_ps(p);
  if constexpr (kCount == 8) return _mm512_castps256_ps512(_mm256_loadu_ps(p));
  if constexpr (kCount == 4) return _mm512_castps128_ps512(_mm_loadu_ps(p));
  return _mm512_castps128_ps512(_mm_castsi128_ps(_mm_loadu_si64(p)));
}

template <int kRows, int kStride, bool kIsWhole>
[[gnu::always_inline]] inline void fold_lot(const Lot<kStride>& lot, int64_t groups,
                                            const float* weights, const uint16_t* scales,
                                            __m512 (*base)[2], int32_t* target) {
  constexpr int64_t kKeysAPart = Lot<kStride>::kKeysAPart;
  const __m512i scale_order = _mm512_load_si512(kLaneOrders[groups].scales);
  const __m512i weight_order = _mm512_load_si512(kLaneOrders[groups].weights);
  Scales of_part[2];
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    const __m512i pairs =
        _mm512_maskz_loadu_epi32(lot.scales[part], scales + 2 * part * kKeysAPart * groups);
    of_part[part] = widen_scales(_mm512_permutexvar_epi16(scale_order, pairs), kMiddle);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __m512 x[2];
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      const float* const row = weights + r * kCodeRowStride + part * kKeysAPart;
      const __m512 weight = _mm512_permutexvar_ps(
          weight_order,
          kIsWhole ? load_lowest<kKeysAPart>(row) : _mm512_maskz_loadu_ps(lot.keys[part], row));
      base[r][part] = _mm512_fmadd_ps(weight, of_part[part].middle, base[r][part]);
      x[part] = _mm512_mul_ps(weight, of_part[part].scale);
    }
    _mm512_store_si512(target + r * kPairsOfRow, round_to_pairs(x[0], x[1]));
  }
}

template <int kRows, int kStride>
void fold_lots(const float* weights, const CodeRun& run, FoldedWeights& folded) {
  using Some = Lot<kStride>;
  const int64_t groups = run.groups, count = run.count;
  const uint16_t* const scales = run.scales + run.slot * groups * 2;
  __m512 base[kRows][2];  // of the two parts, so that additions need not wait for each other
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) base[r][0] = base[r][1] = _mm512_setzero_ps();
  // Masks for each lot would take a third of the time.
  const Some whole(Some::kKeys, groups);
  int64_t t = 0;
  int32_t* target = folded.pairs[0];
  for (; t + Some::kKeys <= count; t += Some::kKeys, target += 16) {
    fold_lot<kRows, kStride, true>(whole, groups, weights + t, scales + 2 * t * groups, base,
                                   target);
  }
  if (t < count) {
    fold_lot<kRows, kStride, false>(Some(count - t, groups), groups, weights + t,
                                    scales + 2 * t * groups, base, target);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512 sum = _mm512_add_ps(base[r][0], base[r][1]);
    _mm512_store_ps(folded.base[r], sum_keys(sum, kStride));
  }
}

template <int kRows>
void fold_weights(const float* weights, const CodeRun& run, FoldedWeights& folded) {
  switch (kLaneOrders[run.groups].stride) {
    case 1:
      return fold_lots<kRows, 1>(weights, run, folded);
    case 2:
      return fold_lots<kRows, 2>(weights, run, folded);
    case 4:
      return fold_lots<kRows, 4>(weights, run, folded);
    default:
      return fold_lots<kRows, 8>(weights, run, folded);
  }
}

}  // namespace
}  // namespace kvkernels
