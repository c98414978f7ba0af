// Linear layers of bfloat16 with AVX512-BF16: one instruction multiplies 16 pairs.
#include "cpu/linear_avx512.h"

namespace kvkernels {
namespace {

struct PairLanes : Lanes16<BFloat16> {
  using Vector = __m512i;
  static constexpr int64_t kStep = 32;

  template <int>
  static Vector load(const Item* p) {
    return _mm512_loadu_si512(p);
  }

  template <int>
  static Vector load(const Item* p, int64_t count) {
    return _mm512_maskz_loadu_epi16((uint32_t{1} << count) - 1, p);
  }

  static Sum add(Sum sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace

LinearKernel avx512_bf16_linear(DType dtype) {
  if (dtype != DType::kBFloat16) return {nullptr};
  return kernel_with_chunks<PairLanes>();
}

}  // namespace kvkernels
