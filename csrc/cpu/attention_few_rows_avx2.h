// Decode with AVX2: few query rows go once through a long run of keys.
#pragma once

#include "cpu/attention_key_tiles.h"
#include "cpu/attention_products_avx2.h"
#include "cpu/attention_scores.h"

namespace kvkernels {
namespace {

using Tile = KeyTile<kTileKeys>;

// One head's query rows and their running sums.
struct Rows {
  int64_t count, head_dim, value_dim;
  float* query;   // [count, head_dim], in the order of E::arrange, as is out
  float* floats;  // [count, head_dim]: the query in the order of channels
  float* out;     // [count, value_dim]
  float* sum;     // [count, 8]
  float* scores;  // [count, kTileKeys]; then weights
  float max[kFewRows], decay[kFewRows];
};

inline int64_t scratch_size(int64_t count, const PagedAttentionArgs& args) {
  return count * (2 * args.head_dim + args.value_dim + 8 + kTileKeys);
}

template <typename E>
void start_rows(const AttentionTile& tile, int64_t head, float* scratch, Rows& rows) {
  rows.count = tile.row_end - tile.row_begin;
  rows.head_dim = tile.args->head_dim;
  rows.value_dim = tile.args->value_dim;
  rows.query = scratch;
  rows.floats = rows.query + rows.count * rows.head_dim;
  rows.out = rows.floats + rows.count * rows.head_dim;
  rows.sum = rows.out + rows.count * rows.value_dim;
  rows.scores = rows.sum + rows.count * 8;
  std::fill_n(rows.out, rows.count * rows.value_dim, 0.0f);
  std::fill_n(rows.sum, rows.count * 8, 0.0f);
  std::fill_n(rows.max, rows.count, -kInfinity);
  for (int64_t r = 0; r < rows.count; ++r) {
    const auto* query = static_cast<const typename E::Item*>(tile.args->query) +
                        query_offset(tile, tile.row_begin + r, head);
    float* floats = rows.floats + r * rows.head_dim;
    for (int64_t i = 0; i < rows.head_dim; i += 8) _mm256_storeu_ps(floats + i, E::load(query + i));
    copy_pairs(floats, rows.head_dim, rows.query + r * rows.head_dim, E::arrange);
  }
}

// Turns one head's scores of the keys in `now` into weights.
template <typename E>
inline void weigh_head(const AttentionTile& tile, int64_t head, const Tile& now, Rows& rows) {
  const bool adjusts = adjusts_scores(*tile.args);
  const float scale = adjusts ? 1.0f : tile.args->sm_scale * kLog2E;
  for (int64_t r = 0; r < rows.count; ++r) {
    float* scores = rows.scores + r * kTileKeys;
    const int64_t row = tile.row_begin + r;
    const KeyRange seen = visible_keys(tile, row);
    if (adjusts) adjust_scores(tile, row, head, now.begin, now.num_keys(), scores);
    const int64_t last = std::min(seen.end, now.end) - now.begin;
    rows.decay[r] = softmax_step<E>(scores, now.num_keys(), seen.begin - now.begin, last, scale,
                                    &rows.max[r], rows.sum + 8 * r);
  }
}

// Goes through the keys once. For each tile of keys it reads the keys of all heads, which are
// neighbours in the cache, then the values of all heads, so that memory is read in long pieces.
template <typename E>
class FewRows {
 public:
  using Item = typename E::Item;

  FewRows(const AttentionTile& tile) : tile_(tile), args_(*tile.args) {
    const int64_t num_heads = tile.num_kv_heads;
    const int64_t rows_size = scratch_size(tile.row_end - tile.row_begin, args_);
    const int64_t wide_dim = std::max(args_.head_dim, args_.value_dim);
    float* scratch =
        thread_scratch(1, num_heads * rows_size + (kFewRows + kTileKeys + 2) * wide_dim);
    for (int64_t head = 0; head < num_heads; ++head) {
      start_rows<E>(tile, head, scratch + head * rows_size, rows_[head]);
    }
    sums_ = scratch + num_heads * rows_size;
    unpacked_ = sums_ + kFewRows * wide_dim;
    scales_ = unpacked_ + kTileKeys * wide_dim;
  }

