// Decode: few query rows against a long run of keys, at the speed of memory.
//
// Every key and value is read once and used for up to four rows at a time. Dot products run along
// head_dim, so a key is a plain row: 16 sums (rows x keys) are kept apart in 16 registers and then
// added across lanes together. The arithmetic is a parameter: WidenedRows below, or PairRows of
// attention_avx512_bf16.cpp.
#pragma once

#include "cpu/attention_avx512.h"

namespace kvkernels {
namespace {

constexpr int kBatch = 4;  // rows that share a key's registers

// Where some rows of one of the caches start, for one head.
template <typename Item>
struct CacheRows {
  const Item* cache;
  const int64_t* offsets;

  const Item* row(int64_t token) const { return cache + offsets[token]; }
  CacheRows of_head(int64_t head, int64_t stride) const { return {cache + head * stride, offsets}; }
};

// Asks for rows before they are read, line after line in the order of memory: hardware prefetch
// stops at the end of each 4 KiB page and cannot guess the next block, but it follows where these
// requests lead.
template <typename Item>
class Prefetch {
 public:
  Prefetch(CacheRows<Item> rows, int64_t num_rows, int64_t head_dim)
      : rows_(rows),
        num_rows_(num_rows),
        row_bytes_(head_dim * static_cast<int64_t>(sizeof(Item))) {}

  // The next `num_bytes` of the rows.
  void advance(int64_t num_bytes) {
    for (; num_bytes > 0 && row_ < num_rows_; num_bytes -= 64) {
      _mm_prefetch(reinterpret_cast<const char*>(rows_.row(row_)) + offset_, _MM_HINT_T0);
      offset_ += 64;
      if (offset_ >= row_bytes_) {
        offset_ = 0;
        ++row_;
      }
    }
  }

 private:
  CacheRows<Item> rows_;
  int64_t num_rows_, row_bytes_, row_ = 0, offset_ = 0;
};

// Adds up to 16 sums across lanes, of kRows rows by 16, 8, 4 or 4 keys for 1, 2, 3 or 4 rows, and
// stores the scores of the keys from `first` on.
template <int kRows>
inline void store_scores(const __m512* sums, int64_t first, float* scores) {
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

// scores[r][t] = query row r * key t, for t < num_keys rounded up to 16. Asks for as much of `next`
// as it reads.
template <typename E, int kRows>
void score_keys(const float* query, int64_t head_dim, const CacheRows<typename E::Item>& keys,
                Prefetch<typename E::Item>& next, int64_t num_keys, float* scores) {
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
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512 q = _mm512_load_ps(query + r * head_dim + i);
          sums[r * kTokens + t] = _mm512_fmadd_ps(q, a, sums[r * kTokens + t]);
        }
      }
    }
    store_scores<kRows>(sums, first, scores);
    next.advance(kTokens * head_dim * static_cast<int64_t>(sizeof(typename E::Item)));
  }
}

// out[r] = out[r] * decay[r] + sum over t of weights[r][t] * value t, for 16 * kVectors items of
// head_dim from `first`. Asks for as much of `next` as it reads.
template <typename E, int kRows, int kVectors>
void add_value_panel(const float* weights, const float* decay,
                     const CacheRows<typename E::Item>& values, Prefetch<typename E::Item>& next,
                     int64_t num_keys, int64_t head_dim, int64_t first, float* out) {
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
    next.advance(16 * kVectors * static_cast<int64_t>(sizeof(typename E::Item)));
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
void add_values(float* weights, const float* decay, const CacheRows<typename E::Item>& values,
                Prefetch<typename E::Item>& next, int64_t num_keys, int64_t head_dim, float* out) {
  int64_t i = 0;
  for (; i + 64 <= head_dim; i += 64) {
    add_value_panel<E, kRows, 4>(weights, decay, values, next, num_keys, head_dim, i, out);
  }
  if (i + 32 <= head_dim) {
    add_value_panel<E, kRows, 2>(weights, decay, values, next, num_keys, head_dim, i, out);
    i += 32;
  }
  if (i < head_dim) {
    add_value_panel<E, kRows, 1>(weights, decay, values, next, num_keys, head_dim, i, out);
  }
}

// The two steps for a number of rows. The second may overwrite the weights.
template <typename Item>
struct RowKernels {
  void (*score)(const float* query, int64_t head_dim, const CacheRows<Item>& keys,
                Prefetch<Item>& next, int64_t num_keys, float* scores);
  void (*add)(float* weights, const float* decay, const CacheRows<Item>& values,
              Prefetch<Item>& next, int64_t num_keys, int64_t head_dim, float* out);
};

// Every element is widened to a float in a register. Query and output lie in the order of
// load_pair.
template <typename E>
struct WidenedRows {
  using Item = typename E::Item;

  static constexpr RowKernels<Item> kKernels[kBatch + 1] = {{nullptr, nullptr},
                                                            {score_keys<E, 1>, add_values<E, 1>},
                                                            {score_keys<E, 2>, add_values<E, 2>},
                                                            {score_keys<E, 3>, add_values<E, 3>},
                                                            {score_keys<E, 4>, add_values<E, 4>}};

  static void start_row(const Item* query, float* target, int64_t head_dim) {
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) {
      __m512 a, b;
      E::load_pair(query + i, a, b);
      _mm512_store_ps(target + i, a);
      _mm512_store_ps(target + i + 16, b);
    }
    if (i < head_dim) _mm512_store_ps(target + i, E::load(query + i));
  }

  static void finish_row(const float* out, float* target, int64_t head_dim) {
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) {
      __m512 a = _mm512_load_ps(out + i), b = _mm512_load_ps(out + i + 16);
      E::restore(a, b);
      _mm512_storeu_ps(target + i, a);
      _mm512_storeu_ps(target + i + 16, b);
    }
    if (i < head_dim) _mm512_storeu_ps(target + i, _mm512_load_ps(out + i));
  }
};

