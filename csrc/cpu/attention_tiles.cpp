// Keeps keys that a row does not see out of its result. A kernel multiplies neighbouring rows by
// the same values, and gives those that a row does not see the weight 0. That is exact unless such
// a value is infinite or NaN, since 0 times either is NaN. So a tile whose rows see different keys,
// and where a head's results are not all finite, is computed again for that head, each query by
// itself with its own keys. That is slow, and rare.
#include "cpu/attention_tiles.h"

#include <algorithm>
#include <cmath>

#include "cpu/attention_scores.h"

namespace kvkernels {
namespace {

int64_t group_of(const AttentionTile& tile) {
  return tile.args->num_heads / tile.args->num_kv_heads;
}

// Whether some row does not see all of the tile's keys.
bool sees_in_part(const AttentionTile& tile) {
  if (tile.args->tree_mask != nullptr) {
    if (tile.key_end > tile.first_position) return true;
    // Rows stand at different depths of the tree, so their windows begin at different keys; the
    // window of a chain's last token begins last.
    const int64_t window = tile.args->window;
    return window > 0 && tile.key_begin < tile.seq_len - window;
  }
  const KeyRange first = visible_keys(tile, tile.row_begin);
  const KeyRange last = visible_keys(tile, tile.row_end - 1);
  return first.begin != last.begin || first.end != last.end;
}

bool are_finite(const AttentionKernel& kernel, const TileResult& result,
                const AttentionTile& tile) {
  return kernel.are_finite(result.out, (tile.row_end - tile.row_begin) * tile.args->value_dim);
}

// Calls visit(begin, end) for ranges that together hold all keys of the tile that its rows, of one
// query, see. In a range they see all keys or none.
template <typename Visit>
void for_each_seen(const AttentionTile& tile, const Visit& visit) {
  const PagedAttentionArgs& args = *tile.args;
  const KeyRange range = visible_keys(tile, tile.row_begin);
  if (args.tree_mask == nullptr) {
    if (range.begin < range.end) visit(range.begin, range.end);
    return;
  }
  int64_t begin = range.begin;
  if (args.window > 0) {
    const TreeRow row = tree_row(tile, tile.row_begin / group_of(tile));
    begin = std::max(begin, row.position - args.window + 1);
  }
  // A chunk may end before the window of a deep row begins.
  const int64_t end_of_old = std::min(range.end, tile.first_position);
  if (begin < end_of_old) visit(begin, end_of_old);
  // New tokens do not lie in the order of their positions, so the window does not bound them.
  const int64_t first_new = std::max(range.begin, tile.first_position);
  for (int64_t key = first_new; key < range.end; ++key) visit(key, key + 1);
}

TileResult rows_from(const TileResult& all, int64_t row, int64_t dim) {
  return {all.out + row * dim, all.max + row, all.sum + row};
}

// Computes the rows of one query and head again, from ranges that hold no key beside those they
// see.
void attend_query(const AttentionKernel& kernel, const AttentionTile& tile,
                  const TileResult& result) {
  const int64_t num_rows = tile.row_end - tile.row_begin, dim = tile.args->value_dim;
  float* memory = thread_scratch(2, num_rows * (dim + 2));
  float* max = memory + num_rows * dim;
  const TileResult of_part = {memory, max, max + num_rows};
  clear_rows(result, num_rows, dim);
  for_each_seen(tile, [&](int64_t begin, int64_t end) {
    AttentionTile part = tile;
    part.key_begin = begin;
    part.key_end = end;
    kernel.attend(part, &of_part);
    merge_rows(kernel, of_part, result, num_rows, dim);
  });
}

void attend_apart(const AttentionKernel& kernel, const AttentionTile& tile,
                  const TileResult& result) {
  const int64_t group = group_of(tile), dim = tile.args->value_dim;
  AttentionTile one = tile;
  one.next = nullptr;
  for (; one.row_begin < tile.row_end; one.row_begin = one.row_end) {
    one.row_end = std::min((one.row_begin / group + 1) * group, tile.row_end);
    const TileResult own = rows_from(result, one.row_begin - tile.row_begin, dim);
    if (!are_finite(kernel, own, one)) attend_query(kernel, one, own);
  }
}

}  // namespace

void clear_rows(const TileResult& result, int64_t num_rows, int64_t dim) {
  std::fill_n(result.out, num_rows * dim, 0.0f);
  std::fill_n(result.max, num_rows, -kInfinity);
  std::fill_n(result.sum, num_rows, 0.0f);
}

void clear_empty_rows(const TileResult& result, int64_t num_rows, int64_t dim) {
  for (int64_t row = 0; row < num_rows; ++row) {
    if (result.sum[row] == 0) clear_rows(rows_from(result, row, dim), 1, dim);
  }
}

void merge_rows(const AttentionKernel& kernel, const TileResult& part, const TileResult& all,
                int64_t num_rows, int64_t dim) {
  for (int64_t row = 0; row < num_rows; ++row) {
    // It saw no key: minus infinity minus itself would be NaN.
    if (part.sum[row] == 0) continue;
    const float max = std::max(all.max[row], part.max[row]);
    const float old_weight = std::exp2(all.max[row] - max);
    const float new_weight = std::exp2(part.max[row] - max);
    all.max[row] = max;
    all.sum[row] = old_weight * all.sum[row] + new_weight * part.sum[row];
    kernel.merge(all.out + row * dim, old_weight, part.out + row * dim, new_weight, dim);
  }
}

void attend_tile(const AttentionKernel& kernel, const AttentionTile& tile,
                 const TileResult* results) {
  kernel.attend(tile, results);
  if (!sees_in_part(tile)) return;
  // Head by head: no head's bits depend on those beside it.
  AttentionTile one = tile;
  one.num_kv_heads = 1;
  for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
    one.kv_head = tile.kv_head + head;
    if (!are_finite(kernel, results[head], one)) attend_apart(kernel, one, results[head]);
  }
}

}  // namespace kvkernels
