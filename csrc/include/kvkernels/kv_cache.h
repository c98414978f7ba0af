// Writes new keys and values into the block-table cache.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvkernels {

// Keys or values: the new ones, [num_tokens, num_kv_heads, head_dim], and the cache that they go
// to, [num_blocks, num_kv_heads, block_size, head_dim]. Strides are in bytes; head_dim is dense.
// The caller owns both.
struct StoreSide {
  const std::byte* source;
  std::byte* cache;
  int64_t source_token_stride, source_head_stride;
  int64_t cache_block_stride, cache_head_stride, cache_slot_stride;
};

struct StoreKVArgs {
  StoreSide key, value;
  const int64_t* slot_mapping;  // [num_tokens]; negative skips the token
  int64_t slot_mapping_stride;  // in elements
  int64_t num_tokens, num_kv_heads, num_blocks, block_size;
  int64_t head_bytes;  // head_dim elements
};

// Copies each token's key and value into its slot, whatever the dtype. Slots must be distinct.
// Throws std::invalid_argument, before anything is written, if a slot lies past the cache.
void store_kv(const StoreKVArgs& args, int num_threads);

}  // namespace kvkernels
