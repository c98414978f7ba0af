// The products of a linear layer, for any instruction set. In an anonymous namespace: each file
// that includes this gets its own copy, compiled with that file's flags.
//
// Both operands lie with in_features dense, so a sum runs along vectors of it and is added across
// lanes at the end, or at the end of each chunk. That order is the same for every element of the
// result, in a block of 6 rows by 4 columns of a prompt and in one of 1 by 16 of a decode step. The
// weight is read where it lies; packing it would make prompts faster by a few percent, and double
// its memory.
//
// L is a class with
//   Item, Row       an element of a weight; of a row of the input as it is multiplied
//   Sum             a vector of partial sums
//   kStep           elements that are multiplied at a time, in kVectors vectors
//   kPanelCols      columns that are stored together
//   kBlockRows, rows_of_block(n)  rows of a block at most, and if n are left
//   block_cols(n)   columns of a block of n rows: as many as the registers take
//   kMaxSums        of a block
//   kChunk          if there: elements of a chunk, see chunk_size
//   zero()          a Sum
//   load<V>(p)      vector V of kStep elements of a row
//   load<V>(p, n)   the same where only the first n are there
//   add(sum, a, b)  sum + a * b, lane by lane
//   reduce<N>(sums, totals)  adds up N sums, each over its lanes
//   store(totals, count, out), widen(bias)
// and, where Row is not Item, load_item<V>(p), load_item<V>(p, n): the same of a weight, and
// widen_row(items, n, row): the row as it is multiplied, padded to whole steps.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/linear_ahead.h"
#include "cpu/linear_kernel.h"
#include "cpu/thread_scratch.h"

namespace kvkernels {
namespace {

// Bytes of widened rows, which should stay in the L2 cache while they meet the columns of a tile.
constexpr int64_t kWidenedBytes = 256 << 10;
// With at least this many rows, a panel of columns is widened first as well, unless it is so large
// that the L2 cache could not feed both.
constexpr int64_t kRowsForWideCols = 12, kWideColsBytes = 64 << 10;

// Columns that are read at a time with one row, however many make a block. All time then goes into
// reading them, and memory is read faster in fewer streams than 16: that took 10 % less time on two
// cores of a Zen 5 (2 streams did as well).
constexpr int kStreams = 4;

// Rows of one of the two operands.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;

  const T* row(int64_t index) const { return data + index * stride; }
};

template <typename L>
constexpr bool kWidensRows = !std::is_same_v<typename L::Row, typename L::Item>;

template <typename L, int kVector, typename T, typename... Count>
[[gnu::always_inline]] inline auto load(const T* p, Count... count) {
  if constexpr (std::is_same_v<T, typename L::Row>) {
    return L::template load<kVector>(p, count...);
  } else {
    return L::template load_item<kVector>(p, count...);
  }
}

// Adds the products of one vector of each row and column, from `i` on, to the sums. `count` is
// empty, or the number of elements that are left.
template <typename L, int kRows, int kCols, int kVector, typename Col, typename... Count>
[[gnu::always_inline]] inline void add_vector(const typename L::Row* const* rows,
                                              const Col* const* cols, int64_t i,
                                              typename L::Sum* sums, Count... count) {
  decltype(load<L, kVector>(rows[0])) row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = load<L, kVector>(rows[r] + i, count...);
#pragma GCC unroll 16
  for (int c = 0; c < kCols; ++c) {
    const auto col = load<L, kVector>(cols[c] + i, count...);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r * kCols + c] = L::add(sums[r * kCols + c], row[r], col);
    }
  }
}

template <typename L, int kRows, int kCols, typename Col, typename... Count>
[[gnu::always_inline]] inline void add_step(const typename L::Row* const* rows,
                                            const Col* const* cols, int64_t i,
                                            typename L::Sum* sums, Count... count) {
  add_vector<L, kRows, kCols, 0>(rows, cols, i, sums, count...);
  if constexpr (L::kVectors == 2) add_vector<L, kRows, kCols, 1>(rows, cols, i, sums, count...);
}

