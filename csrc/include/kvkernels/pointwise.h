// The row-wise functions of a model between its matrix products. Batch invariant: a row has the
// same bits whatever rows lie beside it and for any number of threads. Every intermediate that
// PyTorch would round to the dtype is rounded here too.
#pragma once

#include "kvkernels/attention.h"

namespace kvkernels {

// Strides are in elements; the last dimension of every tensor is dense. All tensors have the dtype,
// which is not kFloat8, and are the caller's. A result may be written over an input of the same
// shape and strides. None of the functions checks its arguments. `path` as in paged_attention.

struct RmsNormArgs {
  const void* input;   // [num_rows, size]
  const void* weight;  // [size]
  void* out;           // [num_rows, size], contiguous
  int64_t num_rows, size;
  int64_t input_stride;
  DType dtype;
  float eps;
  bool is_offset;  // multiplies by 1 + weight (Gemma), and rounds only the result
};

// out = input / sqrt(mean(input^2) + eps) * weight, row by row.
void rms_norm(const RmsNormArgs& args, AttentionPath path, int num_threads);

struct RotaryArgs {
  const void* input;      // [batch_size, num_heads, num_tokens, head_dim]
  const void *cos, *sin;  // [batch_size, num_tokens, head_dim], of equal strides
  void* out;              // like input
  int64_t batch_size, num_heads, num_tokens, head_dim;
  int64_t input_strides[3], out_strides[3];
  int64_t angle_strides[2];
  DType dtype;
};

// Rotary position embedding, where channel i pairs with channel i + head_dim / 2 (Llama's order).
void rotary_embedding(const RotaryArgs& args, AttentionPath path, int num_threads);

// Numbered as in Python.
enum class Activation : int { kSilu = 0, kGeluTanh = 1 };

struct GatedActivationArgs {
  const void *gate, *up;  // [num_rows, size]
  void* out;              // [num_rows, size], contiguous
  int64_t num_rows, size;
  int64_t gate_stride, up_stride;
  DType dtype;
  Activation activation;
};

// out = activation(gate) * up
void gated_activation(const GatedActivationArgs& args, AttentionPath path, int num_threads);

struct AddArgs {
  const void *a, *b;  // [num_rows, size], contiguous, as is out
  void* out;
  int64_t num_rows, size;
  DType dtype;
};

// out = a + b
void add(const AddArgs& args, AttentionPath path, int num_threads);

}  // namespace kvkernels
