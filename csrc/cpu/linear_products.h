// The products of a linear layer, for any instruction set. In an anonymous namespace: each file
// that includes this gets its own copy, compiled with that file's flags.
//
// Both operands lie with in_features dense, so a sum runs along vectors of it and is added up over
// the lanes of the vector at the end. That order is the same for every element of the result: in a
// block of 4 rows by 4 columns of a prompt, and in one of 1 by 16 of a decode step. The weight is
// read where it lies; packing it would make prompts faster by a few percent, and take its memory
// twice.
//
// L is a class with
//   Item, Sum       of an operand in memory; a vector of partial sums
//   kStep           elements that one `add` takes
//   kSums           sums that `reduce` adds up over their lanes together
//   zero()          a Sum
//   load(p, n)      a Vector of kStep elements, of which only the first n are there
//   load(p)         the same where all are there
//   add(sum, a, b)  sum + a * b, lane by lane
//   reduce(sums, totals), store(totals, count, out), widen(bias)
#pragma once

#include <algorithm>

#include "cpu/linear_ahead.h"
#include "cpu/linear_kernel.h"

namespace kvkernels {
namespace {

constexpr int kBlockRows = 4;

// Columns of a block: so many that a block has about kSums sums.
template <typename L>
constexpr int block_cols(int num_rows) {
  return L::kSums / (num_rows == 3 ? 4 : num_rows);
}

// Adds the products of kStep elements, from `i` on, to the sums.
template <typename L, int kRows, bool kIsWhole>
[[gnu::always_inline]] inline void add_step(const typename L::Item* const* rows,
                                            const typename L::Item* const* cols, int64_t i,
                                            int64_t count, typename L::Sum* sums) {
  constexpr int kCols = block_cols<L>(kRows);
  typename L::Vector row[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    row[r] = kIsWhole ? L::load(rows[r] + i) : L::load(rows[r] + i, count);
  }
#pragma GCC unroll 16
  for (int c = 0; c < kCols; ++c) {
    const auto col = kIsWhole ? L::load(cols[c] + i) : L::load(cols[c] + i, count);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r * kCols + c] = L::add(sums[r * kCols + c], row[r], col);
    }
  }
}

// totals[r * kCols + c] = row r * column c
// Of the next weights it asks for one part in kParts; for none if that is 0.
template <typename L, int kRows, int kParts>
void multiply_block(const typename L::Item* const* rows, const typename L::Item* const* cols,
                    int64_t size, Ahead& ahead, float* totals) {
  typename L::Sum sums[L::kSums];
#pragma GCC unroll 16
  for (int i = 0; i < L::kSums; ++i) sums[i] = L::zero();
  int64_t i = 0;
  for (; i + L::kStep <= size; i += L::kStep) {
    add_step<L, kRows, true>(rows, cols, i, L::kStep, sums);
    constexpr int64_t kBytes = block_cols<L>(kRows) * L::kStep * sizeof(typename L::Item);
    if constexpr (kParts > 0) ahead.advance(std::max<int64_t>(1, kBytes / 64 / kParts));
  }
  if (i < size) add_step<L, kRows, false>(rows, cols, i, size - i, sums);
  L::reduce(sums, totals);
}

// kSums columns of a few rows.
template <typename L, int kRows, int kParts>
void multiply_rows(const LinearTile& tile, int64_t row, int64_t col, Ahead& ahead) {
  using Item = typename L::Item;
  constexpr int kCols = block_cols<L>(kRows);
  const LinearArgs& args = *tile.args;
  const LinearLayer& layer = *tile.layer;
  const Item* rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = static_cast<const Item*>(args.input) + (row + r) * args.input_stride;
  }
  alignas(64) float totals[kRows][L::kSums];
  for (int first = 0; first < L::kSums && col + first < tile.col_end; first += kCols) {
    const Item* cols[kCols];
    for (int c = 0; c < kCols; ++c) {
      // Columns past the last one repeat it, and are not stored.
      const int64_t index = std::min(col + first + c, tile.col_end - 1);
      cols[c] = static_cast<const Item*>(layer.weight) + index * layer.weight_stride;
    }
    alignas(64) float block[L::kSums];
    multiply_block<L, kRows, kParts>(rows, cols, args.in_features, ahead, block);
    for (int r = 0; r < kRows; ++r) std::copy_n(block + r * kCols, kCols, totals[r] + first);
  }
  const int64_t count = std::min<int64_t>(L::kSums, tile.col_end - col);
  for (int r = 0; r < kRows; ++r) {
    if (layer.bias != nullptr) {
      const auto* bias = static_cast<const Item*>(layer.bias) + col;
      for (int64_t c = 0; c < count; ++c) totals[r][c] += L::widen(bias[c]);
    }
    L::store(totals[r], count,
             static_cast<Item*>(layer.out) + (row + r) * layer.out_features + col);
  }
}

template <typename L>
using MultiplyRows = decltype(&multiply_rows<L, 1, 1>);
template <typename L, int kParts>
constexpr MultiplyRows<L> kOfRows[kBlockRows] = {
    multiply_rows<L, 1, kParts>, multiply_rows<L, 2, kParts>, multiply_rows<L, 3, kParts>,
    multiply_rows<L, 4, kParts>};

// The first kParts blocks of rows ask for what comes next.
template <typename L, int kParts>
void multiply_tile_in_parts(const LinearTile& tile) {
  const LinearLayer& layer = *tile.layer;
  const auto* weight = static_cast<const typename L::Item*>(layer.weight);
  for (int64_t col = tile.col_begin; col < tile.col_end; col += L::kSums) {
    const int64_t next_col = col + L::kSums;
    const void* next =
        next_col < tile.col_end ? weight + next_col * layer.weight_stride : tile.next;
    Ahead ahead = {static_cast<const char*>(next)};
    int64_t block = 0;
    for (int64_t row = tile.row_begin; row < tile.row_end; row += kBlockRows, ++block) {
      const int64_t count = std::min<int64_t>(kBlockRows, tile.row_end - row);
      const auto* of_rows = block < kParts ? kOfRows<L, kParts> : kOfRows<L, 0>;
      of_rows[count - 1](tile, row, col, ahead);
    }
  }
}

template <typename L>
void multiply_tile(const LinearTile& tile) {
  const int64_t num_rows = tile.row_end - tile.row_begin;
  if (num_rows <= kBlockRows) return multiply_tile_in_parts<L, 1>(tile);
  if (num_rows <= 3 * kBlockRows) return multiply_tile_in_parts<L, 2>(tile);
  multiply_tile_in_parts<L, 4>(tile);
}

}  // namespace
}  // namespace kvkernels
