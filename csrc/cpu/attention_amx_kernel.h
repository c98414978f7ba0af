// Attention for bfloat16 on 16-row matrix tiles, written against a small interface so that one
// text serves the AMX instructions and their emulation. In an anonymous namespace: each file that
// includes this gets its own copy, compiled with that file's flags.
//
//   scores, transposed: S^T [64 keys, 16 rows] = K [keys, head_dim] * Q^T. A key is a row of the A
//   operand as it lies in the cache, at any stride, so no cache layout needs repacking; Q^T is
//   packed once, pairs of head_dim side by side.
//   output:             O [16 rows, head_dim] += P [16 rows, 64 keys] * V, pairs of keys of V side
//   by side, interleaved for each tile of keys once and used by all rows.
//
// Tiles is a class that holds 8 tile registers of 16 rows of 64 bytes:
//   zero<T>(), load<T>(source, stride in bytes), store<T>(target, stride in bytes)
//   dot<C, A, B>(): C[m][n] += sum over k < 32 of A[m][k] * B[k / 2][2 n + k % 2]
#pragma once

#include "cpu/attention_scores.h"
#include "cpu/attention_unpack_portable.h"

namespace kvkernels {
namespace {

constexpr int64_t kLanes = 16;     // query rows side by side
constexpr int64_t kTileKeys = 64;  // keys worked on at a time
constexpr int64_t kTileRows = 64;  // query rows that share the packed values
constexpr int64_t kStep = 32;      // what one dot sums over

constexpr float kLowest = -__builtin_inff();

// One item's rows, in groups of kLanes, and the tile of keys that is being worked on.
struct Work {
  int64_t count, num_groups, head_dim, value_dim;
  uint16_t* query;     // [num_groups, head_dim / 32, 16, kLanes, 2]
  uint16_t* keys;      // [kTileKeys, head_dim]: copies of keys that do not lie in one block
  uint16_t* values;    // [kTileKeys / 2, value_dim, 2]
  uint16_t* unpacked;  // [kTileKeys, value_dim]
  uint16_t* weights;   // [kLanes, kTileKeys]
  float* scores;       // [kTileKeys, kLanes]
  float* out;          // [num_groups * kLanes, value_dim]
  float* scales;       // two rows
  float max[kTileRows], sum[kTileRows];
  KeyRange seen[kTileRows];
};

void start_rows(const AttentionTile& tile, Work& work) {
  work.count = tile.row_end - tile.row_begin;
  work.num_groups = (work.count + kLanes - 1) / kLanes;
  work.head_dim = tile.args->head_dim;
  work.value_dim = tile.args->value_dim;
  const int64_t query_size = kTileRows * work.head_dim, out_size = kTileRows * work.value_dim;
  const int64_t key_size = kTileKeys * work.head_dim, value_size = kTileKeys * work.value_dim;
  const int64_t num_halves = query_size + key_size + 2 * value_size + kLanes * kTileKeys;
  const int64_t scales_size = 2 * std::max(work.head_dim, work.value_dim);
  float* scratch = thread_scratch(1, num_halves / 2 + kTileKeys * kLanes + out_size + scales_size);
  work.scores = scratch;
  work.out = work.scores + kTileKeys * kLanes;
  work.scales = work.out + out_size;
  work.query = reinterpret_cast<uint16_t*>(work.scales + scales_size);
  work.keys = work.query + query_size;
  work.values = work.keys + key_size;
  work.unpacked = work.values + value_size;
  work.weights = work.unpacked + value_size;
  const auto* query = static_cast<const uint16_t*>(tile.args->query);
  for (int64_t row = 0; row < work.num_groups * kLanes; ++row) {
    const bool is_row = row < work.count;
    const uint16_t* source = is_row ? query + query_offset(tile, tile.row_begin + row) : nullptr;
    uint16_t* target = work.query + row / kLanes * kLanes * work.head_dim + row % kLanes * 2;
    for (int64_t i = 0; i < work.head_dim; ++i) {
      target[i / 2 * kLanes * 2 + i % 2] = is_row ? source[i] : 0;
    }
    std::fill_n(work.out + row * work.value_dim, work.value_dim, 0.0f);
    work.max[row] = kLowest;
    work.sum[row] = 0;
    work.seen[row] = is_row ? visible_keys(tile, tile.row_begin + row) : KeyRange{0, 0};
  }
}

struct BFloat16Writer {
  using Item = uint16_t;
  static uint16_t narrow(float value) { return bfloat16_from_float(value); }
};
using Unpacker = PortableUnpacker<BFloat16Writer>;

// Where 16 keys lie as rows of a tile.
struct KeyRows {
  const uint16_t* first;
  int64_t stride;  // in bytes
};

// Finds the keys that start at 16 * part of the tile; copies them where they do not lie evenly
// spaced, or are not all in [first, num_keys): other slots are never read.
KeyRows find_keys(const AttentionTile& tile, const Work& work, int64_t part, int64_t first,
                  int64_t num_keys, const int64_t* offsets, int64_t first_slot) {
  const auto* cache = static_cast<const uint16_t*>(tile.args->key_cache);
  const int64_t begin = part * kLanes, block_size = tile.args->block_size;
  const bool is_whole = begin >= first && begin + kLanes <= num_keys;
  if (is_whole && (first_slot + begin) % block_size + kLanes <= block_size) {
    return {cache + offsets[begin],
            tile.args->key_slot_stride * static_cast<int64_t>(sizeof(uint16_t))};
  }
  const int64_t row_bytes = work.head_dim * static_cast<int64_t>(sizeof(uint16_t));
  uint16_t* copy = work.keys + begin * work.head_dim;
  for (int64_t t = 0; t < kLanes; ++t) {
    uint16_t* target = copy + t * work.head_dim;
    if (begin + t < num_keys) {
      std::memcpy(target, cache + offsets[begin + t], row_bytes);
    } else {
      std::memset(target, 0, row_bytes);
    }
  }
  return {copy, row_bytes};
}

// Pairs of values side by side. What lies past the last key becomes 0, never NaN.
void interleave_values(const uint16_t* cache, const Work& work, int64_t num_keys,
                       const int64_t* offsets) {
  for (int64_t t = 0; t < kTileKeys; t += 2) {
    uint16_t* target = work.values + t * work.value_dim;
    const uint16_t* even = t < num_keys ? cache + offsets[t] : nullptr;
    const uint16_t* odd = t + 1 < num_keys ? cache + offsets[t + 1] : nullptr;
    for (int64_t i = 0; i < work.value_dim; ++i) {
      target[2 * i] = even ? even[i] : 0;
      target[2 * i + 1] = odd ? odd[i] : 0;
    }
  }
}

// Finds or unpacks the keys of the tile of keys [begin, end), as far as they are the item's, and
// packs their values.
void load_tile(const AttentionTile& tile, const Work& work, int64_t begin, int64_t end,
               KeyRows* keys) {
  const PagedAttentionArgs& args = *tile.args;
  int64_t key_offsets[kTileKeys], value_offsets[kTileKeys];
  const int64_t count = end - begin, first = std::max<int64_t>(tile.key_begin - begin, 0);
  if (lies_plain(tile, begin + first, end)) {
    find_rows(tile, begin + first, end, key_offsets + first, value_offsets + first);
    repeat_first_row(key_offsets, first);
    repeat_first_row(value_offsets, first);
    for (int64_t part = 0; part < kTileKeys / kLanes; ++part) {
      keys[part] = find_keys(tile, work, part, first, count, key_offsets, begin % args.block_size);
    }
    interleave_values(static_cast<const uint16_t*>(args.value_cache), work, count, value_offsets);
    return;
  }
  const int64_t row_bytes = work.head_dim * static_cast<int64_t>(sizeof(uint16_t));
  std::fill_n(work.keys, kTileKeys * work.head_dim, 0);
  unpack_keys<Unpacker>(tile, 0, begin + first, end, work.scales,
                        work.keys + first * work.head_dim);
  for (int64_t part = 0; part < kTileKeys / kLanes; ++part) {
    keys[part] = {work.keys + part * kLanes * work.head_dim, row_bytes};
  }
  unpack_values<Unpacker>(tile, 0, begin + first, end, work.scales,
                          work.unpacked + first * work.value_dim);
  for (int64_t t = first; t < count; ++t) value_offsets[t] = t * work.value_dim;
  repeat_first_row(value_offsets, first);
  interleave_values(work.unpacked, work, count, value_offsets);
}

// Scores lie keys by rows; the rules take one row at a time.
void adjust_group(const AttentionTile& tile, const Work& work, int64_t group, int64_t begin,
                  int64_t num_keys) {
  for (int64_t n = 0; n < kLanes && group * kLanes + n < work.count; ++n) {
    float row[kTileKeys];
    for (int64_t t = 0; t < kTileKeys; ++t) row[t] = work.scores[t * kLanes + n];
    adjust_scores(tile, tile.row_begin + group * kLanes + n, 0, begin, num_keys, row);
    for (int64_t t = 0; t < kTileKeys; ++t) work.scores[t * kLanes + n] = row[t];
  }
}

template <typename Tiles>
void score_group(Tiles& tiles, const Work& work, int64_t group, const KeyRows* keys) {
  tiles.template zero<0>();
  tiles.template zero<1>();
  tiles.template zero<2>();
  tiles.template zero<3>();
  const uint16_t* query = work.query + group * kLanes * work.head_dim;
  for (int64_t i = 0; i < work.head_dim; i += kStep) {
    tiles.template load<7>(query + i * kLanes, 64);
    tiles.template load<4>(keys[0].first + i, keys[0].stride);
    tiles.template dot<0, 4, 7>();
    tiles.template load<5>(keys[1].first + i, keys[1].stride);
    tiles.template dot<1, 5, 7>();
    tiles.template load<4>(keys[2].first + i, keys[2].stride);
    tiles.template dot<2, 4, 7>();
    tiles.template load<5>(keys[3].first + i, keys[3].stride);
    tiles.template dot<3, 5, 7>();
  }
  tiles.template store<0>(work.scores, 64);
  tiles.template store<1>(work.scores + kLanes * kLanes, 64);
  tiles.template store<2>(work.scores + 2 * kLanes * kLanes, 64);
  tiles.template store<3>(work.scores + 3 * kLanes * kLanes, 64);
}

// Turns the scores of a group's rows with the keys [begin, end) into weights, and the
// running maxima and sums with them; scales what was summed up before.
void softmax_group(Work& work, int64_t group, int64_t begin, int64_t end, float scale) {
  const int64_t num_keys = end - begin;
  float* max = work.max + group * kLanes;
  float* sum = work.sum + group * kLanes;
  const KeyRange* seen = work.seen + group * kLanes;
  int32_t first[kLanes], last[kLanes];
  float base[kLanes], decay[kLanes];
  for (int64_t n = 0; n < kLanes; ++n) {
    const int64_t from = seen[n].begin - begin, to = seen[n].end - begin;
    first[n] = static_cast<int32_t>(from < 0 ? 0 : from > num_keys ? num_keys : from);
    last[n] = static_cast<int32_t>(to < 0 ? 0 : to > num_keys ? num_keys : to);
    base[n] = max[n];
  }
  for (int32_t t = 0; t < kTileKeys; ++t) {
    float* scores = work.scores + t * kLanes;
    for (int64_t n = 0; n < kLanes; ++n) {
      const float score = (t >= first[n]) & (t < last[n]) ? scores[n] * scale : kLowest;
      scores[n] = score;
      max[n] = score > max[n] ? score : max[n];
    }
  }
  for (int64_t n = 0; n < kLanes; ++n) {
    const float old_max = base[n];
    // Where every score is minus infinity so far, the weights must come out as 0, not as NaN.
    base[n] = max[n] == kLowest ? 0.0f : max[n];
    decay[n] = exp2_scalar(old_max - base[n]);
    sum[n] *= decay[n];
  }
  for (int64_t t = 0; t < kTileKeys; ++t) {
    float* scores = work.scores + t * kLanes;
    for (int64_t n = 0; n < kLanes; ++n) {
      scores[n] = exp2_scalar(scores[n] - base[n]);
      sum[n] += scores[n];
    }
  }
  for (int64_t n = 0; n < kLanes; ++n) {
    for (int64_t t = 0; t < kTileKeys; ++t) {
      work.weights[n * kTileKeys + t] = bfloat16_from_float(work.scores[t * kLanes + n]);
    }
    float* out = work.out + (group * kLanes + n) * work.value_dim;
    for (int64_t i = 0; i < work.value_dim; ++i) out[i] *= decay[n];
  }
}

template <typename Tiles>
void add_values(Tiles& tiles, const Work& work, int64_t group) {
  const int64_t out_stride = work.value_dim * 4, value_stride = work.value_dim * 4;
  const uint16_t* values = work.values;
  tiles.template load<4>(work.weights, kTileKeys * 2);
  tiles.template load<5>(work.weights + kStep, kTileKeys * 2);
  for (int64_t i = 0; i < work.value_dim; i += 2 * kLanes) {
    float* out = work.out + group * kLanes * work.value_dim + i;
    tiles.template load<0>(out, out_stride);
    tiles.template load<1>(out + kLanes, out_stride);
    tiles.template load<6>(values + 2 * i, value_stride);
    tiles.template dot<0, 4, 6>();
    tiles.template load<7>(values + 2 * (i + kLanes), value_stride);
    tiles.template dot<1, 4, 7>();
    tiles.template load<6>(values + kStep * work.value_dim + 2 * i, value_stride);
    tiles.template dot<0, 5, 6>();
    tiles.template load<7>(values + kStep * work.value_dim + 2 * (i + kLanes), value_stride);
    tiles.template dot<1, 5, 7>();
    tiles.template store<0>(out, out_stride);
    tiles.template store<1>(out + kLanes, out_stride);
  }
}

template <typename Tiles>
void attend(const AttentionTile& tile, const TileResult* results) {
  const TileResult& result = results[0];
  Work work;
  start_rows(tile, work);
  const bool adjusts = adjusts_scores(*tile.args);
  const float scale = adjusts ? 1.0f : tile.args->sm_scale * kLog2E;
  Tiles tiles;  // configures the registers, and releases them at the end
  const int64_t first = tile.key_begin / kTileKeys * kTileKeys;
  for (int64_t begin = first, end; begin < tile.key_end; begin = end) {
    end = (begin / kTileKeys + 1) * kTileKeys;  // tiles and blocks of the cache end together
    if (end > tile.key_end) end = tile.key_end;
    KeyRows keys[kTileKeys / kLanes];
    load_tile(tile, work, begin, end, keys);
    for (int64_t group = 0; group < work.num_groups; ++group) {
      const int64_t last_row =
          group * kLanes + kLanes < work.count ? group * kLanes + kLanes - 1 : work.count - 1;
      const bool sees_keys =
          work.seen[last_row].end > begin && work.seen[group * kLanes].begin < end;
      if (!sees_keys) continue;
      score_group(tiles, work, group, keys);
      if (adjusts) adjust_group(tile, work, group, begin, end - begin);
      softmax_group(work, group, begin, end, scale);
      add_values(tiles, work, group);
    }
  }
  std::memcpy(result.out, work.out, work.count * work.value_dim * sizeof(float));
  std::memcpy(result.max, work.max, work.count * sizeof(float));
  std::memcpy(result.sum, work.sum, work.count * sizeof(float));
}

}  // namespace
}  // namespace kvkernels
