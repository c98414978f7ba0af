// Prefill and extend with AVX-512: a tile of query rows against a run of keys, at the speed of
// multiplication.
//
// 64 keys at a time are packed into lanes once for all rows, keys also transposed. Both products
// are then plain matrix products of register blocks, kBlockRows rows by 4 vectors: 24 sums, 4
// vectors of the packed tile and one broadcast lane fill 29 of the 32 registers, and each load
// feeds several multiplications.
//
// What a lane of 32 bits holds is a template parameter L: one float (WidenedLanes below), or two
// neighbouring bfloat16 (PairLanes of attention_avx512_bf16.cpp), neighbours along head_dim in the
// first product and among the keys in the second.
#pragma once

#include "cpu/attention_avx512.h"
#include "cpu/attention_scores.h"
#include "cpu/attention_spans.h"
#include "cpu/attention_unpack_avx512.h"

namespace kvkernels {
namespace {

constexpr int kBlockRows = 6, kBlockVectors = 4;
// Rows whose scores become weights together, while the next ones' products wait: half as many waits
// as with kBlockRows (prefill took 1 to 3 % less time on Zen 5).
constexpr int kWeighedRows = 2 * kBlockRows;

// A sum over head_dim is cut into parts of this many lanes, added up at the end: rounding errors
// grow with the length of a sum.
constexpr int64_t kSumLength = 64;

// One float per lane.
template <typename E>
struct WidenedLanes {
  using Weights = FloatWeights<E>;
  using Item = typename E::Item;
  using Unpacker = Avx512Unpacker<E>;
  static constexpr int64_t kNumbers = 1;

  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }

  // Lanes [first, first + 16) of a row of `num_lanes`, a multiple of 16.
  static __m512 load(const Item* row, int64_t first, int64_t) { return E::load(row + first); }

  // Writes the lanes of one value.
  static void pack_values(const Item* value, const Item*, int64_t head_dim, float* target) {
    for (int64_t i = 0; i < head_dim; i += 16) _mm512_store_ps(target + i, E::load(value + i));
  }
};

// scores[m][n] = query row m * key n.
template <typename L, int kRows, int kVectors>
void score_block(const float* query, int64_t num_lanes, const float* keys, float* scores) {
  for (int64_t begin = 0; begin < num_lanes; begin += kSumLength) {
    const int64_t end = begin + kSumLength < num_lanes ? begin + kSumLength : num_lanes;
    __m512 sums[kRows][kVectors];
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[m][n] = _mm512_setzero_ps();
    }
    for (int64_t i = begin; i < end; ++i) {
      __m512 key[kVectors];
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) key[n] = _mm512_load_ps(keys + i * kTileKeys + 16 * n);
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
        const __m512 q = _mm512_set1_ps(query[m * num_lanes + i]);
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sums[m][n] = L::multiply_add(q, key[n], sums[m][n]);
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) {
        float* target = scores + m * kTileKeys + 16 * n;
        if (begin > 0) sums[m][n] = _mm512_add_ps(sums[m][n], _mm512_load_ps(target));
        _mm512_store_ps(target, sums[m][n]);
      }
    }
  }
}

// out[m] = out[m] * decay[m] + sum over keys of weights[m][key] * values[key], for kVectors vectors
// of head_dim; `first` and `last` count lanes. The products need not wait for `out` when they
// begin.
template <typename L, int kRows, int kVectors>
void value_block(const float* weights, int64_t first, int64_t last, const float* values,
                 int64_t head_dim, const float* decay, float* out) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) sums[m][n] = _mm512_setzero_ps();
  }
  for (int64_t t = first; t < last; ++t) {
    __m512 value[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) value[n] = _mm512_load_ps(values + t * head_dim + 16 * n);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const __m512 weight = _mm512_set1_ps(weights[m * kTileKeys + t]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) {
        sums[m][n] = L::multiply_add(weight, value[n], sums[m][n]);
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* const target = out + m * head_dim + 16 * n;
      const __m512 factor = _mm512_set1_ps(decay[m]);
      _mm512_storeu_ps(target, _mm512_fmadd_ps(_mm512_loadu_ps(target), factor, sums[m][n]));
    }
  }
}

