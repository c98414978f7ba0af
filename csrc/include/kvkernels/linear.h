// Linear layers, batch invariant: a row of the result has the same bits whatever other rows are in
// the call.
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

// One input and all layers that multiply it, such as those of queries, keys and values. All memory
// is the caller's; `out` of a layer must not overlap an input of the call.
struct LinearArgs {
  const void* input;  // [num_rows, in_features]
  const LinearLayer* layers;
  int64_t num_layers, num_rows, in_features, input_stride;
  DType dtype;  // of all tensors; not kFloat8
};

// out = input * weight^T + bias, for each layer. A row of the result has the same bits for any
// number of rows, at any place among them, beside any other layers and for any number of threads. A
// path that does not serve the dtype, or that this processor lacks, leaves the call to the next
// (see has_attention_path); kAmxEmulated leaves it to portable. Shapes are the caller's to check.
void linear(const LinearArgs& args, AttentionPath path, int num_threads);

}  // namespace kvkernels
