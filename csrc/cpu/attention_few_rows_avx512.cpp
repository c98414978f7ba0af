// Decode: few query rows against a long run of keys, at the speed of memory.
//
// Every key and value is read once, widened in registers and used for up to four rows at a time.
// Dot products run along head_dim, so a key is a plain row: 16 sums (rows x keys) are kept apart in
// 16 registers and then added across lanes together.
#include "cpu/attention_avx512.h"

namespace kvkernels {
namespace {

constexpr int kBatch = 4;  // rows that share the widened keys in registers

// Where some rows of one of the caches start.
template <typename E>
struct CacheRows {
  const typename E::Item* cache;
  int64_t offsets[kTileKeys];

  const typename E::Item* row(int64_t token) const { return cache + offsets[token]; }

  // The lines that hold `count` items. Hardware prefetch stops at the end of each 4 KiB page, and
  // cannot guess the next block.
  void prefetch(int64_t token, int64_t first, int64_t count) const {
    const char* p = reinterpret_cast<const char*>(row(token) + first);
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(*cache)); i += 64) {
      _mm_prefetch(p + i, _MM_HINT_T0);
    }
  }
};

// scores[r][t] = query row r * key t, for t < num_keys rounded up to 16. Asks for the values that
// are needed next.
template <typename E, int kRows>
void score_keys(const float* query, int64_t head_dim, const CacheRows<E>& keys,
                const CacheRows<E>& values, int64_t num_keys, float* scores) {
  constexpr int kTokens = kRows == 1 ? 16 : kRows == 2 ? 8 : 4;
  for (int64_t first = 0; first < num_keys; first += kTokens) {
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) {
      __m512 q[2 * kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        q[2 * r] = _mm512_load_ps(query + r * head_dim + i);
        q[2 * r + 1] = _mm512_load_ps(query + r * head_dim + i + 16);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        __m512 a, b;
        E::load_pair(keys.row(first + t) + i, a, b);
        values.prefetch(first + t, i, 32);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[r * kTokens + t] = _mm512_fmadd_ps(q[2 * r], a, sums[r * kTokens + t]);
          sums[r * kTokens + t] = _mm512_fmadd_ps(q[2 * r + 1], b, sums[r * kTokens + t]);
        }
      }
    }
    if (i < head_dim) {
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const __m512 a = E::load(keys.row(first + t) + i);
        values.prefetch(first + t, i, 16);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512 q = _mm512_load_ps(query + r * head_dim + i);
          sums[r * kTokens + t] = _mm512_fmadd_ps(q, a, sums[r * kTokens + t]);
        }
      }
    }
    const __m512 total = sum_lanes_of_16(sums);
    if constexpr (kRows == 1) {
      _mm512_storeu_ps(scores + first, total);
    } else if constexpr (kRows == 2) {
      _mm256_storeu_ps(scores + first, _mm512_castps512_ps256(total));
      _mm256_storeu_ps(scores + kTileKeys + first, _mm512_extractf32x8_ps(total, 1));
    } else {
      _mm_storeu_ps(scores + first, _mm512_castps512_ps128(total));
      _mm_storeu_ps(scores + kTileKeys + first, _mm512_extractf32x4_ps(total, 1));
      _mm_storeu_ps(scores + 2 * kTileKeys + first, _mm512_extractf32x4_ps(total, 2));
      if (kRows == 4) {
        _mm_storeu_ps(scores + 3 * kTileKeys + first, _mm512_extractf32x4_ps(total, 3));
      }
    }
  }
}

