// Linear layers with AVX2: every element is widened to a float.
#include "cpu/linear_products.h"
#include "cpu/simd_avx2.h"

namespace kvkernels {
namespace {

// Rows of the input are widened to floats once for all columns of a tile, weights as they are
// loaded into registers. Those hold 12 sums, 3 rows and a column.
template <typename E>
struct Lanes8 {
  using Item = typename E::Item;
  using Row = float;
  using Sum = __m256;
  static constexpr int64_t kStep = 16;
  static constexpr int kVectors = 2, kPanelCols = 8, kBlockRows = 3, kMaxSums = 12;

  static int64_t rows_of_block(int64_t left) {
    return left == 4 ? 2 : std::min<int64_t>(left, kBlockRows);
  }
  static constexpr int block_cols(int num_rows) { return num_rows == 1 ? 8 : 4; }

  static Sum zero() { return _mm256_setzero_ps(); }

  template <int kVector>
  static __m256 load(const Row* p) {
    return _mm256_loadu_ps(p + 8 * kVector);
  }
  template <int kVector>
  static __m256 load(const Row* p, int64_t count) {
    if constexpr (!std::is_same_v<Row, Item>) return load<kVector>(p);  // widened rows are padded
    Row padded[kStep] = {};
    std::copy_n(p, count, padded);
    return load<kVector>(padded);
  }

  template <int kVector>
  static __m256 load_item(const Item* p) {
    return E::template load_half<kVector>(p);
  }
  template <int kVector>
  static __m256 load_item(const Item* p, int64_t count) {
    Item padded[kStep] = {};
    std::copy_n(p, count, padded);
    return load_item<kVector>(padded);
  }

  static void widen_row(const Item* items, int64_t count, Row* row) {
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      _mm256_storeu_ps(row + i, load_item<0>(items + i));
      _mm256_storeu_ps(row + i + 8, load_item<1>(items + i));
    }
    if (i < count) {
      _mm256_storeu_ps(row + i, load_item<0>(items + i, count - i));
      _mm256_storeu_ps(row + i + 8, load_item<1>(items + i, count - i));
    }
  }

  // Written out because GCC 12 makes of the intrinsic forms that copy the sum to another register,
  // or that load a row again for each column: of the 16 registers none is left for that.
  static Sum add(Sum sum, __m256 a, __m256 b) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
  }

  template <int kCount>
  static void reduce(const Sum* sums, float* totals) {
    _mm256_storeu_ps(totals, sum_lanes_of_8(sums));
    if constexpr (kCount > 8) {
      const __m256 zero = _mm256_setzero_ps();
      const __m256 rest[8] = {sums[8], sums[9], sums[10], sums[11], zero, zero, zero, zero};
      _mm_storeu_ps(totals + 8, _mm256_castps256_ps128(sum_lanes_of_8(rest)));
    }
  }

  static void store(const float* totals, int64_t count, Item* out) {
    Item items[8];
    E::store(items, _mm256_loadu_ps(totals));
    std::copy_n(items, count, out);
  }

  static float widen(Item item) {
    Item padded[8] = {item};
    return _mm256_cvtss_f32(E::load(padded));
  }
};

}  // namespace

LinearKernel avx2_linear(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {multiply_tile<Lanes8<Float32>>};
    case DType::kFloat16:
      return {multiply_tile<Lanes8<Float16>>};
    default:
      return {multiply_tile<Lanes8<BFloat16>>};
  }
}

}  // namespace kvkernels
