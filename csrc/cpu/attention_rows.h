// Finds the keys and values of a tile by the block table. All static, because files compiled for
// different instruction sets include this.
#pragma once

#include "cpu/attention_kernel.h"

namespace kvkernels {

// The end of the tile of keys that starts at `begin`: a multiple of `tile_keys`, so that tiles and
// blocks of the cache end together, or the end of all keys.
static inline int64_t key_tile_end(const AttentionTile& tile, int64_t begin, int64_t tile_keys) {
  const int64_t end = (begin / tile_keys + 1) * tile_keys;
  return end < tile.key_end ? end : tile.key_end;
}

struct BlockEntry {
  BlockKind kind;
  int64_t id;
};

static inline BlockEntry block_entry(int32_t entry) {
  return {static_cast<BlockKind>(entry >> kKindShift), entry & ((1 << kKindShift) - 1)};
}

// Whether every block of the keys [begin, end) holds elements of the query's dtype, to be used
// where they lie.
static inline bool lies_plain(const AttentionTile& tile, int64_t begin, int64_t end) {
  const PagedAttentionArgs& args = *tile.args;
  if (args.cache_dtype != args.dtype) return false;
  if (args.int8.num_blocks == 0 && args.int4.num_blocks == 0) return true;
  for (int64_t i = begin / args.block_size; i * args.block_size < end; ++i) {
    if (block_entry(tile.blocks[i]).kind != BlockKind::kFloat) return false;
  }
  return true;
}

// Writes the offsets, in elements, at which the keys and values of [begin, end) start for the
// tile's first head. For blocks of floats only. 64-bit: a block id times its stride passes 2^31 in
// a cache of a few gigabytes.
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

// Kernels place the keys of a tile in columns by position, so that a key has the same column in
// every call. Lets columns [0, first), whose keys no row sees, repeat the first key that some row
// sees: slots that no row sees are never read, yet these columns must hold numbers.
static inline void repeat_first_row(int64_t* offsets, int64_t first) {
  for (int64_t t = 0; t < first; ++t) offsets[t] = offsets[first];
}

// Of the tile of keys [begin, end), the columns that some of `count` rows sees. Later rows see
// later ranges, so the first and the last row bound them.
static inline KeyRange seen_columns(const KeyRange* seen, int64_t count, int64_t begin,
                                    int64_t end) {
  const int64_t first = seen[0].begin, last = seen[count - 1].end;
  return {first > begin ? first - begin : 0, (last < end ? last : end) - begin};
}

struct RowRange {
  int64_t begin, end;
};

// Of `count` rows, those that may see keys of [begin, end): rows before them see only earlier keys,
// rows after them only later ones.
static inline RowRange rows_that_see(const KeyRange* seen, int64_t count, int64_t begin,
                                     int64_t end) {
  RowRange rows = {0, count};
  while (rows.begin < rows.end && seen[rows.begin].end <= begin) ++rows.begin;
  while (rows.end > rows.begin && seen[rows.end - 1].begin >= end) --rows.end;
  return rows;
}

// A run of neighbouring slots of one block.
struct Run {
  BlockEntry block;
  int64_t slot, count;
  int64_t first;  // position of the first slot, counted from the start of the range
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

namespace {

// Rows of one of the caches, for one head.
template <typename Item>
struct CacheRows {
  const Item* cache;
  const int64_t* offsets;

  const Item* row(int64_t token) const { return cache + offsets[token]; }
};

}  // namespace
}  // namespace kvkernels
