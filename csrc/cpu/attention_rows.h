// Where the keys and values of a tile lie, by the block table. All static, because files compiled
// for different instruction sets include this.
#pragma once

#include "cpu/attention_kernel.h"

namespace kvkernels {

struct BlockEntry {
  BlockKind kind;
  int64_t id;
};

static inline BlockEntry block_entry(int32_t entry) {
  return {static_cast<BlockKind>(entry >> kKindShift), entry & ((1 << kKindShift) - 1)};
}

// Whether the elements of every block of [begin, end) are those of the query, to be used where
// they lie.
static inline bool lies_plain(const AttentionTile& tile, int64_t begin, int64_t end) {
  const PagedAttentionArgs& args = *tile.args;
  if (args.cache_dtype != args.dtype) return false;
  if (args.int8.num_blocks == 0 && args.int4.num_blocks == 0) return true;
  for (int64_t i = begin / args.block_size; i * args.block_size < end; ++i) {
    if (block_entry(tile.blocks[i]).kind != BlockKind::kFloat) return false;
  }
  return true;
}

// Writes where the keys and values of [begin, end) of the tile's first head start, in elements, of
// float blocks. 64-bit: a block id times its stride passes 2^31 in a cache of a few gigabytes.
static inline void find_rows(const AttentionTile& tile, int64_t begin, int64_t end,
                             int64_t* key_offsets, int64_t* value_offsets) {
  const PagedAttentionArgs& args = *tile.args;
  int64_t index = begin / args.block_size, slot = begin % args.block_size;
  for (int64_t token = begin; token < end; ++index, slot = 0) {
    const int64_t block = tile.blocks[index];
    const int64_t key = block * args.key_block_stride + tile.kv_head * args.key_head_stride +
                        slot * args.key_slot_stride;
    const int64_t value = block * args.value_block_stride + tile.kv_head * args.value_head_stride +
                          slot * args.value_slot_stride;
    const int64_t left = args.block_size - slot, count = left < end - token ? left : end - token;
    for (int64_t i = 0; i < count; ++i) {
      key_offsets[i] = key + i * args.key_slot_stride;
      value_offsets[i] = value + i * args.value_slot_stride;
    }
    key_offsets += count;
    value_offsets += count;
    token += count;
  }
}

// Kernels lay the keys of a tile into columns by position, so that a key has the same column in
// every call. Columns [0, first), of keys that no row sees, repeat the first one that some row
// sees: other slots are never read, and what no row sees must still be a number.
static inline void repeat_first_row(int64_t* offsets, int64_t first) {
  for (int64_t t = 0; t < first; ++t) offsets[t] = offsets[first];
}

// A run of neighbouring slots of one block.
struct Run {
  BlockEntry block;
  int64_t slot, count;
  int64_t first;  // token of the first slot, from the start of the range
};

// Calls visit(run) for each block of [begin, end), in order.
template <typename Visit>
static inline void for_each_run(const AttentionTile& tile, int64_t begin, int64_t end,
                                const Visit& visit) {
  const int64_t block_size = tile.args->block_size;
  for (int64_t token = begin; token < end;) {
    const int64_t slot = token % block_size;
    const int64_t left = block_size - slot, count = left < end - token ? left : end - token;
    visit(Run{block_entry(tile.blocks[token / block_size]), slot, count, token - begin});
    token += count;
  }
}

}  // namespace kvkernels
