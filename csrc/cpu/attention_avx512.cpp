// Prefill and extend: a tile of query rows against a run of keys, at the speed of multiplication.
//
// 64 keys at a time are widened to floats once for all rows, keys transposed. Then both products
// are plain matrix products of register blocks, kBlockRows rows by 4 vectors: 24 sums, 4 vectors of
// the packed tile and one broadcast number fill 29 of the 32 registers, and each load feeds several
// multiplications.
#include "cpu/attention_avx512.h"

namespace kvkernels {
namespace {

constexpr int kBlockRows = 6, kBlockVectors = 4;

// Sums over head_dim are begun anew after this many products and added up at the end: rounding
// errors grow with the length of a sum.
constexpr int64_t kSumLength = 64;

// scores[m][n] = query row m * key n
template <int kRows, int kVectors>
void score_block(const float* query, int64_t head_dim, const float* keys, float* scores) {
  for (int64_t begin = 0; begin < head_dim; begin += kSumLength) {
    const int64_t end = begin + kSumLength < head_dim ? begin + kSumLength : head_dim;
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
        const __m512 q = _mm512_set1_ps(query[m * head_dim + i]);
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sums[m][n] = _mm512_fmadd_ps(q, key[n], sums[m][n]);
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
// of head_dim
template <int kRows, int kVectors>
void value_block(const float* weights, int64_t first, int64_t last, const float* values,
                 int64_t head_dim, const float* decay, float* out) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      sums[m][n] =
          _mm512_mul_ps(_mm512_set1_ps(decay[m]), _mm512_loadu_ps(out + m * head_dim + 16 * n));
    }
  }
  for (int64_t t = first; t < last; ++t) {
    __m512 value[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) value[n] = _mm512_load_ps(values + t * head_dim + 16 * n);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const __m512 weight = _mm512_set1_ps(weights[m * kTileKeys + t]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[m][n] = _mm512_fmadd_ps(weight, value[n], sums[m][n]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      _mm512_storeu_ps(out + m * head_dim + 16 * n, sums[m][n]);
    }
  }
}

using ScoreBlock = decltype(&score_block<1, 1>);
using ValueBlock = decltype(&value_block<1, 1>);

#define KVKERNELS_ROW(function, rows) \
  {function<rows, 1>, function<rows, 2>, function<rows, 3>, function<rows, 4>}
#define KVKERNELS_TABLE(function)                                                      \
  {KVKERNELS_ROW(function, 1), KVKERNELS_ROW(function, 2), KVKERNELS_ROW(function, 3), \
   KVKERNELS_ROW(function, 4), KVKERNELS_ROW(function, 5), KVKERNELS_ROW(function, 6)}
constexpr ScoreBlock kScoreBlocks[kBlockRows][kBlockVectors] = KVKERNELS_TABLE(score_block);
constexpr ValueBlock kValueBlocks[kBlockRows][kBlockVectors] = KVKERNELS_TABLE(value_block);
#undef KVKERNELS_TABLE
#undef KVKERNELS_ROW

// One item's rows, and the tile of keys that is being worked on.
struct Work {
  int64_t count, head_dim;
  float scale;
  float* query;   // [count, head_dim]
  float* keys;    // [head_dim, kTileKeys]
  float* values;  // [kTileKeys, head_dim]
  float* scores;  // [count, kTileKeys]
  float* sum;     // [count, 16]
  KeyRange seen[kMaxRows];
  float decay[kMaxRows];
};

template <typename E>
void start_rows(const AttentionTile& tile, const TileResult& result, Work& work) {
  work.count = tile.row_end - tile.row_begin;
  work.head_dim = tile.args->head_dim;
  work.scale = tile.args->sm_scale * kLog2E;
  work.query = thread_scratch(
      1, kMaxRows * (work.head_dim + kTileKeys + 16) + 2 * kTileKeys * work.head_dim);
  work.keys = work.query + kMaxRows * work.head_dim;
  work.values = work.keys + kTileKeys * work.head_dim;
  work.scores = work.values + kTileKeys * work.head_dim;
  work.sum = work.scores + kMaxRows * kTileKeys;
  for (int64_t r = 0; r < work.count; ++r) {
    const auto* query = static_cast<const typename E::Item*>(tile.args->query) +
                        query_offset(tile, tile.row_begin + r);
    for (int64_t i = 0; i < work.head_dim; i += 16) {
      _mm512_store_ps(work.query + r * work.head_dim + i, E::load(query + i));
      _mm512_storeu_ps(result.out + r * work.head_dim + i, _mm512_setzero_ps());
    }
    _mm512_store_ps(work.sum + 16 * r, _mm512_setzero_ps());
    result.max[r] = -infinity();
    work.seen[r] = visible_keys(tile, tile.row_begin + r);
  }
}

// Widens the keys, transposed, and the values of [begin, end).
template <typename E>
void load_tile(const AttentionTile& tile, int64_t begin, int64_t end, const Work& work) {
  int64_t key_offsets[kTileKeys], value_offsets[kTileKeys];
  find_rows(tile, begin, end, key_offsets, value_offsets);
  const auto* key_cache = static_cast<const typename E::Item*>(tile.args->key_cache);
  const auto* value_cache = static_cast<const typename E::Item*>(tile.args->value_cache);
  const int64_t num_keys = end - begin;
  // The last 16 keys may be fewer: the rest of their columns repeat the last key, and no row sees
  // them.
  for (int64_t t = num_keys; t % 16 != 0; ++t) key_offsets[t] = key_offsets[num_keys - 1];
  for (int64_t first = 0; first < num_keys; first += 16) {
    for (int64_t i = 0; i < work.head_dim; i += 16) {
      __m512 rows[16];
#pragma GCC unroll 16
      for (int t = 0; t < 16; ++t) rows[t] = E::load(key_cache + key_offsets[first + t] + i);
      transpose_16x16(rows);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        _mm512_store_ps(work.keys + (i + j) * kTileKeys + first, rows[j]);
      }
    }
  }
  for (int64_t t = 0; t < num_keys; ++t) {
    for (int64_t i = 0; i < work.head_dim; i += 16) {
      _mm512_store_ps(work.values + t * work.head_dim + i,
                      E::load(value_cache + value_offsets[t] + i));
    }
  }
}

// The columns of the tile of keys [begin, end) that some row of [row, row + count) sees. Ranges
// only move up from row to row, so the first and the last row bound them.
KeyRange block_columns(const Work& work, int64_t row, int64_t count, int64_t begin, int64_t end) {
  const int64_t first = work.seen[row].begin, last = work.seen[row + count - 1].end;
  return {first > begin ? first - begin : 0, (last < end ? last : end) - begin};
}

void score_rows(Work& work, int64_t row, int64_t count, int64_t begin, int64_t end,
                const TileResult& result) {
  const KeyRange columns = block_columns(work, row, count, begin, end);
  float* scores = work.scores + row * kTileKeys;
  kScoreBlocks[count - 1][(columns.end - 1) / 16](work.query + row * work.head_dim, work.head_dim,
                                                  work.keys, scores);
  for (int64_t r = row; r < row + count; ++r) {
    const KeyRange own = block_columns(work, r, 1, begin, end);
    work.decay[r] = softmax_step(work.scores + r * kTileKeys, columns.end, own.begin, own.end,
                                 work.scale, result.max + r, work.sum + 16 * r);
  }
}

void add_values(const Work& work, int64_t row, int64_t count, int64_t begin, int64_t end,
                const TileResult& result) {
  const KeyRange columns = block_columns(work, row, count, begin, end);
  const int64_t num_vectors = work.head_dim / 16;
  const int64_t num_panels = (num_vectors + kBlockVectors - 1) / kBlockVectors;
  for (int64_t panel = 0, i = 0; panel < num_panels; ++panel) {
    const int64_t width = (num_vectors - i) / (num_panels - panel);
    kValueBlocks[count - 1][width - 1](work.scores + row * kTileKeys, columns.begin, columns.end,
                                       work.values + 16 * i, work.head_dim, work.decay + row,
                                       result.out + row * work.head_dim + 16 * i);
    i += width;
  }
}

template <typename E>
void attend_many_rows(const AttentionTile& tile, const TileResult& result) {
  Work work;
  start_rows<E>(tile, result, work);
  for (int64_t begin = tile.key_begin, end; begin < tile.key_end; begin = end) {
    end = key_tile_end(tile, begin);
    // Rows before row_begin end, and rows from row_end on begin, outside these keys.
    int64_t row_begin = 0, row_end = work.count;
    while (row_begin < row_end && work.seen[row_begin].end <= begin) ++row_begin;
    while (row_end > row_begin && work.seen[row_end - 1].begin >= end) --row_end;
    if (row_begin == row_end) continue;
    load_tile<E>(tile, begin, end, work);
    for (int64_t row = row_begin; row < row_end; row += kBlockRows) {
      const int64_t count = row_end - row < kBlockRows ? row_end - row : kBlockRows;
      score_rows(work, row, count, begin, end, result);
    }
    for (int64_t row = row_begin; row < row_end; row += kBlockRows) {
      const int64_t count = row_end - row < kBlockRows ? row_end - row : kBlockRows;
      add_values(work, row, count, begin, end, result);
    }
  }
  for (int64_t r = 0; r < work.count; ++r) {
    result.sum[r] = _mm512_reduce_add_ps(_mm512_load_ps(work.sum + 16 * r));
  }
}

template <typename E, DType kDType>
void attend(const AttentionTile& tile, const TileResult& result) {
  if (tile.row_end - tile.row_begin <= kFewRows) {
    few_rows_avx512(kDType)(tile, result);
  } else {
    attend_many_rows<E>(tile, result);
  }
}

template <typename E>
void narrow(const float* in, float scale, void* out, int64_t size) {
  const __m512 scales = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = first_lanes(size - i);
    E::store(static_cast<typename E::Item*>(out) + i,
             _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, in + i), scales), mask);
  }
}

template <typename E>
void widen(const void* in, float* out, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = first_lanes(size - i);
    _mm512_mask_storeu_ps(out + i, mask,
                          E::masked_load(static_cast<const typename E::Item*>(in) + i, mask));
  }
}

template <typename E, DType kDType>
constexpr AttentionKernel kKernel = {kMaxRows, attend<E, kDType>, narrow<E>, widen<E>};

}  // namespace

const AttentionKernel* avx512_kernel(DType dtype, int64_t head_dim) {
  if (head_dim == 0 || head_dim % 16 != 0) return nullptr;
  switch (dtype) {
    case DType::kFloat32:
      return &kKernel<Float32, DType::kFloat32>;
    case DType::kFloat16:
      return &kKernel<Float16, DType::kFloat16>;
    case DType::kBFloat16:
      break;
  }
  return &kKernel<BFloat16, DType::kBFloat16>;
}

}  // namespace kvkernels
