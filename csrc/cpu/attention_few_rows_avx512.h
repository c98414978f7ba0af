// Decode with AVX-512: few query rows against a long run of keys, at the speed of memory.
//
// Goes through the keys once, a tile of 64 at a time, for several neighbouring heads. The products
// are a template parameter R (see attention_row_products_avx512.h); blocks of codes have products
// of their own (attention_codes.h).
#pragma once

#include <iterator>

#include "cpu/attention_key_tiles.h"
#include "cpu/attention_row_products_avx512.h"
#include "cpu/attention_scores.h"
#include "cpu/row_batches.h"

namespace kvkernels {
namespace {

using Tile = KeyTile<kTileKeys>;

// One head's query rows and their running sums.
struct Rows {
  int64_t count, head_dim, value_dim;
  float* query;     // [count, head_dim], in R's own order, as is out
  float* floats;    // [count, head_dim]: in the order of channels; only if blocks may hold codes
  float* out;       // [count, value_dim]
  float* of_codes;  // [count, value_dim]: sums of values of codes, in the order of channels
  float* sum;       // [count, 16]
  float* scores;    // [count, kTileKeys]; then weights
  float max[kFewRows], decay[kFewRows];
  bool has_floats, has_codes;  // whether out, or of_codes, holds any sums
};

inline bool may_hold_codes(const PagedAttentionArgs& args) {
  return args.int8.num_blocks + args.int4.num_blocks > 0;
}

int64_t scratch_size(int64_t count, const PagedAttentionArgs& args) {
  return (count * (2 * args.head_dim + 2 * args.value_dim + 16 + kTileKeys) + 15) / 16 * 16;
}

template <typename R>
void start_rows(const AttentionTile& tile, int64_t head, float* scratch, Rows& rows) {
  rows.count = tile.row_end - tile.row_begin;
  rows.head_dim = tile.args->head_dim;
  rows.value_dim = tile.args->value_dim;
  rows.query = scratch;
  rows.floats = rows.query + rows.count * rows.head_dim;
  rows.out = rows.floats + rows.count * rows.head_dim;
  rows.sum = rows.out + rows.count * rows.value_dim;
  rows.scores = rows.sum + rows.count * 16;
  rows.of_codes = rows.scores + rows.count * kTileKeys;
  rows.has_floats = rows.has_codes = false;
  const bool keeps_floats = may_hold_codes(*tile.args);
  for (int64_t r = 0; r < rows.count; ++r) {
    const auto* query = static_cast<const typename R::Item*>(tile.args->query) +
                        query_offset(tile, tile.row_begin + r, head);
    R::start_row(query, r, rows.count, rows.head_dim, rows.query);
    for (int64_t i = 0; keeps_floats && i < rows.head_dim; i += 16) {
      _mm512_store_ps(rows.floats + r * rows.head_dim + i, R::Element::load(query + i));
    }
    for (int64_t i = 0; i < rows.value_dim; i += 16) {
      _mm512_store_ps(rows.out + r * rows.value_dim + i, _mm512_setzero_ps());
    }
    _mm512_store_ps(rows.sum + 16 * r, _mm512_setzero_ps());
    rows.max[r] = -kInfinity;
  }
}

// out = out + added.
inline void add_floats(const float* added, int64_t size, float* out) {
  for (int64_t i = 0; i < size; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(out + i), _mm512_load_ps(added + i)));
  }
}

// Multiplies one of the two running sums by the rows' decay.
inline void decay_rows(const Rows& rows, float* sums) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const __m512 decay = _mm512_set1_ps(rows.decay[r]);
    float* const row = sums + r * rows.value_dim;
    for (int64_t i = 0; i < rows.value_dim; i += 16) {
      _mm512_store_ps(row + i, _mm512_mul_ps(_mm512_load_ps(row + i), decay));
    }
  }
}

template <typename R>
void finish_rows(const Rows& rows, const TileResult& result) {
  for (int64_t r = 0; r < rows.count; ++r) {
    float* const out = result.out + r * rows.value_dim;
    R::finish_row(rows.out + r * rows.value_dim, out, rows.value_dim);
    if (rows.has_codes) add_floats(rows.of_codes + r * rows.value_dim, rows.value_dim, out);
    result.max[r] = rows.max[r];
    result.sum[r] = _mm512_reduce_add_ps(_mm512_load_ps(rows.sum + 16 * r));
  }
}

template <typename R>
void score_head(const Tile& now, const CacheRows<typename R::Item>& keys, ReadAhead& next,
                Rows& rows) {
  for_each_batch(rows.count, std::size(R::kScore) - 1, [&](int64_t r, int64_t count) {
    R::kScore[count](rows.query + r * rows.head_dim, rows.head_dim, keys, next, now.num_keys(),
                     rows.scores + r * kTileKeys);
  });
}