// Where the keys and values of one tile of keys start, for the first head.
struct Offsets {
  int64_t begin, end;  // of the sequence; no keys where they are equal
  int64_t keys[kTileKeys], values[kTileKeys];
};

// Finds the keys and values from `begin` on. The rest of the offsets repeat the last row, so that
// loops over a fixed number of rows read nothing that is not part of the sequence.
void find_tile(const AttentionTile& tile, int64_t begin, Offsets& offsets) {
  offsets.begin = begin;
  offsets.end = begin < tile.key_end ? key_tile_end(tile, begin) : begin;
  const int64_t num_keys = offsets.end - begin;
  if (num_keys == 0) return;
  find_rows(tile, begin, offsets.end, offsets.keys, offsets.values);
  for (int64_t token = num_keys; token < kTileKeys; ++token) {
    offsets.keys[token] = offsets.keys[num_keys - 1];
    offsets.values[token] = offsets.values[num_keys - 1];
  }
}

// One head's rows and what was summed up for them so far.
struct Rows {
  int64_t count, head_dim;
  float* query;   // [count, head_dim], in an order of the arithmetic's own, like out
  float* out;     // [count, head_dim]
  float* sum;     // [count, 16]
  float* scores;  // [count, kTileKeys]
  float max[kFewRows], decay[kFewRows];
};

int64_t scratch_size(int64_t count, int64_t head_dim) {
  return count * (2 * head_dim + 16 + kTileKeys);
}

template <typename R>
void start_rows(const AttentionTile& tile, int64_t head, float* scratch, Rows& rows) {
  rows.count = tile.row_end - tile.row_begin;
  rows.head_dim = tile.args->head_dim;
  rows.query = scratch;
  rows.out = rows.query + rows.count * rows.head_dim;
  rows.sum = rows.out + rows.count * rows.head_dim;
  rows.scores = rows.sum + rows.count * 16;
  for (int64_t r = 0; r < rows.count; ++r) {
    const auto* query = static_cast<const typename R::Item*>(tile.args->query) +
                        query_offset(tile, tile.row_begin + r, head);
    R::start_row(query, rows.query + r * rows.head_dim, rows.head_dim);
    for (int64_t i = 0; i < rows.head_dim; i += 16) {
      _mm512_store_ps(rows.out + r * rows.head_dim + i, _mm512_setzero_ps());
    }
    _mm512_store_ps(rows.sum + 16 * r, _mm512_setzero_ps());
    rows.max[r] = -infinity();
  }
}

template <typename R>
void finish_rows(const Rows& rows, const TileResult& result) {
  for (int64_t r = 0; r < rows.count; ++r) {
    R::finish_row(rows.out + r * rows.head_dim, result.out + r * rows.head_dim, rows.head_dim);
    result.max[r] = rows.max[r];
    result.sum[r] = _mm512_reduce_add_ps(_mm512_load_ps(rows.sum + 16 * r));
  }
}

