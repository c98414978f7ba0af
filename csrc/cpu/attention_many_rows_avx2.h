// Prefill and extend with AVX2: a tile of query rows against a run of keys.
//
// 64 keys at a time are widened to floats once for all rows, keys also transposed. Both products
// are then plain matrix products of register blocks, kBlockRows rows by 2 vectors: 12 sums, 2
// vectors of the packed tile and one broadcast lane fill 15 of the 16 registers.
#pragma once

#include "cpu/attention_avx2.h"
#include "cpu/attention_scores.h"

namespace kvkernels {
namespace {

constexpr int kBlockRows = 6, kBlockVectors = 2;
constexpr int64_t kPanelKeys = 8 * kBlockVectors;

// A sum over head_dim is cut into parts of this many products, added up at the end: rounding errors
// grow with the length of a sum.
constexpr int64_t kSumLength = 64;

// scores[m][n] = query row m * key n, for one panel of keys.
template <int kRows>
void score_block(const float* query, int64_t head_dim, const float* keys, float* scores) {
  for (int64_t begin = 0; begin < head_dim; begin += kSumLength) {
    const int64_t end = std::min(begin + kSumLength, head_dim);
    __m256 sums[kRows][kBlockVectors];
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_ps();
    for (int64_t i = begin; i < end; ++i) {
      const __m256 a = _mm256_loadu_ps(keys + i * kPanelKeys);
      const __m256 b = _mm256_loadu_ps(keys + i * kPanelKeys + 8);
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
        const __m256 q = _mm256_broadcast_ss(query + m * head_dim + i);
        sums[m][0] = _mm256_fmadd_ps(q, a, sums[m][0]);
        sums[m][1] = _mm256_fmadd_ps(q, b, sums[m][1]);
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < kBlockVectors; ++n) {
        float* target = scores + m * kTileKeys + 8 * n;
        if (begin > 0) sums[m][n] = _mm256_add_ps(sums[m][n], _mm256_loadu_ps(target));
        _mm256_storeu_ps(target, sums[m][n]);
      }
    }
  }
}

// out[m] = out[m] * decay[m] + sum over keys [first, last) of weights[m][key] * values[key], for
// kVectors vectors of value_dim.
template <int kRows, int kVectors>
void value_block(const float* weights, int64_t first, int64_t last, const float* values,
                 int64_t value_dim, const float* decay, float* out) {
  __m256 sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      sums[m][n] =
          _mm256_mul_ps(_mm256_set1_ps(decay[m]), _mm256_loadu_ps(out + m * value_dim + 8 * n));
    }
  }
  for (int64_t t = first; t < last; ++t) {
    __m256 value[kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) value[n] = _mm256_loadu_ps(values + t * value_dim + 8 * n);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const __m256 weight = _mm256_broadcast_ss(weights + m * kTileKeys + t);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) {
        sums[m][n] = _mm256_fmadd_ps(weight, value[n], sums[m][n]);
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      _mm256_storeu_ps(out + m * value_dim + 8 * n, sums[m][n]);
    }
  }
}

constexpr decltype(&score_block<1>) kScoreBlocks[kBlockRows] = {
    score_block<1>, score_block<2>, score_block<3>, score_block<4>, score_block<5>, score_block<6>};
constexpr decltype(&value_block<1, 1>) kValueBlocks[kBlockRows][kBlockVectors] = {
    {value_block<1, 1>, value_block<1, 2>}, {value_block<2, 1>, value_block<2, 2>},
    {value_block<3, 1>, value_block<3, 2>}, {value_block<4, 1>, value_block<4, 2>},
    {value_block<5, 1>, value_block<5, 2>}, {value_block<6, 1>, value_block<6, 2>}};