// Which columns of a tile each row sees.
struct Columns {
  KeyRange of_row[kFewRows];
  bool are_all = true;  // whether each row sees every key of a whole tile

  Columns(const KeyRange* seen, int64_t num_rows, const Tile& now) {
    const int64_t num_keys = now.num_keys();
    for (int64_t r = 0; r < num_rows; ++r) {
      of_row[r] = {seen[r].begin > now.begin ? seen[r].begin - now.begin : 0,
                   seen[r].end < now.end ? seen[r].end - now.begin : num_keys};
      are_all = are_all && sees_all(of_row[r], num_keys);
    }
  }
};

// Turns one head's scores of the keys in `now` into weights.
template <typename R>
inline void weigh_head(const AttentionTile& tile, int64_t head, const Columns& columns,
                       const Tile& now, Rows& rows) {
  using Weights = FloatWeights<typename R::Element>;
  const int64_t num_keys = now.num_keys();
  float scale = tile.args->sm_scale * kLog2E;
  if (adjusts_scores(*tile.args)) {
    scale = 1.0f;
    for (int64_t r = 0; r < rows.count; ++r) {
      adjust_scores(tile, tile.row_begin + r, head, now.begin, num_keys,
                    rows.scores + r * kTileKeys);
    }
  }
  if (columns.are_all) {
    softmax_whole<Weights>(rows.scores, rows.count, scale, rows.max, rows.sum, rows.decay);
  } else {
    softmax_rows<Weights>(rows.scores, num_keys, columns.of_row, rows.count, scale, rows.max,
                          rows.sum, rows.decay);
  }
}

// Adds the values of `now`, by these weights, to one head's rows.
template <typename R>
void add_head(const Tile& now, const CacheRows<typename R::Item>& values, ReadAhead& next,
              Rows& rows) {
  if (rows.has_codes) decay_rows(rows, rows.of_codes);
  rows.has_floats = true;
  constexpr float kNoDecay[kFewRows] = {1, 1, 1, 1, 1, 1, 1, 1};
  const int64_t step = keys_of_part(rows.value_dim * sizeof(typename R::Item), kTileKeys);
  for (int64_t first = 0; first < now.num_keys(); first += step) {
    const int64_t num_keys = std::min(now.num_keys() - first, step);
    for_each_batch(rows.count, std::size(R::kAdd) - 1, [&](int64_t r, int64_t count) {
      R::kAdd[count](rows.scores + r * kTileKeys + first, first == 0 ? rows.decay + r : kNoDecay,
                     {values.cache, values.offsets + first}, next, num_keys, rows.value_dim,
                     rows.out + r * rows.value_dim);
    });
  }
}

// Whether to prefetch each line twice (see ReadAhead). Not with 4-bit codes: a line holds so many
// of them that the work on it outlasts the wait for the next.
inline bool asks_twice(const PagedAttentionArgs& args) {
  return kPrefetchesToL1 && args.int4.num_blocks == 0;
}

// Goes through the keys once. For each tile of keys it reads the keys of all heads, which are
// neighbours in the cache, then the values of all heads, so that memory is read in long pieces.
template <typename R>
class FewRows {
 public:
  using Item = typename R::Item;

  FewRows(const AttentionTile& tile, FindCodeKernels kernels_of)
      : tile_(tile),
        args_(*tile.args),
        kernels_of_(kernels_of),
        prefetch_(Prefetch::kLead, asks_twice(*tile.args)) {
    const int64_t num_rows = tile.row_end - tile.row_begin, num_heads = tile.num_kv_heads;
    const int64_t rows_size = scratch_size(num_rows, args_);
    const int64_t wide_dim = std::max(args_.head_dim, args_.value_dim);
    float* scratch = thread_scratch(1, num_heads * rows_size + (kTileKeys + 2) * wide_dim);
    for (int64_t head = 0; head < num_heads; ++head) {
      start_rows<R>(tile, head, scratch + head * rows_size, rows_[head]);
    }
    unpacked_ = reinterpret_cast<Item*>(scratch + num_heads * rows_size);
    scales_ = scratch + num_heads * rows_size + kTileKeys * wide_dim;
    for (int64_t r = 0; r < num_rows; ++r) seen_[r] = visible_keys(tile, tile.row_begin + r);
  }

