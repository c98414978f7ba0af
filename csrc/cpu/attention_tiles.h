// Attention of one tile, and the merge of its results over several chunks of keys.
#pragma once

#include "cpu/attention_kernel.h"

namespace kvkernels {

// Writes the result over no keys.
void clear_rows(const TileResult& result, int64_t num_rows, int64_t dim);

// Does to a result what merging it into the result over no keys does: a weight of 0 times an
// infinite value has left NaN in a row that saw no key, or none with a finite score.
void clear_empty_rows(const TileResult& result, int64_t num_rows, int64_t dim);

// Merges the results over more keys, `part`, into `all`. A row that sees none of those keys keeps
// its bits, so its result depends only on keys that it sees.
void merge_rows(const AttentionKernel& kernel, const TileResult& part, const TileResult& all,
                int64_t num_rows, int64_t dim);

// Attends the tile's rows to its keys; writes one result per head. A row's result depends on
// nothing but the keys it sees, even if the others hold infinities or NaN.
void attend_tile(const AttentionKernel& kernel, const AttentionTile& tile,
                 const TileResult* results);

}  // namespace kvkernels
