// What the scheduler of linear layers asks of an instruction set. Included by files compiled for
// different instruction sets, so every function here is static.
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
  // The rows as the kernel has packed them; null if it reads them where they lie.
  const uint16_t* packed;
};

struct LinearKernel {
  void (*multiply)(const LinearTile& tile);
  // Packs groups of rows: those from row_begin, a multiple of kGroupRows, to before row_end. Null
  // where `multiply` needs none.
  void (*pack)(const LinearArgs& args, int64_t row_begin, int64_t row_end,
               uint16_t* packed) = nullptr;
};

constexpr int64_t kGroupRows = 16;

// Steps of 32 features, the last one padded with zeros; one even where there are no features.
static inline int64_t num_packed_steps(const LinearArgs& args) {
  return args.in_features <= 32 ? 1 : (args.in_features + 31) / 32;
}

// Elements of a group of packed rows.
static inline int64_t packed_group_size(const LinearArgs& args) {
  return kGroupRows * 32 * num_packed_steps(args);
}

// From the third on they have no `multiply` where they do not serve the dtype.
LinearKernel portable_linear(DType dtype);
LinearKernel avx2_linear(DType dtype);
LinearKernel avx512_linear(DType dtype);
LinearKernel avx512_bf16_linear(DType dtype);
LinearKernel amx_linear(DType dtype);
LinearKernel amx_emulated_linear(DType dtype);

}  // namespace kvkernels