  void attend(const TileResult* results) {
    Tile tiles[2];
    find(tile_.key_begin, tiles[0]);
    for (int i = 0; tiles[i].num_keys() > 0; i = 1 - i) {
      find(tiles[i].end, tiles[1 - i]);
      for (int64_t head = 0; head < tile_.num_kv_heads; ++head) add_keys(tiles[i], head);
      for (int64_t head = 0; head < tile_.num_kv_heads; ++head) add_values(tiles[i], head);
    }
    for (int64_t head = 0; head < tile_.num_kv_heads; ++head) {
      const Rows& rows = rows_[head];
      std::copy_n(rows.max, rows.count, results[head].max);
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t place = r * rows.value_dim;
        copy_pairs(rows.out + place, rows.value_dim, results[head].out + place, E::restore);
        results[head].sum[r] = sum_lanes(_mm256_loadu_ps(rows.sum + 8 * r));
      }
    }
  }

 private:
  void find(int64_t begin, Tile& found) {
    find_tile(tile_, begin, [](const CodeShape&) { return avx2_code_kernels(); }, found);
    prefetch_.add_tile(found.key_spans, found.value_spans, tile_.num_kv_heads);
    if (found.num_keys() == 0) add_next(tile_, kTileKeys, prefetch_);
  }

  void add_keys(const Tile& now, int64_t head) {
    Rows& rows = rows_[head];
    prefetch_.begin(now.key_spans.num_bytes);
    if (now.form == Form::kPlain) {
      const auto* cache = static_cast<const Item*>(args_.key_cache) + head * args_.key_head_stride;
      score_all<E>(rows.query, rows.count, rows.head_dim, {cache, now.keys}, prefetch_,
                   now.num_keys(), rows.scores);
    } else if (now.form == Form::kCodes) {
      CodeJobs<KeyJob> all;
      add_key_jobs(head, now.codes, rows.floats, rows.scores, all);
      now.codes.kernels->score(all.jobs, all.count, rows.count, prefetch_);
    } else {
      unpack_keys<Avx2Unpacker<E>>(tile_, head, now.begin, now.end, scales_, unpacked_);
      score_all<Float32>(rows.floats, rows.count, rows.head_dim, {unpacked_, now.keys}, prefetch_,
                         now.num_keys(), rows.scores);
    }
    weigh_head<E>(tile_, head, now, rows);
  }

  void add_values(const Tile& now, int64_t head) {
    Rows& rows = rows_[head];
    prefetch_.begin(now.value_spans.num_bytes);
    if (now.form == Form::kPlain) {
      const auto* cache =
          static_cast<const Item*>(args_.value_cache) + head * args_.value_head_stride;
      add_all<E>(rows.scores, rows.count, rows.decay, {cache, now.values}, prefetch_,
                 now.num_keys(), rows.value_dim, rows.out);
      return;
    }
    constexpr float kNoDecay[kFewRows] = {1, 1, 1, 1, 1, 1, 1, 1};
    std::fill_n(sums_, rows.count * rows.value_dim, 0.0f);
    if (now.form == Form::kCodes) {
      CodeJobs<ValueJob> all;
      add_value_jobs(head, now.codes, rows.scores, kNoDecay, sums_, all);
      now.codes.kernels->add(all.jobs, all.count, rows.count, prefetch_);
    } else {
      unpack_values<Avx2Unpacker<E>>(tile_, head, now.begin, now.end, scales_, unpacked_);
      add_all<Float32>(rows.scores, rows.count, kNoDecay, {unpacked_, now.values}, prefetch_,
                       now.num_keys(), rows.value_dim, sums_);
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t place = r * rows.value_dim;
      add_row<E>(sums_ + place, rows.value_dim, rows.decay[r], rows.out + place);
    }
  }

  const AttentionTile& tile_;
  const PagedAttentionArgs& args_;
  Rows rows_[kMaxTileHeads];
  Prefetch prefetch_;
  float* sums_;      // [kFewRows, the larger dim]: sums of values in the order of channels
  float* unpacked_;  // [kTileKeys, the larger dim]: keys or values of one head
  float* scales_;    // two rows: scales and minimums being unpacked
};

template <typename E>
void attend_few_rows(const AttentionTile& tile, const TileResult* results) {
  FewRows<E>(tile).attend(results);
}

}  // namespace
}  // namespace kvkernels
