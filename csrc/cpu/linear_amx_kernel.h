// The products of a linear layer of bfloat16 on 16-row matrix tiles, with AVX-512 for all that is
// not a product. Written against a small interface (Tiles) so that one text serves the AMX
// instructions and their emulation. Only for files compiled for AVX512-BF16. In an anonymous
// namespace: each file that includes this gets its own copy, compiled with that file's flags.
//
//   out^T [16 columns, 16 rows] += W [16 columns, 32 features] * X^T [32 features, 16 rows]
//
// A column's weights are a row of the A operand where they lie in memory, at any stride. X^T is
// packed once, pairs of features side by side, for all layers and all columns. Every element is
// summed in the order of the features, 32 a step, however many rows and columns there are. So a
// decode step multiplies the same tiles as a prompt, with most of their rows zeros; it waits for
// memory anyway.
//
// Tiles is a class as in tiles_amx.h.
#pragma once

#include <algorithm>

#include "cpu/linear_ahead.h"
#include "cpu/linear_kernel.h"
#include "cpu/simd_avx512_bf16.h"
#include "cpu/thread_scratch.h"

namespace kvkernels {
namespace {

constexpr int64_t kLanes = kGroupRows;           // rows, or columns, of a tile
constexpr int64_t kStep = kPackedStep;           // features that one dot sums over
constexpr int64_t kTileBytes = 64;               // of a row of a tile register
constexpr int64_t kTileSize = kLanes * kLanes;   // sums of a tile
constexpr int64_t kPackedSize = kLanes * kStep;  // elements of a group of packed rows in one step
// Weights are copied first, kCopiedSteps steps at a time, if at least kMinCopiedBlocks blocks of
// rows multiply them: in memory, rows whose length is a power of two compete for the same sets of
// the L1 cache. It has room for a copy and the rows of a block.
constexpr int64_t kMinCopiedBlocks = 3, kCopiedSteps = 9;
constexpr int64_t kBlockCols = 2 * kLanes, kBlockRows = 2 * kLanes;

constexpr uint32_t first_items(int64_t count) {
  return count >= kStep ? ~uint32_t{0} : (uint32_t{1} << count) - 1;
}

// Writes [groups, in_features / 32, 16 pairs of features, 16 rows, 2]; zeros after the last feature
// and the last row.
void pack_rows(const LinearArgs& args, int64_t row_begin, int64_t row_end, void* groups) {
  const auto* input = static_cast<const uint16_t*>(args.input);
  auto* packed = static_cast<uint16_t*>(groups);
  for (int64_t first = row_begin; first < row_end; first += kLanes) {
    const int64_t count = std::min(kLanes, row_end - first);
    for (int64_t step = 0; step < num_packed_steps(args); ++step, packed += kPackedSize) {
      const int64_t i = step * kStep;
      const __mmask32 mask = first_items(args.in_features - i);
      __m512 rows[kLanes];
      for (int64_t n = 0; n < kLanes; ++n) {
        rows[n] = n < count ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(
                                  mask, input + (first + n) * args.input_stride + i))
                            : _mm512_setzero_ps();
      }
      transpose_16x16(rows);
      for (int64_t n = 0; n < kLanes; ++n) _mm512_store_ps(packed + n * kStep, rows[n]);
    }
  }
}

// The weights of 16 columns, from some step on.
struct Columns {
  const uint16_t* first;
  int64_t stride, step;  // from column to column in bytes; from step to step in elements
};

// What a thread works on: some columns of a rectangle, for all of its rows.
struct Work {
  const LinearTile* tile;
  int64_t num_whole_steps, num_steps;
  int64_t group_size;  // elements of a group of packed rows
  int64_t num_blocks;  // of rows
  uint16_t* copies;    // [2, kCopiedSteps, 16, kStep]
  float* sums;         // [num_blocks, 2 groups, 2 halves of columns, kTileSize]
  Ahead ahead;
  int64_t lines_a_step;  // cache lines that each block of rows prefetches per step
};

void start(const LinearTile& tile, Work& work) {
  const LinearArgs& args = *tile.args;
  work.tile = &tile;
  work.num_whole_steps = args.in_features / kStep;
  work.num_steps = num_packed_steps(args);
  work.group_size = packed_group_bytes(args) / sizeof(uint16_t);
  work.num_blocks = (tile.row_end - tile.row_begin + kBlockRows - 1) / kBlockRows;
  // A step of 32 columns is 32 lines, which the blocks share.
  work.lines_a_step = (kBlockCols + work.num_blocks - 1) / work.num_blocks;
  const int64_t sums_size = work.num_blocks * kBlockRows * kBlockCols;
  work.sums = thread_scratch(1, sums_size + kCopiedSteps * kPackedSize);
  work.copies = reinterpret_cast<uint16_t*>(work.sums + sums_size);
}

// Copies the weights of 16 columns from `col` on for the steps [begin, end), with zeros after the
// last feature and the last column: what lies there is not read.
Columns copy_columns(const Work& work, int64_t col, int64_t begin, int64_t end, uint16_t* copy) {
  const LinearTile& tile = *work.tile;
  const int64_t count = std::min(kLanes, tile.col_end - col);
  const int64_t stride = tile.layer->weight_stride;
  const auto* weight = static_cast<const uint16_t*>(tile.layer->weight) + col * stride;
  uint16_t* target = copy;
  for (int64_t step = begin; step < end; ++step, target += kPackedSize) {
    const __mmask32 mask = first_items(tile.args->in_features - step * kStep);
    const uint16_t* source = weight + step * kStep;
    for (int64_t m = 0; m < count; ++m, source += stride) {
      _mm512_store_si512(target + m * kStep, _mm512_maskz_loadu_epi16(mask, source));
    }
    for (int64_t m = count; m < kLanes; ++m) {
      _mm512_store_si512(target + m * kStep, _mm512_setzero_si512());
    }
  }
  return {copy, kTileBytes, kPackedSize};
}

Columns find_columns(const Work& work, int64_t col, int64_t begin) {
  const LinearLayer& layer = *work.tile->layer;
  const auto* weight = static_cast<const uint16_t*>(layer.weight) + col * layer.weight_stride;
  return {weight + begin * kStep, layer.weight_stride * static_cast<int64_t>(sizeof(uint16_t)),
          kStep};
}

// Adds the products of some steps to the sums of 16 or 32 columns and one or two groups of rows.
template <int kCols, int kGroups, typename Tiles>
void multiply_block(Tiles& tiles, const Columns* columns, const uint16_t* rows, int64_t num_steps,
                    bool is_first, Work& work, float* sums) {
  constexpr bool kHas1 = kCols == 2, kHas2 = kGroups == 2, kHas3 = kHas1 && kHas2;
  if (is_first) {
    tiles.template zero<0>();
    if constexpr (kHas1) tiles.template zero<1>();
    if constexpr (kHas2) tiles.template zero<2>();
    if constexpr (kHas3) tiles.template zero<3>();
  } else {
    tiles.template load<0>(sums, kTileBytes);
    if constexpr (kHas1) tiles.template load<1>(sums + kTileSize, kTileBytes);
    if constexpr (kHas2) tiles.template load<2>(sums + 2 * kTileSize, kTileBytes);
    if constexpr (kHas3) tiles.template load<3>(sums + 3 * kTileSize, kTileBytes);
  }
  const uint16_t *one = columns[0].first, *two = columns[kCols - 1].first;
  const int64_t stride = columns[0].stride, size = columns[0].step;
  Ahead ahead = work.ahead;
  for (int64_t step = 0; step < num_steps; ++step) {
    tiles.template load<6>(rows, kTileBytes);
    tiles.template load<4>(one, stride);
    tiles.template dot<0, 4, 6>();
    if constexpr (kHas1) {
      tiles.template load<5>(two, stride);
      tiles.template dot<1, 5, 6>();
    }
    if constexpr (kHas2) {
      tiles.template load<7>(rows + work.group_size, kTileBytes);
      tiles.template dot<2, 4, 7>();
    }
    if constexpr (kHas3) tiles.template dot<3, 5, 7>();
    one += size;
    two += size;
    rows += kPackedSize;
    ahead.advance(work.lines_a_step);
  }
  work.ahead = ahead;
  tiles.template store<0>(sums, kTileBytes);
  if constexpr (kHas1) tiles.template store<1>(sums + kTileSize, kTileBytes);
  if constexpr (kHas2) tiles.template store<2>(sums + 2 * kTileSize, kTileBytes);
  if constexpr (kHas3) tiles.template store<3>(sums + 3 * kTileSize, kTileBytes);
}

// Adds the bias of up to 32 columns to the sums of a group of rows, and stores them.
void finish(const Work& work, const float* sums, int64_t row, int64_t col) {
  const LinearTile& tile = *work.tile;
  const LinearLayer& layer = *tile.layer;
  const int64_t num_rows = std::min(kLanes, tile.row_end - row);
  const int64_t num_cols = std::min(kBlockCols, tile.col_end - col);
  alignas(64) float bias[kBlockCols] = {};
  if (layer.bias != nullptr) {
    const auto* items = static_cast<const uint16_t*>(layer.bias) + col;
    for (int64_t i = 0; i < num_cols; i += kLanes) {
      _mm512_store_ps(bias + i, BFloat16::masked_load(items + i, first_lanes(num_cols - i)));
    }
  }
  __m512 pairs[kLanes];  // pairs of columns; a lane is a row
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t c = 2 * i;
    pairs[i] = round_pairs(
        _mm512_add_ps(_mm512_load_ps(sums + c * kLanes), _mm512_set1_ps(bias[c])),
        _mm512_add_ps(_mm512_load_ps(sums + (c + 1) * kLanes), _mm512_set1_ps(bias[c + 1])));
  }
  transpose_16x16(pairs);
  const __mmask32 mask = first_items(num_cols);
  auto* out = static_cast<uint16_t*>(layer.out) + row * layer.out_features + col;
  for (int64_t n = 0; n < num_rows; ++n, out += layer.out_features) {
    _mm512_mask_storeu_epi16(out, mask, _mm512_castps_si512(pairs[n]));
  }
}

