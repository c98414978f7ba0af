// Pointwise functions with AVX-512.
#include "cpu/codec_lanes_avx512.h"

namespace kvkernels {
namespace {

inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats magnitude(Floats v) { return _mm512_abs_ps(v); }
inline Floats where_negative(Floats test, Floats a, Floats b) {
  return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_LT_OQ), a);
}
inline Floats exp2_up_to_0(Floats v) { return exp2_lanes(v); }
inline float sum_of_lanes(Floats v) { return _mm512_reduce_add_ps(v); }

}  // namespace
}  // namespace kvkernels

#include "cpu/pointwise_loops.h"

namespace kvkernels {

PointwiseKernels avx512_pointwise_kernels(DType dtype) { return pointwise_kernels_for(dtype); }

}  // namespace kvkernels
