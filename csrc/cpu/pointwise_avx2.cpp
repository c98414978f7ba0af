// Pointwise functions with AVX2.
#include "cpu/codec_lanes_avx2.h"

namespace kvkernels {
namespace {

inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats magnitude(Floats v) { return abs_lanes(v); }
inline Floats where_negative(Floats test, Floats a, Floats b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(test, _mm256_setzero_ps(), _CMP_LT_OQ));
}
inline Floats exp2_up_to_0(Floats v) { return exp2_lanes(v); }
inline float sum_of_lanes(Floats v) { return sum_lanes(v); }

}  // namespace
}  // namespace kvkernels

#include "cpu/pointwise_loops.h"

namespace kvkernels {

PointwiseKernels avx2_pointwise_kernels(DType dtype) { return pointwise_kernels_for(dtype); }

}  // namespace kvkernels
