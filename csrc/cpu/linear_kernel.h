// What each instruction set implements for the scheduler of linear layers (linear.cpp). Included by
// files compiled for different instruction sets, so every function here is static.
#pragma once

#include <cstdint>

#include "kvkernels/linear.h"

namespace kvkernels {

// A rectangle of a layer's result: rows of the input times columns, which are rows of the weight.
struct LinearTile {
  const LinearArgs* args;
  const LinearLayer* layer;
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
  // The weights that this thread multiplies after these, to be prefetched.
  const void* next;
  // The rows as the kernel's `pack` wrote them; null if it reads them where they lie.
  const void* packed;
};

struct LinearKernel {
  void (*multiply)(const LinearTile& tile);
  // Packs the rows [row_begin, row_end) in groups; row_begin is a multiple of kGroupRows. Null
  // where `multiply` needs no packed rows.
  void (*pack)(const LinearArgs& args, int64_t row_begin, int64_t row_end, void* packed) = nullptr;
  // Whether a call's rows are to be packed; null: always, if there is a `pack`.
  bool (*packs)(const LinearArgs& args) = nullptr;
};

constexpr int64_t kGroupRows = 16, kPackedStep = 32;

// Steps of kPackedStep features, the last one padded with zeros; one step even without features.
static inline int64_t num_packed_steps(const LinearArgs& args) {
  return args.in_features <= kPackedStep ? 1 : (args.in_features + kPackedStep - 1) / kPackedStep;
}

// Bytes of one group of packed rows.
static inline int64_t packed_group_bytes(const LinearArgs& args) {
  return kGroupRows * kPackedStep * num_packed_steps(args) * item_bytes(args.dtype);
}

// The kernel of each instruction set. The last three have no `multiply` for a dtype that they do
// not serve.
LinearKernel portable_linear(DType dtype);
LinearKernel avx2_linear(DType dtype);
LinearKernel avx512_linear(DType dtype);
LinearKernel avx512_bf16_linear(DType dtype);
LinearKernel amx_linear(DType dtype);
LinearKernel amx_emulated_linear(DType dtype);

}  // namespace kvkernels