template <typename L>
using ScoreBlock = decltype(&score_block<L, 1, 1>);
template <typename L>
using ValueBlock = decltype(&value_block<L, 1, 1>);

#define KVKERNELS_ROW(function, rows) \
  {function<L, rows, 1>, function<L, rows, 2>, function<L, rows, 3>, function<L, rows, 4>}
#define KVKERNELS_TABLE(function)                                                      \
  {KVKERNELS_ROW(function, 1), KVKERNELS_ROW(function, 2), KVKERNELS_ROW(function, 3), \
   KVKERNELS_ROW(function, 4), KVKERNELS_ROW(function, 5), KVKERNELS_ROW(function, 6)}
template <typename L>
constexpr ScoreBlock<L> kScoreBlocks[kBlockRows][kBlockVectors] = KVKERNELS_TABLE(score_block);
template <typename L>
constexpr ValueBlock<L> kValueBlocks[kBlockRows][kBlockVectors] = KVKERNELS_TABLE(value_block);
#undef KVKERNELS_TABLE
#undef KVKERNELS_ROW

// One item's query rows, and the tile of keys that is being worked on.
struct Work {
  const AttentionTile* tile;
  int64_t count, head_dim, value_dim;
  int64_t num_lanes;  // of one query or key
  float scale;
  bool adjusts;     // whether scores need more than a scale
  float* query;     // [count, num_lanes]
  float* keys;      // [num_lanes, kTileKeys]
  float* values;    // [kTileKeys / kNumbers, value_dim]
  float* scores;    // [count, kTileKeys]; then weights, [count, kTileKeys / kNumbers]
  float* sum;       // [count, 16]
  float* unpacked;  // [kTileKeys, the larger dim]
  float* scales;    // two rows: scales and minimums being unpacked
  // Prefetches what the item reads. With few rows `while_packing` is used: it asks while keys are
  // packed. With more, `while_multiplying`: it asks a whole tile ahead, between the products. The
  // other one has nothing to ask for.
  Prefetch while_packing{Prefetch::kLead, kPrefetchesToL1}, while_multiplying;
  KeyRange seen[kMaxRows];
  float decay[kMaxRows];
};

template <typename L>
void start_rows(const AttentionTile& tile, const TileResult& result, Work& work) {
  work.tile = &tile;
  work.count = tile.row_end - tile.row_begin;
  work.head_dim = tile.args->head_dim;
  work.value_dim = tile.args->value_dim;
  work.num_lanes = work.head_dim / L::kNumbers;
  work.adjusts = adjusts_scores(*tile.args);
  work.scale = work.adjusts ? 1.0f : tile.args->sm_scale * kLog2E;
  const int64_t wide_dim = std::max(work.head_dim, work.value_dim);
  work.query =
      thread_scratch(1, kMaxRows * (work.head_dim + kTileKeys + 16) +
                            kTileKeys * (work.head_dim + work.value_dim + wide_dim) + 2 * wide_dim);
  work.keys = work.query + kMaxRows * work.head_dim;
  work.values = work.keys + kTileKeys * work.head_dim;
  work.unpacked = work.values + kTileKeys * work.value_dim;
  work.scores = work.unpacked + kTileKeys * wide_dim;
  work.sum = work.scores + kMaxRows * kTileKeys;
  work.scales = work.sum + kMaxRows * 16;
  for (int64_t r = 0; r < work.count; ++r) {
    const auto* query = read_query<typename L::Item>(tile, tile.row_begin + r);
    for (int64_t i = 0; i < work.num_lanes; i += 16) {
      _mm512_mask_storeu_ps(work.query + r * work.num_lanes + i, first_lanes(work.num_lanes - i),
                            L::load(query, i, work.num_lanes));
    }
    for (int64_t i = 0; i < work.value_dim; i += 16) {
      _mm512_storeu_ps(result.out + r * work.value_dim + i, _mm512_setzero_ps());
    }
    _mm512_store_ps(work.sum + 16 * r, _mm512_setzero_ps());
    result.max[r] = -kInfinity;
    work.seen[r] = visible_keys(tile, tile.row_begin + r);
  }
}