// out[r] = out[r] * decay[r] + sum over t of weights[r][t] * value t, for 16 * kVectors items of
// head_dim from `first`. Asks for the keys that are needed next.
template <typename E, int kRows, int kVectors>
void add_value_panel(const float* weights, const float* decay, const CacheRows<E>& values,
                     const CacheRows<E>& next_keys, int64_t num_keys, int64_t head_dim,
                     int64_t first, float* out) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums[r][i] = _mm512_mul_ps(_mm512_set1_ps(decay[r]),
                                 _mm512_load_ps(out + r * head_dim + first + 16 * i));
    }
  }
  for (int64_t t = 0; t < num_keys; ++t) {
    __m512 v[kVectors];
    if constexpr (kVectors == 1) {
      v[0] = E::load(values.row(t) + first);
    } else {
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; i += 2) {
        E::load_pair(values.row(t) + first + 16 * i, v[i], v[i + 1]);
      }
    }
    next_keys.prefetch(t, first, 16 * kVectors);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[r * kTileKeys + t]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sums[r][i] = _mm512_fmadd_ps(weight, v[i], sums[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      _mm512_store_ps(out + r * head_dim + first + 16 * i, sums[r][i]);
    }
  }
}

template <typename E, int kRows>
void add_values(const float* weights, const float* decay, const CacheRows<E>& values,
                const CacheRows<E>& next_keys, int64_t num_keys, int64_t head_dim, float* out) {
  int64_t i = 0;
  for (; i + 64 <= head_dim; i += 64) {
    add_value_panel<E, kRows, 4>(weights, decay, values, next_keys, num_keys, head_dim, i, out);
  }
  if (i + 32 <= head_dim) {
    add_value_panel<E, kRows, 2>(weights, decay, values, next_keys, num_keys, head_dim, i, out);
    i += 32;
  }
  if (i < head_dim) {
    add_value_panel<E, kRows, 1>(weights, decay, values, next_keys, num_keys, head_dim, i, out);
  }
}

template <typename E>
struct RowKernels {
  decltype(&score_keys<E, 1>) score;
  decltype(&add_values<E, 1>) add;
};

template <typename E>
constexpr RowKernels<E> kRowKernels[kBatch + 1] = {{nullptr, nullptr},
                                                   {score_keys<E, 1>, add_values<E, 1>},
                                                   {score_keys<E, 2>, add_values<E, 2>},
                                                   {score_keys<E, 3>, add_values<E, 3>},
                                                   {score_keys<E, 4>, add_values<E, 4>}};

// Finds the keys and values of [begin, end). The rest of the offsets repeat the last row, so that
// loops over a fixed number of rows read nothing that is not part of the sequence.
template <typename E>
void find_tile(const AttentionTile& tile, int64_t begin, int64_t end, CacheRows<E>& keys,
               CacheRows<E>& values) {
  find_rows(tile, begin, end, keys.offsets, values.offsets);
  for (int64_t token = end - begin; token < kTileKeys; ++token) {
    keys.offsets[token] = keys.offsets[end - begin - 1];
    values.offsets[token] = values.offsets[end - begin - 1];
  }
}

// One item's rows and what was summed up for them so far.
struct Rows {
  int64_t count, head_dim;
  float* query;   // [count, head_dim], in the order of load_pair, like out
  float* out;     // [count, head_dim]
  float* sum;     // [count, 16]
  float* scores;  // [count, kTileKeys]
  float max[kFewRows], decay[kFewRows];
  KeyRange seen[kFewRows];
};

template <typename E>
void start_rows(const AttentionTile& tile, Rows& rows) {
  rows.count = tile.row_end - tile.row_begin;
  rows.head_dim = tile.args->head_dim;
  float* scratch = thread_scratch(1, kFewRows * (2 * rows.head_dim + 16 + kTileKeys));
  rows.query = scratch;
  rows.out = rows.query + kFewRows * rows.head_dim;
  rows.sum = rows.out + kFewRows * rows.head_dim;
  rows.scores = rows.sum + kFewRows * 16;
  for (int64_t r = 0; r < rows.count; ++r) {
    const auto* query = static_cast<const typename E::Item*>(tile.args->query) +
                        query_offset(tile, tile.row_begin + r);
    float* target = rows.query + r * rows.head_dim;
    int64_t i = 0;
    for (; i + 32 <= rows.head_dim; i += 32) {
      __m512 a, b;
      E::load_pair(query + i, a, b);
      _mm512_store_ps(target + i, a);
      _mm512_store_ps(target + i + 16, b);
    }
    if (i < rows.head_dim) _mm512_store_ps(target + i, E::load(query + i));
    for (i = 0; i < rows.head_dim; i += 16) {
      _mm512_store_ps(rows.out + r * rows.head_dim + i, _mm512_setzero_ps());
    }
    _mm512_store_ps(rows.sum + 16 * r, _mm512_setzero_ps());
    rows.max[r] = -infinity();
    rows.seen[r] = visible_keys(tile, tile.row_begin + r);
  }
}

