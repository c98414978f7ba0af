// A linear layer whose result for a row does not depend on what other rows there are.
#pragma once

#include "kvkernels/attention.h"

namespace kvkernels {

// Strides are in elements; the last dimension of every tensor is dense.
struct LinearLayer {
  const void* weight;  // [out_features, in_features]
  const void* bias;    // [out_features], or null
  void* out;           // [num_rows, out_features], contiguous
  int64_t out_features, weight_stride;
};

// One input, and the layers that it goes through: a query's, a key's and a value's, say.
struct LinearArgs {
  const void* input;  // [num_rows, in_features]
  const LinearLayer* layers;
  int64_t num_layers, num_rows, in_features, input_stride;
  DType dtype;  // of all tensors; not kFloat8
};

// out = input * weight^T + bias, of each layer. A row is the same bits for any number of rows,
// wherever it stands among them, beside any other layers, and for any number of threads. The path
// is used as in paged_attention.
void linear(const LinearArgs& args, AttentionPath path, int num_threads);

}  // namespace kvkernels