// Prefetches the lines of a block's result: a store that has to wait holds up the stores of sums.
// Inlined by force, see prefetch_line.h.
[[gnu::always_inline]] inline void expect_result(const LinearTile& tile, int64_t row, int64_t col) {
  const int64_t row_end = std::min(tile.row_end, row + kBlockRows), size = tile.layer->out_features;
  const auto* out = static_cast<const uint16_t*>(tile.layer->out) + col;
  for (; row < row_end; ++row) __builtin_prefetch(out + row * size);
}

// Multiplies some steps of 16 or 32 columns with all rows; after the last steps writes the results.
template <int kCols, typename Tiles>
void multiply_steps(Tiles& tiles, const Columns* columns, int64_t col, int64_t begin, int64_t end,
                    Work& work) {
  const LinearTile& tile = *work.tile;
  const bool is_last = end == work.num_steps;
  const uint16_t* rows = static_cast<const uint16_t*>(tile.packed) + begin * kPackedSize;
  float* sums = work.sums;
  for (int64_t row = tile.row_begin; row < tile.row_end; row += kBlockRows) {
    const bool has_two = row + kLanes < tile.row_end;
    const auto multiply =
        has_two ? multiply_block<kCols, 2, Tiles> : multiply_block<kCols, 1, Tiles>;
    if (is_last) expect_result(tile, row, col);
    multiply(tiles, columns, rows, end - begin, begin == 0, work, sums);
    if (is_last) {
      finish(work, sums, row, col);
      if (has_two) finish(work, sums + 2 * kTileSize, row + kLanes, col);
    }
    rows += 2 * work.group_size;
    sums += kBlockRows * kBlockCols;
  }
}

