// Pointwise functions in plain C++ for any processor.
#include "cpu/codec_lanes_portable.h"

namespace kvkernels {
namespace {

inline Floats divide(Floats a, Floats b) {
  return lanes_of<Floats>([&](int64_t i) { return a.v[i] / b.v[i]; });
}
inline Floats magnitude(Floats v) {
  return lanes_of<Floats>([&](int64_t i) { return std::fabs(v.v[i]); });
}
inline Floats where_negative(Floats test, Floats a, Floats b) {
  return lanes_of<Floats>([&](int64_t i) { return test.v[i] < 0 ? a.v[i] : b.v[i]; });
}
inline Floats exp2_up_to_0(Floats v) {
  return lanes_of<Floats>([&](int64_t i) { return exp2_scalar(v.v[i]); });
}
inline float sum_of_lanes(Floats v) {
  float sum = 0;
  for (const float lane : v.v) sum += lane;
  return sum;
}

}  // namespace
}  // namespace kvkernels

#include "cpu/pointwise_loops.h"

namespace kvkernels {

PointwiseKernels portable_pointwise_kernels(DType dtype) { return pointwise_kernels_for(dtype); }

}  // namespace kvkernels
