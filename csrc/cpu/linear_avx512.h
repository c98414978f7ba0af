// What the AVX-512 products of linear layers share. Only for files compiled for AVX-512.
#pragma once

#include "cpu/linear_chunks.h"
#include "cpu/simd_avx512.h"

namespace kvkernels {
namespace {

// Blocks of 6 rows by 4 columns: with 4 rows products waited for the caches more often (a prompt of
// 512 tokens took 7 to 19 % less time with 6 on two cores of a Zen 5, with 1536 to 4096 features).
template <typename E>
struct Lanes16 {
  using Item = typename E::Item;
  using Row = Item;
  using Sum = __m512;
  static constexpr int kVectors = 1, kPanelCols = 16, kBlockRows = 6, kMaxSums = 24;

  static constexpr int64_t kChunk = (2 << 10) / sizeof(Item);

  // 7 and 8 rows are two blocks of about equal size, not one of 6 and a small rest.
  static int64_t rows_of_block(int64_t left) {
    return left == 7 || left == 8 ? 4 : std::min<int64_t>(left, kBlockRows);
  }
  static constexpr int block_cols(int num_rows) { return num_rows <= 2 ? 16 / num_rows : 4; }

  static Sum zero() { return _mm512_setzero_ps(); }

  template <int kCount>
  [[gnu::always_inline]] static void reduce(const Sum* sums, float* totals) {
    _mm512_storeu_ps(totals, sum_lanes_of_16(sums));
    if constexpr (kCount > 16) {
      __m512 rest[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) rest[i] = i < 8 ? sums[16 + i] : _mm512_setzero_ps();
      _mm256_storeu_ps(totals + 16, _mm512_castps512_ps256(sum_lanes_of_16(rest)));
    }
  }

  static void store(const float* totals, int64_t count, Item* out) {
    const __mmask16 mask = first_lanes(count);
    E::store(out, _mm512_maskz_loadu_ps(mask, totals), mask);
  }

  static float widen(Item item) { return _mm512_cvtss_f32(E::masked_load(&item, 1)); }
};

}  // namespace
}  // namespace kvkernels
