// Products with quantised keys and values straight from their codes, which are never turned into
// floats: the interface between the kernels for few rows and processors with integer dot products.
#pragma once

#include <cstdint>

#include "cpu/attention_read_ahead.h"

namespace kvkernels {

constexpr int64_t kMaxCodeDim = 256;  // largest head_dim and value_dim
constexpr int64_t kCodeRowStride =
    64;  // of rows of scores and weights; also the most keys of a tile
constexpr int64_t kMaxCodeRows = 8;

// Products are taken with code - middle, which lies around 0, so that the rounding of the other
// factor does little harm.
static constexpr float middle_code(bool is_int4) { return is_int4 ? 8.0f : 128.0f; }

// Neighbouring slots of one block, for one head. `codes` and `scales` are those of the block's slot
// 0.
struct CodeRun {
  const uint8_t* codes;    // [block_size, dim], or [block_size, dim / 2] with 4 bits
  const uint16_t* scales;  // keys: [groups, dim, 2]; values: [block_size, groups, 2]
  bool is_int4;
  int64_t slot, count;
  int64_t dim, groups, block_size;
};

// The shape of a quantised cache.
struct CodeShape {
  int64_t block_size, head_dim, value_dim, key_groups, value_groups;
  bool is_int4;

  // Whether every 16 neighbouring slots share a key's scales, and every `num_channels` neighbouring
  // channels a value's; with 4-bit codes, also the channels in the low halves of `num_channels`
  // bytes, and those in the high halves.
  [[gnu::always_inline]] bool has_groups_of(int64_t num_channels) const {
    const bool is_whole = value_dim / value_groups % num_channels == 0 &&
                          (!is_int4 || value_dim / 2 % num_channels == 0);
    return block_size / key_groups % 16 == 0 && (value_groups == 1 || is_whole);
  }
};

// scores[r * kCodeRowStride + t] = query row r * key t. May write up to the next multiple of 16
// keys.
struct KeyJob {
  CodeRun keys;
  const float* query;
  float* scores;
};

// sums[r][i] = sums[r][i] * decay[r] + sum over t of weights[r * kCodeRowStride + t] * value t
struct ValueJob {
  CodeRun values;
  const float *weights, *decay;
  float* sums;
};

// Kernels for jobs of one shape, done in order. Each prefetches about as many bytes from `next` as
// it reads.
struct CodeKernels {
  bool (*suits)(const CodeShape& shape);
  int64_t num_heads;  // of jobs per call: a kernel may prepare one job while another runs
  void (*score)(const KeyJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& next);
  void (*add)(const ValueJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& next);
};

// Chooses the kernels for a shape; null: none, so codes are unpacked to floats. The caller still
// asks `suits`.
using FindCodeKernels = const CodeKernels* (*)(const CodeShape&);

// `score` and `add` of kernels that do one job after another.
template <auto kScore>
void score_each(const KeyJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& next) {
  for (const KeyJob* job = jobs; job < jobs + num_jobs; ++job) {
    kScore(job->keys, job->query, num_rows, job->scores, next);
  }
}

template <auto kAdd>
void add_each(const ValueJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& next) {
  for (const ValueJob* job = jobs; job < jobs + num_jobs; ++job) {
    kAdd(job->values, job->weights, num_rows, job->decay, job->sums, next);
  }
}

// Needs AVX2.
const CodeKernels* avx2_code_kernels();

// Needs AVX-512; null where the processor has no AVX512-VNNI.
const CodeKernels* avx512_vnni_code_kernels();

// Needs AVX512-BF16; serves 4-bit codes only.
const CodeKernels* avx512_bf16_code_kernels();

}  // namespace kvkernels