// sums[r * kCols + c]: of the products of row r and column c, for elements [begin, end). Prefetches
// one part in kParts of the next weights; none if kParts is 0.
template <typename L, int kRows, int kCols, int kParts, typename Col>
[[gnu::always_inline]] inline void add_columns(const typename L::Row* const* rows,
                                               const Col* const* cols, int64_t begin, int64_t end,
                                               Ahead& ahead, typename L::Sum* sums) {
#pragma GCC unroll 24
  for (int i = 0; i < kRows * kCols; ++i) sums[i] = L::zero();
  int64_t i = begin;
  for (; i + L::kStep <= end; i += L::kStep) {
    add_step<L, kRows, kCols>(rows, cols, i, sums);
    constexpr int64_t kBytes = kCols * L::kStep * sizeof(typename L::Item);
    if constexpr (kParts > 0) ahead.advance(std::max<int64_t>(1, kBytes / 64 / kParts));
  }
  if (i < end) add_step<L, kRows, kCols>(rows, cols, i, sums, end - i);
}

// Elements whose products are summed up lane by lane; the totals of such chunks are then added. All
// of them are one chunk where there are no more than two, or L does not say.
template <typename L>
constexpr int64_t chunk_size(int64_t size) {
  if constexpr (requires { L::kChunk; }) {
    if (size > 2 * L::kChunk) return L::kChunk;
  }
  return std::max<int64_t>(size, 1);
}

// totals[i] = the total of sum i, or, of a later chunk, adds that. All kMaxSums sums must be set.
template <typename L, int kCount>
[[gnu::always_inline]] inline void add_totals(const typename L::Sum* sums, bool is_first,
                                              float* totals) {
  alignas(64) float more[L::kMaxSums];
  L::template reduce<kCount>(sums, more);
  for (int i = 0; i < kCount; ++i) totals[i] = is_first ? more[i] : totals[i] + more[i];
}

// The same as multiply_block for one row and more features than a chunk, in kStreams streams.
template <typename L, int kParts, typename Col>
void multiply_streams(const typename L::Row* const* row, const Col* const* cols, int64_t size,
                      Ahead& ahead, float* totals) {
  constexpr int kCols = L::block_cols(1);
  static_assert(kCols % kStreams == 0);
  typename L::Sum sums[L::kMaxSums];
#pragma GCC unroll 24
  for (int i = kStreams; i < L::kMaxSums; ++i) sums[i] = L::zero();
#pragma GCC unroll 1
  for (int first = 0; first < kCols; first += kStreams) {
    for (int64_t begin = 0, end; begin < size; begin = end) {
      end = std::min(begin + chunk_size<L>(size), size);
      add_columns<L, 1, kStreams, kParts>(row, cols + first, begin, end, ahead, sums);
      add_totals<L, kStreams>(sums, begin == 0, totals + first);
    }
  }
}

// totals[r * kCols + c] = row r * column c. Prefetches as add_columns.
template <typename L, int kRows, int kParts, typename Col>
void multiply_block(const typename L::Row* const* rows, const Col* const* cols, int64_t size,
                    Ahead& ahead, float* totals) {
  constexpr int kCols = L::block_cols(kRows);
  constexpr bool kIsOneRow = kRows == 1 && kCols > kStreams;
  const int64_t step = chunk_size<L>(size);
  if constexpr (kIsOneRow) {
    if (size > step) return multiply_streams<L, kParts>(rows, cols, size, ahead, totals);
  }
  typename L::Sum sums[L::kMaxSums];
#pragma GCC unroll 24
  for (int i = kRows * kCols; i < L::kMaxSums; ++i) sums[i] = L::zero();
  if constexpr (kIsOneRow) {
#pragma GCC unroll 1
    for (int first = 0; first < kCols; first += kStreams) {
      typename L::Sum some[kStreams];
      add_columns<L, 1, kStreams, kParts>(rows, cols + first, 0, size, ahead, some);
      std::copy_n(some, kStreams, sums + first);
    }
    return L::template reduce<kCols>(sums, totals);
  }
  add_columns<L, kRows, kCols, kParts>(rows, cols, 0, std::min(step, size), ahead, sums);
  L::template reduce<kRows * kCols>(sums, totals);
  for (int64_t begin = step; begin < size; begin += step) {
    add_columns<L, kRows, kCols, kParts>(rows, cols, begin, std::min(begin + step, size), ahead,
                                         sums);
    add_totals<L, kRows * kCols>(sums, false, totals);
  }
}

