// One tile of a call, and how the results over its keys are put together.
#pragma once

#include "cpu/attention_kernel.h"

namespace kvkernels {

// The result over no keys.
void clear_rows(const TileResult& result, int64_t num_rows, int64_t dim);

// Adds the results over more keys. A row that sees none of them keeps its bits, so only the keys it
// sees decide them.
void merge_rows(const AttentionKernel& kernel, const TileResult& part, const TileResult& all,
                int64_t num_rows, int64_t dim);

// What the rows of a tile make of its keys, one result for each head; each row's depends on nothing
// but the keys it sees, whatever the others hold.
void attend_tile(const AttentionKernel& kernel, const AttentionTile& tile,
                 const TileResult* results);

}  // namespace kvkernels