template <int kCols, typename Tiles>
void multiply_columns(Tiles& tiles, int64_t col, Work& work) {
  const bool is_whole = col + kCols * kLanes <= work.tile->col_end;
  const bool reads_in_place = is_whole && work.num_blocks < kMinCopiedBlocks;
  Columns columns[kCols];
  for (int64_t begin = 0, end; begin < work.num_steps; begin = end) {
    if (reads_in_place && begin < work.num_whole_steps) {
      end = work.num_whole_steps;
      for (int c = 0; c < kCols; ++c) columns[c] = find_columns(work, col + c * kLanes, begin);
    } else {
      end = std::min(begin + kCopiedSteps, work.num_steps);
      for (int c = 0; c < kCols; ++c) {
        columns[c] = copy_columns(work, col + c * kLanes, begin, end,
                                  work.copies + c * kCopiedSteps * kPackedSize);
      }
    }
    multiply_steps<kCols>(tiles, columns, col, begin, end, work);
  }
}

template <typename Tiles>
void multiply_tile(const LinearTile& tile) {
  Tiles tiles;  // configures the registers, and releases them at the end
  Work work;
  start(tile, work);
  const auto* weight = static_cast<const uint16_t*>(tile.layer->weight);
  for (int64_t col = tile.col_begin; col < tile.col_end; col += kBlockCols) {
    const int64_t next_col = col + kBlockCols;
    const void* next =
        next_col < tile.col_end ? weight + next_col * tile.layer->weight_stride : tile.next;
    work.ahead = {static_cast<const char*>(next)};
    if (col + kLanes < tile.col_end) {
      multiply_columns<2>(tiles, col, work);
    } else {
      multiply_columns<1>(tiles, col, work);
    }
  }
}

template <typename Tiles>
LinearKernel tile_kernel(DType dtype) {
  if (dtype != DType::kBFloat16) return {nullptr};
  return {multiply_tile<Tiles>, pack_rows};
}

}  // namespace
}  // namespace kvkernels
