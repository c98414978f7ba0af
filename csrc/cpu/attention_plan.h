// How a call's work is cut into items. Where keys are cut goes by the shapes alone, so that the
// result does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention_kernel.h"

namespace kvkernels {

constexpr int64_t kMaxChunks = 128;

// One sequence's items. Its query rows (queries times the query heads that share a key-value head)
// are cut into tiles, for each key-value head or a few neighbouring ones, and its keys into chunks.
// With T tiles:
//
//   items   tile T-1 heads 0.. chunk 0, chunk 1, ...; next heads ...; tile T-2 ...; tile 0 ...
//
// Where chunks are cut by position (batch_invariant), an item may also be a tile with all of its
// chunks, one after the other: num_splits is then 1, otherwise it is num_chunks.
//
// Last tiles first: under a causal mask they see the most keys, and long items are better begun
// early. Rows and keys are cut by the sequence's own shape alone, so the rounding of its result
// depends neither on the number of threads nor on other sequences; how many heads a tile takes may
// depend on both, and changes no bit.
struct SequencePlan {
  const int32_t* blocks;
  int64_t seq_len, first_token, first_position;
  int64_t num_rows, rows_per_tile, num_tiles;  // num_tiles: of one key-value head
  int64_t num_kv_heads, heads_per_tile, num_head_tiles;
  int64_t first_key, chunk_size, num_chunks;  // chunk c starts at first_key + c * chunk_size
  int64_t num_splits;                         // items per tile
  int64_t first_item;
  int64_t item_cost, cost_before;  // of one of its items; of all items of the sequences before it
  // If num_splits > 1: where the chunks' results, [num_tiles * num_head_tiles, num_splits,
  // heads_per_tile, result_size], start among all partial results, in floats, and where the tiles'
  // counters start.
  int64_t first_partial, result_size;
  int64_t first_split_tile;

  int64_t num_items() const { return num_tiles * num_head_tiles * num_splits; }
  int64_t end_item() const { return first_item + num_items(); }

  // The rows of tile `index` of num_tiles * num_head_tiles, and all the keys they see.
  AttentionTile tile(const PagedAttentionArgs& args, int64_t index) const;

  // Narrows the keys to those of one chunk; false if none is left.
  bool clip_to_chunk(AttentionTile& tile, int64_t chunk) const;
};

struct Plan {
  std::vector<SequencePlan> sequences;  // those with queries; the costliest items first
  int64_t num_items = 0;
  int64_t cost = 0;          // of all items
  int64_t num_partials = 0;  // of all partial results, in floats
  int64_t num_split_tiles = 0;
  int64_t num_scores = 0;  // roughly: a measure of the work
};

// Throws std::invalid_argument if a length, a running sum or a block id in use is out of range.
void check_indices(const PagedAttentionArgs& args);

// Expects checked indices.
Plan make_plan(const PagedAttentionArgs& args, const AttentionKernel& kernel, int num_threads);

}  // namespace kvkernels
