// Products with quantised keys and values that never become floats: what the kernels for few rows
// ask of a processor with integer dot products.
#pragma once

#include <cstdint>

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

// Asks for the next `num_bytes` of what will be read later.
struct Ahead {
  void* prefetch;
  void (*advance)(void* prefetch, int64_t num_bytes);

  void operator()(int64_t num_bytes) const { advance(prefetch, num_bytes); }
};

// Each asks for about as much of what is read next as it reads.
struct CodeKernels {
  // scores[r * kCodeRowStride + t] = query row r * key t; may write up to the next 16 keys.
  void (*score)(const CodeRun& keys, const float* query, int64_t num_rows, float* scores,
                const Ahead& next);
  // sums[r][i] += sum over t of weights[r * kCodeRowStride + t] * value t
  void (*add)(const CodeRun& values, const float* weights, int64_t num_rows, float* sums,
              const Ahead& next);
};

// Whether a cache's shape suits the kernels: slots of 16 neighbours share a key's scale, and 32
// neighbouring channels of a byte's half a value's.
inline bool suits_codes(int64_t block_size, int64_t head_dim, int64_t value_dim, int64_t key_groups,
                        int64_t value_groups, bool is_int4) {
  const int64_t group_size = value_dim / value_groups;
  const bool is_whole =
      value_groups == 1 || (group_size % 32 == 0 && (!is_int4 || value_dim / 2 % 32 == 0));
  return head_dim <= kMaxCodeDim && value_dim <= kMaxCodeDim && head_dim % 16 == 0 &&
         value_dim % 16 == 0 && block_size / key_groups % 16 == 0 && is_whole;
}

// Null where the processor has no such instructions.
const CodeKernels* avx512_vnni_code_kernels();

}  // namespace kvkernels
