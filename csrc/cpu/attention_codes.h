// Products with quantised keys and values that never become floats: what the kernels for few rows
// ask of a processor with integer dot products.
#pragma once

#include <cstdint>

#include "cpu/attention_read_ahead.h"

namespace kvkernels {

constexpr int64_t kMaxCodeDim = 256;    // head_dim and value_dim at most
constexpr int64_t kCodeRowStride = 64;  // of scores and weights: keys of a tile at most
constexpr int64_t kMaxCodeRows = 8;

// Neighbouring slots of one block and head. `codes` and `scales` are the block's, from slot 0 on.
struct CodeRun {
  const uint8_t* codes;    // [block_size, dim], or dim / 2 bytes wide for 4 bits
  const uint16_t* scales;  // keys: [groups, dim, 2]; values: [block_size, groups, 2]
  bool is_int4;
  int64_t slot, count;
  int64_t dim, groups, block_size;
};

// The shape of a quantised cache.
struct CodeShape {
  int64_t block_size, head_dim, value_dim, key_groups, value_groups;
  bool is_int4;

  // Whether slots of 16 neighbours share a key's scale, and so many channels a value's: of 4-bit
  // codes also those of the same bytes' halves.
  bool has_groups_of(int64_t num_channels) const {
    const bool is_whole = value_dim / value_groups % num_channels == 0 &&
                          (!is_int4 || value_dim / 2 % num_channels == 0);
    return block_size / key_groups % 16 == 0 && (value_groups == 1 || is_whole);
  }
};

// scores[r * kCodeRowStride + t] = query row r * key t; may write up to the next 16 keys.
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

// Jobs of one shape, in order. Each asks for about as much of what is read next as it reads.
struct CodeKernels {
  bool (*suits)(const CodeShape& shape);
  int64_t num_heads;  // to give the jobs of at once: one prepares the next's
  void (*score)(const KeyJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& next);
  void (*add)(const ValueJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& next);
};

// Says which kernels are tried for a shape; null: none.
using FindCodeKernels = const CodeKernels* (*)(const CodeShape&);

// CodeKernels of who does one job after another.
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

// For processors with AVX2.
const CodeKernels* avx2_code_kernels();

// Null where the processor has no such instructions.
const CodeKernels* avx512_vnni_code_kernels();

// For processors with AVX512-BF16; of 4 bits only.
const CodeKernels* avx512_bf16_code_kernels();

}  // namespace kvkernels