  void attend(const TileResult* results) {
    Tile tiles[2];
    find(tile_.key_begin, tiles[0]);
    for (int i = 0; tiles[i].num_keys() > 0; i = 1 - i) {
      find(tiles[i].end, tiles[1 - i]);
      add(tiles[i]);
    }
    for (int64_t head = 0; head < tile_.num_kv_heads; ++head) {
      finish_rows<R>(rows_[head], results[head]);
    }
  }

 private:
  void find(int64_t begin, Tile& found) {
    find_tile(tile_, begin, kernels_of_, found);
    prefetch_.add_tile(found.key_spans, found.value_spans, tile_.num_kv_heads);
    if (found.num_keys() == 0) add_next(tile_, kTileKeys, prefetch_);
  }

  void add(const Tile& now) {
    const Columns columns(seen_, tile_.row_end - tile_.row_begin, now);
    if (now.form == Form::kCodes) return add_codes(now, columns);
    for (int64_t head = 0; head < tile_.num_kv_heads; ++head) {
      prefetch_.begin(now.key_spans.num_bytes);
      score_head<R>(now, keys(now, head), prefetch_, rows_[head]);
      weigh_head<R>(tile_, head, columns, now, rows_[head]);
    }
    for (int64_t head = 0; head < tile_.num_kv_heads; ++head) {
      prefetch_.begin(now.value_spans.num_bytes);
      add_head<R>(now, values(now, head), prefetch_, rows_[head]);
    }
  }

  void add_codes(const Tile& now, const Columns& columns) {
    const int64_t num_heads = tile_.num_kv_heads;
    const int64_t step = std::min(now.codes.kernels->num_heads, num_heads);
    for (int64_t head = 0; head < num_heads; head += step) {
      score_codes(now, columns, head, std::min(head + step, num_heads));
    }
    for (int64_t head = 0; head < num_heads; head += step) {
      add_values_of_codes(now, head, std::min(head + step, num_heads));
    }
  }

  void score_codes(const Tile& now, const Columns& columns, int64_t first, int64_t end) {
    prefetch_.begin((end - first) * now.key_spans.num_bytes);
    CodeJobs<KeyJob> keys;
    for (int64_t head = first; head < end; ++head) {
      add_key_jobs(head, now.codes, rows_[head].floats, rows_[head].scores, keys);
    }
    now.codes.kernels->score(keys.jobs, keys.count, rows_[0].count, prefetch_);
    for (int64_t head = first; head < end; ++head) {
      weigh_head<R>(tile_, head, columns, now, rows_[head]);
    }
  }

  void add_values_of_codes(const Tile& now, int64_t first, int64_t end) {
    prefetch_.begin((end - first) * now.value_spans.num_bytes);
    CodeJobs<ValueJob> values;
    for (int64_t head = first; head < end; ++head) {
      Rows& rows = rows_[head];
      if (rows.has_floats) decay_rows(rows, rows.out);
      if (!rows.has_codes) std::fill_n(rows.of_codes, rows.count * rows.value_dim, 0.0f);
      rows.has_codes = true;
      add_value_jobs(head, now.codes, rows.scores, rows.decay, rows.of_codes, values);
    }
    now.codes.kernels->add(values.jobs, values.count, rows_[0].count, prefetch_);
  }

  CacheRows<Item> keys(const Tile& now, int64_t head) {
    if (now.form == Form::kPlain) {
      const auto* cache = static_cast<const Item*>(args_.key_cache);
      return {cache + head * args_.key_head_stride, now.keys};
    }
    unpack_keys<typename R::Unpacker>(tile_, head, now.begin, now.end, scales_, unpacked_);
    return {unpacked_, now.keys};
  }

  CacheRows<Item> values(const Tile& now, int64_t head) {
    if (now.form == Form::kPlain) {
      const auto* cache = static_cast<const Item*>(args_.value_cache);
      return {cache + head * args_.value_head_stride, now.values};
    }
    unpack_values<typename R::Unpacker>(tile_, head, now.begin, now.end, scales_, unpacked_);
    return {unpacked_, now.values};
  }

  const AttentionTile& tile_;
  const PagedAttentionArgs& args_;
  FindCodeKernels kernels_of_;
  Rows rows_[kMaxTileHeads];
  KeyRange seen_[kFewRows];
  Prefetch prefetch_;
  Item* unpacked_;  // [kTileKeys, the larger dim]: keys or values of one head
  float* scales_;   // two rows: scales and minimums being unpacked
};

template <typename R>
void attend_few_rows(const AttentionTile& tile, const TileResult* results,
                     FindCodeKernels kernels_of = R::code_kernels) {
  FewRows<R>(tile, kernels_of).attend(results);
}

}  // namespace
}  // namespace kvkernels
