// Linear layers with many rows of many features, chunk by chunk of the features.
//
// A block of rows and columns with all its features does not fit into the L1 cache, and rows whose
// length is a power of two compete for the same few sets of every cache. So rows are copied once
// per call, and the columns of a panel once per chunk, with a chunk's elements side by side; a
// rectangle goes through all its rows and columns before it comes to the next chunk. Totals are
// added chunk by chunk in decode steps, too (see chunk_size), so the same bits come out. (512 rows
// of 4096 features took 18 to 25 % less time on two cores of a Zen 5.)
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/linear_products.h"

namespace kvkernels {
namespace {

// Rows from which the copies pay. (With two chunks of features they take as long as they save.)
constexpr int64_t kRowsForChunks = 24;
// Columns that are copied at a time. With a block of rows they take 28 KiB of the L1 cache.
constexpr int kPanelCopies = 8, kBlockCols = 4;

template <typename L>
bool has_chunks(const LinearArgs& args) {
  return args.num_rows >= kRowsForChunks && args.in_features > chunk_size<L>(args.in_features);
}

// Features [begin, begin + size); copies are padded with zeros to whole steps.
struct Chunk {
  int64_t begin, size, padded_size;
};

// Calls visit(chunk) for each chunk of the features.
template <typename L, typename Visit>
void for_each_chunk(const LinearArgs& args, const Visit& visit) {
  static_assert(L::kChunk % L::kStep == 0 && L::kStep == kPackedStep);
  for (int64_t begin = 0; begin < args.in_features; begin += L::kChunk) {
    const int64_t size = std::min(args.in_features - begin, L::kChunk);
    visit(Chunk{begin, size, (size + L::kStep - 1) / L::kStep * L::kStep});
  }
}

template <typename Item>
void copy_chunk(const Item* row, const Chunk& chunk, Item* copy) {
  std::memcpy(copy, row + chunk.begin, chunk.size * sizeof(Item));
  std::fill(copy + chunk.size, copy + chunk.padded_size, Item{});
}

// Writes groups of kGroupRows rows: of each group chunk after chunk, of each chunk row after row.
// Rows past the last are left out.
template <typename L>
void pack_chunks(const LinearArgs& args, int64_t row_begin, int64_t row_end, void* packed) {
  using Item = typename L::Item;
  const auto* input = static_cast<const Item*>(args.input);
  auto* target = static_cast<Item*>(packed);
  for (int64_t first = row_begin; first < row_end; first += kGroupRows) {
    const int64_t end = std::min(row_end, first + kGroupRows);
    for_each_chunk<L>(args, [&](const Chunk& chunk) {
      Item* copy = target;
      for (int64_t row = first; row < end; ++row, copy += chunk.padded_size) {
        copy_chunk(input + row * args.input_stride, chunk, copy);
      }
      target += kGroupRows * chunk.padded_size;
    });
  }
}

// Adds a chunk's products of a few rows with the copied columns `cols` to the rows' totals, which
// lie `stride` apart; the first chunk's begin them.
template <typename L, int kRows>
void multiply_copies(const typename L::Item* const* rows, const typename L::Item* const* cols,
                     int64_t size, bool is_first, float* totals, int64_t stride) {
  typename L::Sum sums[L::kMaxSums];
  Ahead none;
  add_columns<L, kRows, kBlockCols, 0>(rows, cols, 0, size, none, sums);
#pragma GCC unroll 24
  for (int i = kRows * kBlockCols; i < L::kMaxSums; ++i) sums[i] = L::zero();
  alignas(64) float more[L::kMaxSums];
  L::template reduce<kRows * kBlockCols>(sums, more);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kBlockCols; ++c) {
      float& total = totals[r * stride + c];
      total = is_first ? more[r * kBlockCols + c] : total + more[r * kBlockCols + c];
    }
  }
}

template <typename L>
using MultiplyCopies = decltype(&multiply_copies<L, 1>);
template <typename L, int... kRows>
MultiplyCopies<L> copies_with_rows(int64_t num_rows, std::integer_sequence<int, kRows...>) {
  constexpr MultiplyCopies<L> kKernels[] = {multiply_copies<L, kRows + 1>...};
  return kKernels[num_rows - 1];
}

// The weights that are copied next, asked for bit by bit.
class NextCopies {
 public:
  // Args: first, the first column's; col_bytes, from column to column; size_bytes, of each;
  // num_parts, calls of `ask` after which all have been asked for.
  NextCopies(const void* first, int64_t col_bytes, int64_t size_bytes, int64_t num_parts)
      : col_(static_cast<const char*>(first)),
        col_bytes_(col_bytes),
        size_bytes_(size_bytes),
        lines_a_part_(kPanelCopies * ((size_bytes + 63) / 64) / std::max<int64_t>(num_parts, 1) +
                      1) {}

