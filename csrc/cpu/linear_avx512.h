// What the AVX-512 products of linear layers share. Only for files compiled for AVX-512.
#pragma once

#include "cpu/linear_products.h"
#include "cpu/simd_avx512.h"

namespace kvkernels {
namespace {

template <typename E>
struct Lanes16 {
  using Item = typename E::Item;
  using Row = Item;
  using Sum = __m512;
  static constexpr int kVectors = 1, kPanelCols = 16, kBlockRows = 4, kMaxSums = 16;

  static int64_t rows_of_block(int64_t left) { return std::min<int64_t>(left, kBlockRows); }
  static constexpr int block_cols(int num_rows) { return 16 / (num_rows == 3 ? 4 : num_rows); }

  static Sum zero() { return _mm512_setzero_ps(); }

  template <int>
  [[gnu::always_inline]] static void reduce(const Sum* sums, float* totals) {
    _mm512_storeu_ps(totals, sum_lanes_of_16(sums));
  }

  static void store(const float* totals, int64_t count, Item* out) {
    const __mmask16 mask = first_lanes(count);
    E::store(out, _mm512_maskz_loadu_ps(mask, totals), mask);
  }

  static float widen(Item item) { return _mm512_cvtss_f32(E::masked_load(&item, 1)); }
};

}  // namespace
}  // namespace kvkernels