// One item's query rows, and the tile of keys that is being worked on.
struct Work {
  const AttentionTile* tile;
  int64_t count, head_dim, value_dim;
  float scale;
  bool adjusts;     // whether scores need more than a scale
  float* query;     // [count, head_dim]
  float* keys;      // [kTileKeys / kPanelKeys, head_dim, kPanelKeys]
  float* values;    // [kTileKeys, value_dim]
  float* unpacked;  // [kTileKeys, head_dim]: keys
  float* scores;    // [count, kTileKeys]; then weights
  float* sum;       // [count, 8]
  float* scales;    // two rows: scales and minimums being unpacked
  // Prefetches what the item reads. With few rows `while_packing` is used: it asks while keys are
  // packed. With more, `while_multiplying`: it asks a whole tile ahead, between the products. The
  // other one has nothing to ask for.
  Prefetch while_packing, while_multiplying;
  KeyRange seen[kMaxRows];
  float decay[kMaxRows];
};

template <typename E>
void start_rows(const AttentionTile& tile, const TileResult& result, Work& work) {
  work.tile = &tile;
  work.count = tile.row_end - tile.row_begin;
  work.head_dim = tile.args->head_dim;
  work.value_dim = tile.args->value_dim;
  work.adjusts = adjusts_scores(*tile.args);
  work.scale = work.adjusts ? 1.0f : tile.args->sm_scale * kLog2E;
  const int64_t wide_dim = std::max(work.head_dim, work.value_dim);
  work.query =
      thread_scratch(1, kMaxRows * (work.head_dim + kTileKeys + 8) +
                            kTileKeys * (2 * work.head_dim + work.value_dim) + 2 * wide_dim);
  work.keys = work.query + kMaxRows * work.head_dim;
  work.values = work.keys + kTileKeys * work.head_dim;
  work.unpacked = work.values + kTileKeys * work.value_dim;
  work.scores = work.unpacked + kTileKeys * work.head_dim;
  work.sum = work.scores + kMaxRows * kTileKeys;
  work.scales = work.sum + kMaxRows * 8;
  std::fill_n(result.out, work.count * work.value_dim, 0.0f);
  std::fill_n(result.max, work.count, -kInfinity);
  std::fill_n(work.sum, work.count * 8, 0.0f);
  for (int64_t r = 0; r < work.count; ++r) {
    const auto* query = read_query<typename E::Item>(tile, tile.row_begin + r);
    for (int64_t i = 0; i < work.head_dim; i += 8) {
      _mm256_storeu_ps(work.query + r * work.head_dim + i, E::load(query + i));
    }
    work.seen[r] = visible_keys(tile, tile.row_begin + r);
  }
}

template <typename E>
void pack_keys(const typename E::Item* keys, int64_t* offsets, int64_t num_keys, Work& work) {
  // In a last panel with fewer keys the remaining columns repeat the last key; no row sees them.
  for (int64_t t = num_keys; t % kPanelKeys != 0; ++t) offsets[t] = offsets[num_keys - 1];
  for (int64_t first = 0; first < num_keys; first += 8) {
    float* panel = work.keys + first / kPanelKeys * kPanelKeys * work.head_dim + first % kPanelKeys;
    for (int64_t i = 0; i < work.head_dim; i += 8) {
      __m256 rows[8];
#pragma GCC unroll 8
      for (int t = 0; t < 8; ++t) rows[t] = E::load(keys + offsets[first + t] + i);
      transpose_8x8(rows);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) _mm256_storeu_ps(panel + (i + j) * kPanelKeys, rows[j]);
    }
    work.while_packing.advance(8 * work.head_dim * sizeof(typename E::Item));
  }
}

