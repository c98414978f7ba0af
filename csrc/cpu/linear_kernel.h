// What the scheduler of linear layers asks of an instruction set. Included by files compiled for
// different instruction sets.
#pragma once

#include <cstdint>

#include "kvkernels/linear.h"

namespace kvkernels {

// Rows of the input against rows of a weight: a rectangle of a layer's result.
struct LinearTile {
  const LinearArgs* args;
  const LinearLayer* layer;
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
  // The weights that this thread multiplies after these.
  const void* next;
};

using LinearKernel = void (*)(const LinearTile& tile);

// The last returns null where it does not serve the dtype.
LinearKernel portable_linear(DType dtype);
LinearKernel avx2_linear(DType dtype);
LinearKernel avx512_linear(DType dtype);
LinearKernel avx512_bf16_linear(DType dtype);

}  // namespace kvkernels