template <typename L>
void pack_keys(const typename L::Item* keys, int64_t* offsets, int64_t num_keys, Work& work) {
  // In a last group of fewer than 16 keys the remaining columns repeat the last key; no row sees
  // them.
  for (int64_t t = num_keys; t % 16 != 0; ++t) offsets[t] = offsets[num_keys - 1];
  for (int64_t first = 0; first < num_keys; first += 16) {
    for (int64_t i = 0; i < work.num_lanes; i += 16) {
      __m512 rows[16];
#pragma GCC unroll 16
      for (int t = 0; t < 16; ++t) rows[t] = L::load(keys + offsets[first + t], i, work.num_lanes);
      transpose_16x16(rows);
      const int64_t num_columns = work.num_lanes - i;
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        if (j < num_columns) _mm512_store_ps(work.keys + (i + j) * kTileKeys + first, rows[j]);
      }
      work.while_packing.advance(16 * 64);
    }
  }
}

// Packs the values of the keys [first, num_keys). One that shares its lanes with a key outside is
// alone in them, for a weight of 0 times an infinite value would be NaN.
template <typename L>
void pack_values(const typename L::Item* values, const int64_t* offsets, int64_t first,
                 int64_t num_keys, Work& work) {
  for (int64_t t = first / L::kNumbers * L::kNumbers; t < num_keys; t += L::kNumbers) {
    const auto* one = t >= first ? values + offsets[t] : nullptr;
    const auto* second = t + 1 < num_keys ? values + offsets[t + 1] : nullptr;
    L::pack_values(one, second, work.value_dim, work.values + t / L::kNumbers * work.value_dim);
    work.while_packing.advance(L::kNumbers * work.value_dim * sizeof(typename L::Item));
  }
}

// Packs the keys (transposed) and the values of the tile of keys [begin, end), as far as they
// belong to the item.
template <typename L>
void load_tile(const AttentionTile& tile, int64_t begin, int64_t end, Work& work) {
  using Item = typename L::Item;
  int64_t key_offsets[kTileKeys], value_offsets[kTileKeys];
  const int64_t count = end - begin, first = std::max<int64_t>(tile.key_begin - begin, 0);
  const bool is_plain = lies_plain(tile, begin + first, end);
  if (is_plain) {
    find_rows(tile, begin + first, end, key_offsets + first, value_offsets + first);
  } else {
    for (int64_t t = first; t < count; ++t) {
      key_offsets[t] = t * work.head_dim;
      value_offsets[t] = t * work.value_dim;
    }
  }
  repeat_first_row(key_offsets, first);
  if (is_plain) {
    pack_keys<L>(static_cast<const Item*>(tile.args->key_cache), key_offsets, count, work);
    pack_values<L>(static_cast<const Item*>(tile.args->value_cache), value_offsets, first, count,
                   work);
    return;
  }
  auto* rows = reinterpret_cast<Item*>(work.unpacked);
  unpack_keys<typename L::Unpacker>(tile, 0, begin + first, end, work.scales,
                                    rows + first * work.head_dim);
  pack_keys<L>(rows, key_offsets, count, work);
  unpack_values<typename L::Unpacker>(tile, 0, begin + first, end, work.scales,
                                      rows + first * work.value_dim);
  pack_values<L>(rows, value_offsets, first, count, work);
}

