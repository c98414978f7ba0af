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

// The order of numbers that belong to a key and a group of channels: key by key, `stride` lanes a
// key, which is the number of groups rounded up to a power of two. Index vectors take such numbers
// from two vectors of them, for keys at even and at odd places apart.
struct alignas(64) LaneOrder {
  int16_t even[32],
      odd[32];  // indices of scales, then of minimums, in two vectors of pairs of them
  int32_t even_weight[16], odd_weight[16];  // indices in two vectors of weights, one a key
  int64_t stride;
};

constexpr std::array<LaneOrder, kMaxGroups + 1> make_lane_orders() {
  std::array<LaneOrder, kMaxGroups + 1> orders = {};
  for (int groups = 1; groups <= kMaxGroups; ++groups) {
    LaneOrder& order = orders[groups];
    order.stride = static_cast<int64_t>(std::bit_ceil(static_cast<unsigned>(groups)));
    const int stride = static_cast<int>(order.stride), keys_a_vector = 16 / stride;
    for (int lane = 0; lane < 16; ++lane) {
      const int group = lane % stride < groups ? lane % stride : 0;
      for (int is_odd = 0; is_odd < 2; ++is_odd) {
        const int key = lane / stride * 2 + is_odd;
        const int pair = key / keys_a_vector * 16 + key % keys_a_vector * groups + group;
        int16_t* const numbers = is_odd ? order.odd : order.even;
        numbers[lane] = static_cast<int16_t>(2 * pair);
        numbers[lane + 16] = static_cast<int16_t>(2 * pair + 1);
        (is_odd ? order.odd_weight : order.even_weight)[lane] = key;
      }
    }
  }
  return orders;
}

constexpr std::array<LaneOrder, kMaxGroups + 1> kLaneOrders = make_lane_orders();

constexpr int64_t kPairsOfRow = kMaxKeys / 2 * kMaxGroups;

// For each row, in the order of LaneOrder: pairs of neighbouring keys, as bfloat16; and the part of
// its sums that codes do not change.
struct alignas(64) FoldedWeights {
  int32_t pairs[kMaxBatch][kPairsOfRow];
  float base[kMaxBatch][16];
};

// Adds lanes that are a multiple of `stride` apart; the sums are in the first `stride` lanes.
inline __m512 sum_keys(__m512 lanes, int64_t stride) {
  lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4e));
  if (stride <= 4) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xb1));
  if (stride <= 2) lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0x4e));
  if (stride == 1) lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0xb1));
  return lanes;
}

// Keys go lot by lot: those that two vectors of scales belong to. kStride is LaneOrder's.
template <int kStride>
struct Lot {
  static constexpr int64_t kKeysAVector = 16 / kStride, kKeys = 2 * kKeysAVector;

  // Lanes of the keys of a lot that are there, in two vectors of weights and two of scales.
  __mmask16 weights[2], scales[2];

  Lot(int64_t num_keys, int64_t groups)
      : weights{first_lanes(num_keys), first_lanes(num_keys - 16)},
        scales{first_lanes(num_keys * groups), first_lanes((num_keys - kKeysAVector) * groups)} {}
};

template <int kRows, int kStride>
[[gnu::always_inline]] inline void fold_lot(const Lot<kStride>& lot, int64_t groups,
                                            const float* weights, const uint16_t* scales,
                                            __m512* base, int32_t* target) {
  const LaneOrder& order = kLaneOrders[groups];
  const __m512i a = _mm512_maskz_loadu_epi32(lot.scales[0], scales);
  const __m512i b =
      _mm512_maskz_loadu_epi32(lot.scales[1], scales + 2 * Lot<kStride>::kKeysAVector * groups);
  const __m512i even_order = _mm512_load_si512(order.even);
  const __m512i odd_order = _mm512_load_si512(order.odd);
  const __m512i even_weights = _mm512_load_si512(order.even_weight);
  const __m512i odd_weights = _mm512_load_si512(order.odd_weight);
  const Scales even = widen_scales(_mm512_permutex2var_epi16(a, even_order, b), kMiddle);
  const Scales odd = widen_scales(_mm512_permutex2var_epi16(a, odd_order, b), kMiddle);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const float* row = weights + r * kCodeRowStride;
    const __m512 low = _mm512_maskz_loadu_ps(lot.weights[0], row);
    __m512 x, y;
    if constexpr (Lot<kStride>::kKeys <= 16) {
      x = _mm512_permutexvar_ps(even_weights, low);
      y = _mm512_permutexvar_ps(odd_weights, low);
    } else {
      const __m512 high = _mm512_maskz_loadu_ps(lot.weights[1], row + 16);
      x = _mm512_permutex2var_ps(low, even_weights, high);
      y = _mm512_permutex2var_ps(low, odd_weights, high);
    }
    base[r] = _mm512_fmadd_ps(x, even.middle, base[r]);
    base[r] = _mm512_fmadd_ps(y, odd.middle, base[r]);
    _mm512_store_ps(target + r * kPairsOfRow,
                    round_pairs(_mm512_mul_ps(x, even.scale), _mm512_mul_ps(y, odd.scale)));
  }
}

template <int kRows, int kStride>
void fold_lots(const float* weights, const CodeRun& run, FoldedWeights& folded) {
  using Some = Lot<kStride>;
  const int64_t groups = run.groups, count = run.count;
  const uint16_t* const scales = run.scales + run.slot * groups * 2;
  __m512 base[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) base[r] = _mm512_setzero_ps();
  // Masks for each lot would take a third of the time.
  const Some whole(Some::kKeys, groups);
  int64_t t = 0;
  int32_t* target = folded.pairs[0];
  for (; t + Some::kKeys <= count; t += Some::kKeys, target += 16) {
    fold_lot<kRows>(whole, groups, weights + t, scales + 2 * t * groups, base, target);
  }
  if (t < count) {
    fold_lot<kRows>(Some(count - t, groups), groups, weights + t, scales + 2 * t * groups, base,
                    target);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) _mm512_store_ps(folded.base[r], sum_keys(base[r], kStride));
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
