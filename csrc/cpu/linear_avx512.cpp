// Linear layers with AVX-512: every element is widened to a float, every product is one of floats.
#include "cpu/linear_avx512.h"

namespace kvkernels {
namespace {

template <typename E>
struct WidenedLanes : Lanes16<E> {
  using Item = typename E::Item;
  using Sum = __m512;
  struct Vector {
    __m512 a, b;
  };
  static constexpr int64_t kStep = 32;

  template <int>
  static Vector load(const Item* p) {
    Vector v;
    E::load_pair(p, v.a, v.b);
    return v;
  }

  template <int>
  static Vector load(const Item* p, int64_t count) {
    return {E::masked_load(p, first_lanes(count)),
            count > 16 ? E::masked_load(p + 16, first_lanes(count - 16)) : _mm512_setzero_ps()};
  }

  static Sum add(Sum sum, const Vector& x, const Vector& y) {
    return _mm512_fmadd_ps(x.b, y.b, _mm512_fmadd_ps(x.a, y.a, sum));
  }
};

}  // namespace

LinearKernel avx512_linear(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return kernel_with_chunks<WidenedLanes<Float32>>();
    case DType::kFloat16:
      return kernel_with_chunks<WidenedLanes<Float16>>();
    default:
      return kernel_with_chunks<WidenedLanes<BFloat16>>();
  }
}

}  // namespace kvkernels