// Stores `count` totals, at most kPanelCols, of one row and the layer's columns from `col` on. Adds
// the bias to them first.
template <typename L>
void store_totals(const LinearLayer& layer, float* totals, int64_t col, int64_t count,
                  typename L::Item* out) {
  if (layer.bias != nullptr) {
    const auto* bias = static_cast<const typename L::Item*>(layer.bias) + col;
    for (int64_t c = 0; c < count; ++c) totals[c] += L::widen(bias[c]);
  }
  L::store(totals, count, out);
}

// Multiplies and stores kPanelCols columns, from the layer's `col` on, for a few rows, from its
// `row` on. `size` is in_features, or more where both operands are padded.
template <typename L, int kRows, int kParts, typename Col>
void multiply_rows(const LinearTile& tile, const Rows<typename L::Row>& input, int64_t row,
                   const Rows<Col>& weight, int64_t col, int64_t size, Ahead& ahead) {
  using Item = typename L::Item;
  constexpr int kCols = L::block_cols(kRows);
  const LinearLayer& layer = *tile.layer;
  const int64_t count = std::min<int64_t>(L::kPanelCols, tile.col_end - col);
  const typename L::Row* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = input.row(r);
  alignas(64) float totals[kRows][L::kPanelCols];
  for (int first = 0; first < count; first += kCols) {
    const Col* cols[kCols];
    // Columns past the last one repeat it, and are not stored.
    for (int c = 0; c < kCols; ++c) cols[c] = weight.row(std::min<int64_t>(first + c, count - 1));
    alignas(64) float block[L::kMaxSums];
    multiply_block<L, kRows, kParts>(rows, cols, size, ahead, block);
    for (int r = 0; r < kRows; ++r) std::copy_n(block + r * kCols, kCols, totals[r] + first);
  }
  for (int r = 0; r < kRows; ++r) {
    store_totals<L>(layer, totals[r], col, count,
                    static_cast<Item*>(layer.out) + (row + r) * layer.out_features + col);
  }
}

template <typename L, typename Col>
using MultiplyRows = decltype(&multiply_rows<L, 1, 1, Col>);
template <typename L, int kParts, typename Col, int... kRows>
MultiplyRows<L, Col> of_rows(int64_t num_rows, std::integer_sequence<int, kRows...>) {
  constexpr MultiplyRows<L, Col> kKernels[] = {multiply_rows<L, kRows + 1, kParts, Col>...};
  return kKernels[num_rows - 1];
}

// Multiplies all rows from `row_begin` on with a panel of columns. The first kParts blocks of rows
// prefetch what comes next.
template <typename L, int kParts, typename Col>
void multiply_panel(const LinearTile& tile, const Rows<typename L::Row>& input, int64_t row_begin,
                    int64_t row_end, const Rows<Col>& weight, int64_t col, int64_t size,
                    Ahead ahead) {
  constexpr auto kAll = std::make_integer_sequence<int, L::kBlockRows>();
  int64_t block = 0;
  for (int64_t row = row_begin, count; row < row_end; row += count, ++block) {
    count = L::rows_of_block(row_end - row);
    const auto multiply =
        block < kParts ? of_rows<L, kParts, Col>(count, kAll) : of_rows<L, 0, Col>(count, kAll);
    multiply(tile, {input.row(row - row_begin), input.stride}, row, weight, col, size, ahead);
  }
}

// The next weights are prefetched in this many parts at most, where there are many rows.
constexpr int kMostParts = 4;