template <typename E>
void finish_rows(const Rows& rows, const TileResult& result) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const float* out = rows.out + r * rows.head_dim;
    float* target = result.out + r * rows.head_dim;
    int64_t i = 0;
    for (; i + 32 <= rows.head_dim; i += 32) {
      __m512 a = _mm512_load_ps(out + i), b = _mm512_load_ps(out + i + 16);
      E::restore(a, b);
      _mm512_storeu_ps(target + i, a);
      _mm512_storeu_ps(target + i + 16, b);
    }
    if (i < rows.head_dim) _mm512_storeu_ps(target + i, _mm512_load_ps(out + i));
    result.max[r] = rows.max[r];
    result.sum[r] = _mm512_reduce_add_ps(_mm512_load_ps(rows.sum + 16 * r));
  }
}

template <typename E>
void attend(const AttentionTile& tile, const TileResult& result) {
  Rows rows;
  start_rows<E>(tile, rows);
  const int64_t num_batches = (rows.count + kBatch - 1) / kBatch;
  const float scale = tile.args->sm_scale * kLog2E;
  const auto* key_cache = static_cast<const typename E::Item*>(tile.args->key_cache);
  const auto* value_cache = static_cast<const typename E::Item*>(tile.args->value_cache);
  CacheRows<E> keys[2] = {{key_cache, {}}, {key_cache, {}}};
  CacheRows<E> values[2] = {{value_cache, {}}, {value_cache, {}}};
  int now = 0;
  int64_t begin = tile.key_begin, end = key_tile_end(tile, begin);
  find_tile(tile, begin, end, keys[now], values[now]);
  while (begin < end) {
    const int64_t num_keys = end - begin;
    for (int64_t b = 0, r = 0; b < num_batches; ++b) {
      const int64_t count = (rows.count - r) / (num_batches - b);
      kRowKernels<E>[count].score(rows.query + r * rows.head_dim, rows.head_dim, keys[now],
                                  values[now], num_keys, rows.scores + r * kTileKeys);
      r += count;
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t first = rows.seen[r].begin > begin ? rows.seen[r].begin - begin : 0;
      const int64_t last = rows.seen[r].end < end ? rows.seen[r].end - begin : num_keys;
      rows.decay[r] = softmax_step(rows.scores + r * kTileKeys, num_keys, first, last, scale,
                                   &rows.max[r], rows.sum + 16 * r);
    }
    const int64_t next_end = end < tile.key_end ? key_tile_end(tile, end) : end;
    if (end < next_end) find_tile(tile, end, next_end, keys[1 - now], values[1 - now]);
    const CacheRows<E>& next_keys = keys[end < next_end ? 1 - now : now];
    for (int64_t b = 0, r = 0; b < num_batches; ++b) {
      const int64_t count = (rows.count - r) / (num_batches - b);
      kRowKernels<E>[count].add(rows.scores + r * kTileKeys, rows.decay + r, values[now], next_keys,
                                num_keys, rows.head_dim, rows.out + r * rows.head_dim);
      r += count;
    }
    begin = end;
    end = next_end;
    now = 1 - now;
  }
  finish_rows<E>(rows, result);
}

}  // namespace

AttendFunction few_rows_avx512(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return attend<Float32>;
    case DType::kFloat16:
      return attend<Float16>;
    case DType::kBFloat16:
      break;
  }
  return attend<BFloat16>;
}

}  // namespace kvkernels
