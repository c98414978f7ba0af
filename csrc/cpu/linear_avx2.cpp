// Linear layers with AVX2: every element is widened to a float.
#include "cpu/linear_products.h"
#include "cpu/simd_avx2.h"

namespace kvkernels {
namespace {

template <typename E>
struct Lanes8 {
  using Item = typename E::Item;
  using Vector = __m256;
  using Sum = __m256;
  static constexpr int64_t kStep = 8;
  static constexpr int kSums = 8;

  static Sum zero() { return _mm256_setzero_ps(); }

  static Vector load(const Item* p) { return E::load(p); }

  static Vector load(const Item* p, int64_t count) {
    Item padded[8] = {};
    std::copy_n(p, count, padded);
    return E::load(padded);
  }

  static Sum add(Sum sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }

  static void reduce(const Sum* sums, float* totals) {
    _mm256_storeu_ps(totals, sum_lanes_of_8(sums));
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
