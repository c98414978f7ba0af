// What the scheduler of pointwise functions asks of an instruction set. Included by files compiled
// for different instruction sets.
#pragma once

#include "kvkernels/pointwise.h"

namespace kvkernels {

// Each takes the rows, or the tokens of all batches, from `begin` to `end`.
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