// Turns the scores of up to kWeighedRows rows into weights.
template <typename L>
void score_rows(Work& work, int64_t row, int64_t count, int64_t begin, int64_t end,
                const TileResult& result) {
  for (int64_t first = row; first < row + count; first += kBlockRows) {
    const int64_t num_rows = std::min<int64_t>(row + count - first, kBlockRows);
    const KeyRange columns = seen_columns(work.seen + first, num_rows, begin, end);
    float* scores = work.scores + first * kTileKeys;
    kScoreBlocks<L>[num_rows - 1][(columns.end - 1) / 16](work.query + first* work.num_lanes,
                                                          work.num_lanes, work.keys, scores);
    for (int64_t r = 0; work.adjusts && r < num_rows; ++r) {
      adjust_scores(*work.tile, work.tile->row_begin + first + r, 0, begin, columns.end,
                    scores + r * kTileKeys);
    }
  }
  KeyRange own[kWeighedRows];
  for (int64_t r = 0; r < count; ++r) own[r] = seen_columns(work.seen + row + r, 1, begin, end);
  const KeyRange columns = seen_columns(work.seen + row, count, begin, end);
  softmax_rows<typename L::Weights>(work.scores + row * kTileKeys, columns.end, own, count,
                                    work.scale, result.max + row, work.sum + 16 * row,
                                    work.decay + row);
}

template <typename L>
void add_values(const Work& work, int64_t row, int64_t count, int64_t begin, int64_t end,
                const TileResult& result) {
  const KeyRange columns = seen_columns(work.seen + row, count, begin, end);
  const int64_t num_vectors = work.value_dim / 16;
  const int64_t num_panels = (num_vectors + kBlockVectors - 1) / kBlockVectors;
  for (int64_t panel = 0, i = 0; panel < num_panels; ++panel) {
    const int64_t width = (num_vectors - i) / (num_panels - panel);
    kValueBlocks<L>[count - 1][width - 1](work.scores + row* kTileKeys, columns.begin / L::kNumbers,
                                          (columns.end + L::kNumbers - 1) / L::kNumbers,
                                          work.values + 16 * i, work.value_dim, work.decay + row,
                                          result.out + row* work.value_dim + 16 * i);
    i += width;
  }
}

inline int64_t num_blocks(int64_t num_rows) { return (num_rows + kBlockRows - 1) / kBlockRows; }

template <typename L>
void attend_many_rows(const AttentionTile& tile, const TileResult& result) {
  Work work;
  start_rows<L>(tile, result, work);
  Prefetch& next = work.count <= kFewRows ? work.while_packing : work.while_multiplying;
  const int64_t tile_bytes = plan_reading(tile, kTileKeys, next);
  work.while_multiplying.set_lead(tile_bytes);
  const int64_t first = tile.key_begin / kTileKeys * kTileKeys;
  for (int64_t begin = first, end; begin < tile.key_end; begin = end) {
    end = key_tile_end(tile, begin, kTileKeys);
    const auto [row_begin, row_end] = rows_that_see(work.seen, work.count, begin, end);
    if (row_begin == row_end) continue;
    next.begin(tile_bytes);
    load_tile<L>(tile, begin, end, work);
    const int64_t next_bytes = share_of_bytes(tile_bytes, 2 * num_blocks(row_end - row_begin));
    for (int64_t row = row_begin; row < row_end; row += kWeighedRows) {
      const int64_t count = std::min<int64_t>(row_end - row, kWeighedRows);
      score_rows<L>(work, row, count, begin, end, result);
      work.while_multiplying.advance(num_blocks(count) * next_bytes);
    }
    for (int64_t row = row_begin; row < row_end; row += kBlockRows) {
      const int64_t count = row_end - row < kBlockRows ? row_end - row : kBlockRows;
      add_values<L>(work, row, count, begin, end, result);
      work.while_multiplying.advance(next_bytes);
    }
  }
  for (int64_t r = 0; r < work.count; ++r) {
    result.sum[r] = _mm512_reduce_add_ps(_mm512_load_ps(work.sum + 16 * r));
  }
}

}  // namespace
}  // namespace kvkernels
