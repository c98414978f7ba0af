// What each instruction set implements for the scheduler (attention.cpp): attention of a tile of
// query rows to a range of keys. Included by files compiled for different instruction sets, so
// every function here is static: of an inline one the linker would keep a single copy, perhaps one
// that this processor cannot run.
#pragma once

#include <cstdint>

#include "cpu/thread_scratch.h"
#include "kvkernels/attention.h"

namespace kvkernels {

// The same rows for one or several key-value heads of one sequence: row r is query r / group of the
// sequence, for head r % group of the `group` query heads that share a key-value head. Later rows
// stand at the same or later positions, so the range of keys they see never begins or ends earlier.
struct AttentionTile {
  const PagedAttentionArgs* args;
  const int32_t* blocks;  // the sequence's row of the block table
  int64_t seq_len;
  int64_t first_token;            // index of the sequence's first query among all tokens
  int64_t first_position;         // position of that query in the sequence; negative if it has more
                                  // queries than tokens
  int64_t kv_head, num_kv_heads;  // the first head, and how many from it on
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;  // not empty; within what the rows together see
  // The tile that the same thread works on next, or null. Its first keys may be prefetched towards
  // the end of this one.
  const AttentionTile* next;
};

// Softmax statistics of each row of one head over the tile's keys; scores are in units of log2.
struct TileResult {
  float* out;  // [rows, value_dim]: sum of values, each weighted by 2^(score - max)
  float* max;  // [rows]; minus infinity where a row sees no key
  float* sum;  // [rows]: sum of the weights
};

struct AttentionKernel {
  int64_t max_rows;             // of a tile
  int64_t max_rows_many_heads;  // the same for tiles of several heads; 0: tiles have one head
  void (*attend)(const AttentionTile& tile, const TileResult* results);  // results: one per head
  // out[i] = in[i] * scale, rounded to the dtype.
  void (*narrow)(const float* in, float scale, void* out, int64_t size);
  // out[i] = out[i] * weight + added[i] * added_weight
  void (*merge)(float* out, float weight, const float* added, float added_weight, int64_t size);
  // out[i] = in[i]
  void (*widen)(const void* in, float* out, int64_t size);
  // Whether all numbers are finite. `size` is a multiple of value_dim.
  bool (*are_finite)(const float* in, int64_t size);
};

constexpr int64_t kMaxRows = 192;      // no kernel's max_rows is larger
constexpr int64_t kMaxTileHeads = 16;  // no tile has more heads

// Widths of one head of keys and of values.
struct HeadDims {
  int64_t key, value;

  [[gnu::always_inline]] bool are_multiples_of(int64_t unit) const {
    return key > 0 && value > 0 && key % unit == 0 && value % unit == 0;
  }
};

// The kernel of each instruction set; null where it does not serve the dtype or the widths.
const AttentionKernel* portable_kernel(DType dtype);
const AttentionKernel* avx2_kernel(DType dtype, HeadDims dims);
const AttentionKernel* avx512_kernel(DType dtype, HeadDims dims);
const AttentionKernel* avx512_bf16_kernel(DType dtype, HeadDims dims);
const AttentionKernel* amx_kernel(DType dtype, HeadDims dims);
const AttentionKernel* amx_emulated_kernel(DType dtype, HeadDims dims);

struct CodeKernels;
struct CodeShape;

// What avx512_kernel() does for few rows of bfloat16, but with products for codes by the kernels
// that `kernels_of` gives: see FindCodeKernels.
void attend_few_rows_avx512(const AttentionTile& tile, const TileResult* results,
                            const CodeKernels* (*kernels_of)(const CodeShape&));

// The same, with products for 4-bit codes on matrix tiles (AMX, or emulated).
void attend_codes_amx(const AttentionTile& tile, const TileResult* results);
void attend_codes_amx_emulated(const AttentionTile& tile, const TileResult* results);

// The tile's keys that a row sees, as [begin, end); empty where end <= begin. A tree mask is not
// considered: it is applied to the scores.
struct KeyRange {
  int64_t begin, end;
};

static inline KeyRange visible_keys(const AttentionTile& tile, int64_t row) {
  const PagedAttentionArgs& args = *tile.args;
  const int64_t group = args.num_heads / args.num_kv_heads;
  KeyRange range = {tile.key_begin, tile.key_end};
  int64_t position = tile.first_position + row / group;
  // In a tree any row may stand as far back as the first, so this range is that of the first.
  if (args.tree_mask != nullptr) position = tile.first_position;
  if (args.window > 0 && position - args.window + 1 > range.begin) {
    range.begin = position - args.window + 1;
  }
  if (args.tree_mask != nullptr) return range;
  if (args.causal && position + 1 < range.end) range.end = position + 1;
  return range;
}

// Offset of row `row` of the query for the tile's head `head`, in elements.
static inline int64_t query_offset(const AttentionTile& tile, int64_t row, int64_t head = 0) {
  const PagedAttentionArgs& args = *tile.args;
  const int64_t group = args.num_heads / args.num_kv_heads;
  return (tile.first_token + row / group) * args.query_token_stride +
         ((tile.kv_head + head) * group + row % group) * args.query_head_stride;
}

}  // namespace kvkernels
