// What each instruction set implements for the scheduler of pointwise functions (pointwise.cpp).
// Included by files compiled for different instruction sets.
#pragma once

#include "kvkernels/pointwise.h"

namespace kvkernels {

// Each works on the rows [begin, end); for rotary_embedding, on the tokens [begin, end) of all
// sequences in the batch, one after the other.
struct PointwiseKernels {
  void (*rms_norm)(const RmsNormArgs& args, int64_t begin, int64_t end);
  void (*rotary_embedding)(const RotaryArgs& args, int64_t begin, int64_t end);
  void (*gated_activation)(const GatedActivationArgs& args, int64_t begin, int64_t end);
  void (*add)(const AddArgs& args, int64_t begin, int64_t end);
};

PointwiseKernels portable_pointwise_kernels(DType dtype);
PointwiseKernels avx2_pointwise_kernels(DType dtype);
PointwiseKernels avx512_pointwise_kernels(DType dtype);

}  // namespace kvkernels