  void ask() {
    for (int64_t i = 0; i < lines_a_part_ && num_cols_ < kPanelCopies; ++i) {
      prefetch_line<CacheLevel::kL2>(col_ + offset_);
      offset_ += 64;
      if (offset_ < size_bytes_) continue;
      offset_ = 0;
      col_ += col_bytes_;
      ++num_cols_;
    }
  }

 private:
  const char* col_;
  const int64_t col_bytes_, size_bytes_, lines_a_part_;
  int64_t offset_ = 0, num_cols_ = 0;
};

// Totals of all rows and columns of a rectangle, and copies of the columns of a panel.
template <typename L>
struct ChunkWork {
  using Item = typename L::Item;

  const LinearTile& tile;
  const int64_t num_rows, num_cols;
  const int64_t stride;  // of rows of totals
  float* totals;
  Item* cols;

  explicit ChunkWork(const LinearTile& tile)
      : tile(tile),
        num_rows(tile.row_end - tile.row_begin),
        num_cols(tile.col_end - tile.col_begin),
        stride((num_cols + L::kPanelCols - 1) / L::kPanelCols * L::kPanelCols) {
    static_assert(L::kPanelCols % kPanelCopies == 0);
    const int64_t copies_size = kPanelCopies * L::kChunk * sizeof(Item) / sizeof(float);
    totals = thread_scratch(1, num_rows * stride + copies_size);
    cols = reinterpret_cast<Item*>(totals + num_rows * stride);
  }

  const Item* weights(int64_t col) const {
    const auto* all = static_cast<const Item*>(tile.layer->weight);
    return all + (tile.col_begin + col) * tile.layer->weight_stride;
  }

  // What the panel of columns from `first` on is followed by.
  const void* after(const Chunk& chunk, int64_t first) const {
    if (first + kPanelCopies < num_cols) return weights(first + kPanelCopies) + chunk.begin;
    const int64_t next_begin = chunk.begin + chunk.size;
    return next_begin < tile.args->in_features ? weights(0) + next_begin : tile.next;
  }
};

// Multiplies a chunk of all rows with a panel of columns.
template <typename L>
void multiply_panel_copies(const ChunkWork<L>& work, const Chunk& chunk, int64_t first) {
  using Item = typename L::Item;
  const LinearTile& tile = work.tile;
  for (int64_t c = 0; c < kPanelCopies; ++c) {
    // Columns past the last one repeat it, and are not stored.
    copy_chunk(work.weights(std::min(first + c, work.num_cols - 1)), chunk,
               work.cols + c * chunk.padded_size);
  }
  NextCopies next(work.after(chunk, first), tile.layer->weight_stride * sizeof(Item),
                  chunk.size * sizeof(Item), work.num_rows / L::kBlockRows);
  const auto* packed = static_cast<const Item*>(tile.packed) + kGroupRows * chunk.begin;
  const int64_t group_size = packed_group_bytes(*tile.args) / sizeof(Item);
  for (int64_t row = 0, count; row < work.num_rows; row += count) {
    count = L::rows_of_block(work.num_rows - row);
    next.ask();
    const Item* rows[L::kBlockRows];
    for (int64_t r = 0; r < count; ++r) {
      rows[r] =
          packed + (row + r) / kGroupRows * group_size + (row + r) % kGroupRows * chunk.padded_size;
    }
    const auto multiply =
        copies_with_rows<L>(count, std::make_integer_sequence<int, L::kBlockRows>());
    for (int c = 0; c < kPanelCopies; c += kBlockCols) {
      const Item* cols[kBlockCols];
      for (int i = 0; i < kBlockCols; ++i) cols[i] = work.cols + (c + i) * chunk.padded_size;
      multiply(rows, cols, chunk.padded_size, chunk.begin == 0,
               work.totals + row * work.stride + first + c, work.stride);
    }
  }
}

template <typename L>
void multiply_chunks(const LinearTile& tile) {
  using Item = typename L::Item;
  const LinearLayer& layer = *tile.layer;
  const ChunkWork<L> work(tile);
  for_each_chunk<L>(*tile.args, [&](const Chunk& chunk) {
    for (int64_t first = 0; first < work.num_cols; first += kPanelCopies) {
      multiply_panel_copies<L>(work, chunk, first);
    }
  });
  for (int64_t r = 0; r < work.num_rows; ++r) {
    auto* out = static_cast<Item*>(layer.out) + (tile.row_begin + r) * layer.out_features;
    for (int64_t c = 0; c < work.num_cols; c += L::kPanelCols) {
      const int64_t count = std::min<int64_t>(work.num_cols - c, L::kPanelCols);
      store_totals<L>(layer, work.totals + r * work.stride + c, tile.col_begin + c, count,
                      out + tile.col_begin + c);
    }
  }
}

template <typename L>
void multiply_packed_or_not(const LinearTile& tile) {
  if (tile.packed != nullptr) return multiply_chunks<L>(tile);
  multiply_tile<L>(tile);
}

template <typename L>
LinearKernel kernel_with_chunks() {
  return {multiply_packed_or_not<L>, pack_chunks<L>, has_chunks<L>};
}

}  // namespace
}  // namespace kvkernels