template <typename L, int kParts>
void multiply_in_parts(const LinearTile& tile, const Rows<typename L::Row>& input,
                       int64_t row_begin, int64_t row_end, typename L::Row* wide_cols) {
  const LinearLayer& layer = *tile.layer;
  const Rows<typename L::Item> weight = {static_cast<const typename L::Item*>(layer.weight),
                                         layer.weight_stride};
  for (int64_t col = tile.col_begin; col < tile.col_end; col += L::kPanelCols) {
    const int64_t next_col = col + L::kPanelCols;
    const void* next = next_col < tile.col_end ? weight.row(next_col) : tile.next;
    const Ahead ahead = {static_cast<const char*>(next)};
    const Rows<typename L::Item> panel = {weight.row(col), weight.stride};
    const int64_t size = tile.args->in_features;
    if constexpr (kWidensRows<L> && kParts == kMostParts) {
      static_assert(kRowsForWideCols > 3 * L::kBlockRows);
      const int64_t panel_bytes = L::kPanelCols * input.stride * sizeof(typename L::Row);
      if (row_end - row_begin >= kRowsForWideCols && panel_bytes <= kWideColsBytes) {
        for (int64_t c = 0; c < std::min<int64_t>(L::kPanelCols, tile.col_end - col); ++c) {
          L::widen_row(panel.row(c), size, wide_cols + c * input.stride);
        }
        const Rows<typename L::Row> wide = {wide_cols, input.stride};
        multiply_panel<L, kParts>(tile, input, row_begin, row_end, wide, col, input.stride, ahead);
        continue;
      }
    }
    multiply_panel<L, kParts>(tile, input, row_begin, row_end, panel, col, size, ahead);
  }
}

template <typename L>
void multiply(const LinearTile& tile, const Rows<typename L::Row>& input, int64_t row_begin,
              int64_t row_end, typename L::Row* wide_cols) {
  const int64_t num_rows = row_end - row_begin;
  if (num_rows <= L::kBlockRows) {
    multiply_in_parts<L, 1>(tile, input, row_begin, row_end, wide_cols);
  } else if (num_rows <= 3 * L::kBlockRows) {
    multiply_in_parts<L, 2>(tile, input, row_begin, row_end, wide_cols);
  } else {
    multiply_in_parts<L, kMostParts>(tile, input, row_begin, row_end, wide_cols);
  }
}

// Widens rows into memory, as many at a time as stay in the caches, and multiplies those.
template <typename L>
void multiply_widened(const LinearTile& tile) {
  const LinearArgs& args = *tile.args;
  const auto* input = static_cast<const typename L::Item*>(args.input);
  const int64_t stride = (args.in_features + L::kStep - 1) / L::kStep * L::kStep;
  const int64_t row_bytes = std::max<int64_t>(stride * sizeof(typename L::Row), 1);
  const int64_t num_blocks = std::max<int64_t>(kWidenedBytes / row_bytes / L::kBlockRows, 1);
  const int64_t step = std::min(num_blocks * L::kBlockRows, tile.row_end - tile.row_begin);
  float* wide_cols = thread_scratch(1, (L::kPanelCols + step) * stride);
  float* rows = wide_cols + L::kPanelCols * stride;
  for (int64_t begin = tile.row_begin, end; begin < tile.row_end; begin = end) {
    end = std::min(begin + step, tile.row_end);
    for (int64_t row = begin; row < end; ++row) {
      L::widen_row(input + row * args.input_stride, args.in_features,
                   rows + (row - begin) * stride);
    }
    multiply<L>(tile, {rows, stride}, begin, end, wide_cols);
  }
}

template <typename L>
void multiply_tile(const LinearTile& tile) {
  if constexpr (kWidensRows<L>) {
    multiply_widened<L>(tile);
  } else {
    const LinearArgs& args = *tile.args;
    const auto* input = static_cast<const typename L::Item*>(args.input);
    multiply<L>(tile, {input + tile.row_begin * args.input_stride, args.input_stride},
                tile.row_begin, tile.row_end, nullptr);
  }
}

}  // namespace
}  // namespace kvkernels