// Turns the scores of the keys that `now` holds into weights, for one head's rows.
template <typename R>
void score_head(const AttentionTile& tile, const KeyRange* seen, const Offsets& now,
                const CacheRows<typename R::Item>& keys, Prefetch<typename R::Item> next,
                Rows& rows) {
  const int64_t num_keys = now.end - now.begin;
  const int64_t num_batches = (rows.count + kBatch - 1) / kBatch;
  for (int64_t b = 0, r = 0; b < num_batches; ++b) {
    const int64_t count = (rows.count - r) / (num_batches - b);
    R::kKernels[count].score(rows.query + r * rows.head_dim, rows.head_dim, keys, next, num_keys,
                             rows.scores + r * kTileKeys);
    r += count;
  }
  const float scale = tile.args->sm_scale * kLog2E;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t first = seen[r].begin > now.begin ? seen[r].begin - now.begin : 0;
    const int64_t last = seen[r].end < now.end ? seen[r].end - now.begin : num_keys;
    rows.decay[r] = softmax_step(rows.scores + r * kTileKeys, num_keys, first, last, scale,
                                 &rows.max[r], rows.sum + 16 * r);
  }
}

// Adds the values that `now` holds, by these weights, to one head's rows.
template <typename R>
void add_head(const Offsets& now, const CacheRows<typename R::Item>& values,
              Prefetch<typename R::Item> next, Rows& rows) {
  const int64_t num_batches = (rows.count + kBatch - 1) / kBatch;
  for (int64_t b = 0, r = 0; b < num_batches; ++b) {
    const int64_t count = (rows.count - r) / (num_batches - b);
    R::kKernels[count].add(rows.scores + r * kTileKeys, rows.decay + r, values, next,
                           now.end - now.begin, rows.head_dim, rows.out + r * rows.head_dim);
    r += count;
  }
}

// Goes through the keys once. For each tile of them it reads the keys of all heads, which are
// neighbours in the cache, then the values of all heads: memory is read in long pieces.
template <typename R>
void attend_few_rows(const AttentionTile& tile, const TileResult* results) {
  using Item = typename R::Item;
  const PagedAttentionArgs& args = *tile.args;
  const int64_t num_rows = tile.row_end - tile.row_begin;
  const int64_t rows_size = (scratch_size(num_rows, args.head_dim) + 15) / 16 * 16;
  float* scratch = thread_scratch(1, tile.num_kv_heads * rows_size);
  Rows rows[kMaxTileHeads];
  for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
    start_rows<R>(tile, head, scratch + head * rows_size, rows[head]);
  }
  KeyRange seen[kFewRows];
  for (int64_t r = 0; r < num_rows; ++r) seen[r] = visible_keys(tile, tile.row_begin + r);
  const auto* key_cache = static_cast<const Item*>(args.key_cache);
  const auto* value_cache = static_cast<const Item*>(args.value_cache);
  const int64_t num_heads = tile.num_kv_heads;
  const int64_t key_stride = args.key_head_stride, value_stride = args.value_head_stride;
  Offsets tiles[2];
  find_tile(tile, tile.key_begin, tiles[0]);
  for (int i = 0; tiles[i].begin < tiles[i].end; i = 1 - i) {
    const Offsets& now = tiles[i];
    find_tile(tile, now.end, tiles[1 - i]);
    const CacheRows<Item> keys = {key_cache, now.keys}, values = {value_cache, now.values};
    const CacheRows<Item> next_keys = {key_cache, tiles[1 - i].keys};
    const int64_t num_keys = now.end - now.begin;
    const int64_t num_next_keys = tiles[1 - i].end - tiles[1 - i].begin;  // 0 after the last tile
    for (int64_t head = 0; head < num_heads; ++head) {
      const bool has_more = head + 1 < num_heads;
      score_head<R>(tile, seen, now, keys.of_head(head, key_stride),
                    Prefetch<Item>(has_more ? keys.of_head(head + 1, key_stride) : values, num_keys,
                                   args.head_dim),
                    rows[head]);
    }
    for (int64_t head = 0; head < num_heads; ++head) {
      const bool has_more = head + 1 < num_heads;
      add_head<R>(
          now, values.of_head(head, value_stride),
          has_more ? Prefetch<Item>(values.of_head(head + 1, value_stride), num_keys, args.head_dim)
                   : Prefetch<Item>(next_keys, num_next_keys, args.head_dim),
          rows[head]);
    }
  }
  for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
    finish_rows<R>(rows[head], results[head]);
  }
}

}  // namespace
}  // namespace kvkernels