// Packs the keys (transposed) and the values of the tile of keys [begin, end), as far as they
// belong to the item.
template <typename E>
void load_tile(const AttentionTile& tile, int64_t begin, int64_t end, Work& work) {
  using Item = typename E::Item;
  int64_t key_offsets[kTileKeys], value_offsets[kTileKeys];
  const int64_t count = end - begin, first = std::max<int64_t>(tile.key_begin - begin, 0);
  if (!lies_plain(tile, begin + first, end)) {
    for (int64_t t = first; t < count; ++t) key_offsets[t] = t * work.head_dim;
    repeat_first_row(key_offsets, first);
    unpack_keys<Avx2Unpacker<E>>(tile, 0, begin + first, end, work.scales,
                                 work.unpacked + first * work.head_dim);
    pack_keys<Float32>(work.unpacked, key_offsets, count, work);
    unpack_values<Avx2Unpacker<E>>(tile, 0, begin + first, end, work.scales,
                                   work.values + first * work.value_dim);
    return;
  }
  find_rows(tile, begin + first, end, key_offsets + first, value_offsets + first);
  repeat_first_row(key_offsets, first);
  pack_keys<E>(static_cast<const Item*>(tile.args->key_cache), key_offsets, count, work);
  for (int64_t t = first; t < count; ++t) {
    const Item* value = static_cast<const Item*>(tile.args->value_cache) + value_offsets[t];
    for (int64_t i = 0; i < work.value_dim; i += 8) {
      _mm256_storeu_ps(work.values + t * work.value_dim + i, E::load(value + i));
    }
    work.while_packing.advance(work.value_dim * sizeof(Item));
  }
}

template <typename E>
inline void score_rows(Work& work, int64_t row, int64_t count, int64_t begin, int64_t end,
                       const TileResult& result) {
  const KeyRange columns = seen_columns(work.seen + row, count, begin, end);
  for (int64_t first = 0; first < columns.end; first += kPanelKeys) {
    kScoreBlocks[count - 1](work.query + row * work.head_dim, work.head_dim,
                            work.keys + first * work.head_dim,
                            work.scores + row * kTileKeys + first);
  }
  for (int64_t r = row; r < row + count; ++r) {
    const KeyRange own = seen_columns(work.seen + r, 1, begin, end);
    float* scores = work.scores + r * kTileKeys;
    if (work.adjusts) {
      adjust_scores(*work.tile, work.tile->row_begin + r, 0, begin, columns.end, scores);
    }
    work.decay[r] = softmax_step<E>(scores, columns.end, own.begin, own.end, work.scale,
                                    result.max + r, work.sum + 8 * r);
  }
}

inline void add_values(const Work& work, int64_t row, int64_t count, int64_t begin, int64_t end,
                       const TileResult& result) {
  const KeyRange columns = seen_columns(work.seen + row, count, begin, end);
  for (int64_t i = 0; i < work.value_dim; i += 8 * kBlockVectors) {
    const int num_vectors = i + 8 * kBlockVectors <= work.value_dim ? kBlockVectors : 1;
    kValueBlocks[count - 1][num_vectors - 1](
        work.scores + row * kTileKeys, columns.begin, columns.end, work.values + i, work.value_dim,
        work.decay + row, result.out + row * work.value_dim + i);
  }
}

template <typename E>
void attend_many_rows(const AttentionTile& tile, const TileResult& result) {
  Work work;
  start_rows<E>(tile, result, work);
  Prefetch& next = work.count <= kFewRows ? work.while_packing : work.while_multiplying;
  const int64_t tile_bytes = plan_reading(tile, kTileKeys, next);
  work.while_multiplying.set_lead(tile_bytes);
  const int64_t first = tile.key_begin / kTileKeys * kTileKeys;
  for (int64_t begin = first, end; begin < tile.key_end; begin = end) {
    end = key_tile_end(tile, begin, kTileKeys);
    const auto [row_begin, row_end] = rows_that_see(work.seen, work.count, begin, end);
    if (row_begin == row_end) continue;
    next.begin(tile_bytes);
    load_tile<E>(tile, begin, end, work);
    const int64_t num_blocks = (row_end - row_begin + kBlockRows - 1) / kBlockRows;
    for (int64_t row = row_begin; row < row_end; row += kBlockRows) {
      const int64_t count = std::min<int64_t>(row_end - row, kBlockRows);
      score_rows<E>(work, row, count, begin, end, result);
      add_values(work, row, count, begin, end, result);
      work.while_multiplying.advance(share_of_bytes(tile_bytes, num_blocks));
    }
  }
  for (int64_t r = 0; r < work.count; ++r) {
    result.sum[r] = sum_lanes(_mm256_loadu_ps(work.sum + 8 * r));
  }
}

}  // namespace
}  // namespace kvkernels
