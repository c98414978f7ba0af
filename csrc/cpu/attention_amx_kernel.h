// Attention for bfloat16 on 16-row matrix tiles, beside AVX-512 for what is no product. Written
// against a small interface so that one text serves the AMX instructions and their emulation. Only
// for files compiled for AVX512-BF16. In an anonymous namespace: each file that includes this gets
// its own copy, compiled with that file's flags.
//
//   scores, transposed: S^T [128 keys, 16 rows] = K [keys, head_dim] * Q^T. A key is a row of the A
//   operand as it lies in the cache, at any stride, so no cache layout needs repacking; Q^T is
//   packed once, pairs of head_dim side by side. The softmax then has a row of the query to a lane.
//   output:             O [16 rows, value_dim] += P [16 rows, 128 keys] * V, pairs of keys of V
//   side by side, interleaved for each tile of keys once and used by all rows. P is transposed
//   back.
//
// Tiles is a class as in tiles_amx.h.
#pragma once

#include <cstring>

#include "cpu/attention_avx512.h"
#include "cpu/attention_scores.h"
#include "cpu/attention_spans.h"
#include "cpu/attention_unpack_avx512.h"
#include "cpu/simd_avx512_bf16.h"

namespace kvkernels {
namespace {

// Worked on at a time: the output is read and written once for them, which takes longer than their
// products if they are few. In halves of it, prompts of 2k and 8k tokens took a tenth longer.
constexpr int64_t kKeys = 128;
constexpr int64_t kLanes = 16;      // query rows side by side
constexpr int64_t kTileRows = 128;  // query rows that share the packed values
constexpr int64_t kStep = 32;       // what one dot sums over
constexpr int64_t kTileBytes = 64;  // a row of a tile
constexpr int64_t kParts = kKeys / kLanes, kHalves = kKeys / kStep;

// Up to so many rows the kernel that reads each element once, with no tiles, is faster: a tile
// always has 16 rows.
constexpr int64_t kFewRowsBesideTiles = 4;

// One item's rows, in groups of kLanes, and the tile of keys that is being worked on. `out` lies in
// tiles, and of 32 neighbouring channels the first tile holds those at 0 to 3 of every 8: the order
// that unpacking pairs gives.
struct Work {
  const AttentionTile* tile;
  int64_t count, num_groups, head_dim, value_dim;
  bool adjusts;  // whether scores need more than a scale
  float scale;
  uint16_t* query;     // [num_groups, head_dim / 32, 16, kLanes, 2]
  uint16_t* keys;      // [kKeys, head_dim]: copies of keys that do not lie in one block
  uint16_t* values;    // [value_dim / 16, kKeys / 2, 16, 2]
  uint16_t* unpacked;  // [kKeys, value_dim]
  uint16_t* weights;   // [2, kHalves, kLanes, kStep], of two groups
  float* scores;       // [2, kKeys, kLanes]
  float* out;          // [num_groups, value_dim / 16, kLanes, 16]
  float* scales;       // two rows
  Prefetch next;       // where rows are few, what the item will read
  alignas(64) float max[kTileRows], sum[kTileRows];
  alignas(64) int32_t first[kTileRows], last[kTileRows];  // the keys [first, last) that a row sees
};

void start_group(const AttentionTile& tile, int64_t group, Work& work) {
  const int64_t first_row = group * kLanes;
  const auto* query = static_cast<const uint16_t*>(tile.args->query);
  const uint16_t* sources[kLanes];
  for (int64_t n = 0; n < kLanes; ++n) {
    const int64_t row = first_row + n;
    // Rows past the last are zeros that see what the last one sees.
    const int64_t real = std::min(row, work.count - 1);
    sources[n] = row < work.count ? query + query_offset(tile, tile.row_begin + row) : nullptr;
    const KeyRange seen = visible_keys(tile, tile.row_begin + real);
    work.first[row] = static_cast<int32_t>(seen.begin);
    work.last[row] = static_cast<int32_t>(seen.end);
    work.max[row] = -infinity();
    work.sum[row] = 0;
  }
  uint16_t* target = work.query + first_row * work.head_dim;
  for (int64_t i = 0; i < work.head_dim; i += kStep, target += kLanes * kStep) {
    __m512 rows[kLanes];
    for (int64_t n = 0; n < kLanes; ++n) {
      rows[n] = sources[n] != nullptr ? _mm512_loadu_ps(sources[n] + i) : _mm512_setzero_ps();
    }
    transpose_16x16(rows);
    for (int64_t n = 0; n < kLanes; ++n) _mm512_store_ps(target + n * kStep, rows[n]);
  }
  std::memset(work.out + first_row * work.value_dim, 0, kLanes * work.value_dim * sizeof(float));
}

void start(const AttentionTile& tile, Work& work) {
  work.tile = &tile;
  work.count = tile.row_end - tile.row_begin;
  work.num_groups = (work.count + kLanes - 1) / kLanes;
  work.head_dim = tile.args->head_dim;
  work.value_dim = tile.args->value_dim;
  work.adjusts = adjusts_scores(*tile.args);
  work.scale = work.adjusts ? 1.0f : tile.args->sm_scale * kLog2E;
  const int64_t num_rows = work.num_groups * kLanes;
  const int64_t query_size = num_rows * work.head_dim, out_size = num_rows * work.value_dim;
  const int64_t key_size = kKeys * work.head_dim, value_size = kKeys * work.value_dim;
  const int64_t score_size = 2 * kKeys * kLanes;
  const int64_t num_halves = query_size + key_size + 2 * value_size + score_size;
  const int64_t scales_size = 2 * std::max(work.head_dim, work.value_dim);
  work.scores = thread_scratch(1, num_halves / 2 + score_size + out_size + scales_size);
  work.out = work.scores + score_size;
  work.scales = work.out + out_size;
  work.query = reinterpret_cast<uint16_t*>(work.scales + scales_size);
  work.keys = work.query + query_size;
  work.values = work.keys + key_size;
  work.unpacked = work.values + value_size;
  work.weights = work.unpacked + value_size;
  for (int64_t group = 0; group < work.num_groups; ++group) start_group(tile, group, work);
}

// The end of the tile of keys that starts at `begin`, at a multiple of kKeys.
int64_t end_of_keys(const AttentionTile& tile, int64_t begin) {
  return std::min((begin / kKeys + 1) * kKeys, tile.key_end);
}

// ---- keys and values -----------------------------------------------------------------------

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

__m512i load_or_zero(const uint16_t* row, int64_t i) {
  return row == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(row + i);
}

// Pairs of values side by side. What lies past the last key becomes 0, never NaN.
void interleave_values(const uint16_t* cache, int64_t num_keys, const int64_t* offsets,
                       Work& work) {
  constexpr int64_t kTileSize = kKeys * kLanes;
  for (int64_t t = 0; t < kKeys; t += 2) {
    uint16_t* target = work.values + t * kLanes;
    const uint16_t* even = t < num_keys ? cache + offsets[t] : nullptr;
    const uint16_t* odd = t + 1 < num_keys ? cache + offsets[t + 1] : nullptr;
    for (int64_t i = 0; i < work.value_dim; i += kStep, target += 2 * kTileSize) {
      const __m512i a = load_or_zero(even, i), b = load_or_zero(odd, i);
      _mm512_store_si512(target, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(target + kTileSize, _mm512_unpackhi_epi16(a, b));
    }
    work.next.advance(2 * work.value_dim * static_cast<int64_t>(sizeof(uint16_t)));
  }
}

// Finds or unpacks the keys of the tile of keys [begin, end), as far as they are the item's, and
// packs their values.
void load_tile(const AttentionTile& tile, int64_t begin, int64_t end, KeyRows* keys, Work& work) {
  const PagedAttentionArgs& args = *tile.args;
  int64_t key_offsets[kKeys], value_offsets[kKeys];
  const int64_t count = end - begin, first = std::max<int64_t>(tile.key_begin - begin, 0);
  const int64_t row_bytes = work.head_dim * static_cast<int64_t>(sizeof(uint16_t));
  work.next.advance(count * row_bytes);
  if (lies_plain(tile, begin + first, end)) {
    find_rows(tile, begin + first, end, key_offsets + first, value_offsets + first);
    repeat_first_row(key_offsets, first);
    repeat_first_row(value_offsets, first);
    for (int64_t part = 0; part < kParts; ++part) {
      keys[part] = find_keys(tile, work, part, first, count, key_offsets, begin % args.block_size);
    }
    interleave_values(static_cast<const uint16_t*>(args.value_cache), count, value_offsets, work);
    return;
  }
  using Unpacker = Avx512Unpacker<BFloat16>;
  std::memset(work.keys, 0, kKeys * row_bytes);
  unpack_keys<Unpacker>(tile, 0, begin + first, end, work.scales,
                        work.keys + first * work.head_dim);
  for (int64_t part = 0; part < kParts; ++part) {
    keys[part] = {work.keys + part * kLanes * work.head_dim, row_bytes};
  }
  unpack_values<Unpacker>(tile, 0, begin + first, end, work.scales,
                          work.unpacked + first * work.value_dim);
  for (int64_t t = first; t < count; ++t) value_offsets[t] = t * work.value_dim;
  repeat_first_row(value_offsets, first);
  interleave_values(work.unpacked, count, value_offsets, work);
}

// ---- scores --------------------------------------------------------------------------------

// Of one group: each dot has the same 16 rows.
template <typename Tiles>
void score_group(Tiles& tiles, const Work& work, int64_t group, const KeyRows* keys) {
  const uint16_t* query = work.query + group * kLanes * work.head_dim;
  for (int64_t part = 0; part < kParts; part += 4) {
    tiles.template zero<0>();
    tiles.template zero<1>();
    tiles.template zero<2>();
    tiles.template zero<3>();
    for (int64_t i = 0; i < work.head_dim; i += kStep) {
      tiles.template load<7>(query + i * kLanes, kTileBytes);
      tiles.template load<4>(keys[part].first + i, keys[part].stride);
      tiles.template dot<0, 4, 7>();
      tiles.template load<5>(keys[part + 1].first + i, keys[part + 1].stride);
      tiles.template dot<1, 5, 7>();
      tiles.template load<6>(keys[part + 2].first + i, keys[part + 2].stride);
      tiles.template dot<2, 6, 7>();
      tiles.template load<4>(keys[part + 3].first + i, keys[part + 3].stride);
      tiles.template dot<3, 4, 7>();
    }
    float* scores = work.scores + part * kLanes * kLanes;
    tiles.template store<0>(scores, kTileBytes);
    tiles.template store<1>(scores + kLanes * kLanes, kTileBytes);
    tiles.template store<2>(scores + 2 * kLanes * kLanes, kTileBytes);
    tiles.template store<3>(scores + 3 * kLanes * kLanes, kTileBytes);
  }
}

// Of two neighbouring groups: each load serves two dots.
template <typename Tiles>
void score_groups(Tiles& tiles, const Work& work, int64_t group, const KeyRows* keys) {
  const uint16_t* one = work.query + group * kLanes * work.head_dim;
  const uint16_t* two = one + kLanes * work.head_dim;
  for (int64_t part = 0; part < kParts; part += 2) {
    tiles.template zero<0>();
    tiles.template zero<1>();
    tiles.template zero<2>();
    tiles.template zero<3>();
    for (int64_t i = 0; i < work.head_dim; i += kStep) {
      tiles.template load<4>(keys[part].first + i, keys[part].stride);
      tiles.template load<6>(one + i * kLanes, kTileBytes);
      tiles.template dot<0, 4, 6>();
      tiles.template load<7>(two + i * kLanes, kTileBytes);
      tiles.template dot<1, 4, 7>();
      tiles.template load<5>(keys[part + 1].first + i, keys[part + 1].stride);
      tiles.template dot<2, 5, 6>();
      tiles.template dot<3, 5, 7>();
    }
    float* scores = work.scores + part * kLanes * kLanes;
    tiles.template store<0>(scores, kTileBytes);
    tiles.template store<2>(scores + kLanes * kLanes, kTileBytes);
    tiles.template store<1>(scores + kKeys * kLanes, kTileBytes);
    tiles.template store<3>(scores + (kKeys + kLanes) * kLanes, kTileBytes);
  }
}

// Scores lie keys by rows; the rules take one row at a time.
void adjust_group(const Work& work, int64_t group, int64_t begin, int64_t num_keys, float* scores) {
  alignas(64) float by_row[kLanes][kKeys];
  for (int64_t part = 0; part < kParts; ++part) {
    __m512 block[kLanes];
    for (int64_t t = 0; t < kLanes; ++t) {
      block[t] = _mm512_load_ps(scores + (part * kLanes + t) * kLanes);
    }
    transpose_16x16(block);
    for (int64_t n = 0; n < kLanes; ++n) _mm512_store_ps(by_row[n] + part * kLanes, block[n]);
  }
  for (int64_t n = 0; n < kLanes && group * kLanes + n < work.count; ++n) {
    adjust_scores(*work.tile, work.tile->row_begin + group * kLanes + n, 0, begin, num_keys,
                  by_row[n]);
  }
  for (int64_t part = 0; part < kParts; ++part) {
    __m512 block[kLanes];
    for (int64_t n = 0; n < kLanes; ++n) block[n] = _mm512_load_ps(by_row[n] + part * kLanes);
    transpose_16x16(block);
    for (int64_t t = 0; t < kLanes; ++t) {
      _mm512_store_ps(scores + (part * kLanes + t) * kLanes, block[t]);
    }
  }
}

// Which lanes' rows see a key. kIsMasked is false where all see all, to the same bits.
template <bool kIsMasked>
struct Seen {
  __m512i first, last;

  __mmask16 at(int64_t key) const {
    if constexpr (!kIsMasked) return 0xffff;
    const __m512i keys = _mm512_set1_epi32(static_cast<int32_t>(key));
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(keys, first), keys, last);
  }
};

// Turns the scores of a group's rows with the keys from `begin` on into weights, and the running
// maxima and sums with them; scales what was summed up before.
template <bool kIsMasked>
void weigh_group(Work& work, int64_t group, int64_t begin, const float* scores, uint16_t* weights) {
  const int64_t row = group * kLanes;
  const Seen<kIsMasked> seen = {_mm512_load_si512(work.first + row),
                                _mm512_load_si512(work.last + row)};
  const __m512 scales = _mm512_set1_ps(work.scale), lowest = _mm512_set1_ps(-infinity());
  __m512 top[4] = {lowest, lowest, lowest, lowest};
  for (int64_t t = 0; t < kKeys; t += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 score = _mm512_load_ps(scores + (t + i) * kLanes);
      top[i] =
          _mm512_max_ps(top[i], _mm512_mask_mul_ps(lowest, seen.at(begin + t + i), score, scales));
    }
  }
  const __m512 old_max = _mm512_load_ps(work.max + row);
  const __m512 new_max = _mm512_max_ps(
      old_max, _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
  _mm512_store_ps(work.max + row, new_max);
  // Where every score is minus infinity so far, the weights must come out as 0, not as NaN.
  const __m512 base =
      _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(new_max, lowest, _CMP_NEQ_UQ), new_max);
  const __m512 decay = exp2_lanes(_mm512_sub_ps(old_max, base));
  __m512 sums[4] = {_mm512_mul_ps(_mm512_load_ps(work.sum + row), decay)};
  sums[1] = sums[2] = sums[3] = _mm512_setzero_ps();
  for (int64_t half = 0; half < kHalves; ++half) {
    __m512 pairs[kLanes];
#pragma GCC unroll 16
    for (int64_t j = 0; j < kLanes; ++j) {
      const int64_t key = half * kStep + 2 * j;
      const __m512 even = _mm512_load_ps(scores + key * kLanes);
      const __m512 odd = _mm512_load_ps(scores + (key + 1) * kLanes);
      const __m512 a = _mm512_maskz_mov_ps(seen.at(begin + key),
                                           exp2_lanes(_mm512_fmsub_ps(even, scales, base)));
      const __m512 b = _mm512_maskz_mov_ps(seen.at(begin + key + 1),
                                           exp2_lanes(_mm512_fmsub_ps(odd, scales, base)));
      sums[j % 2 * 2] = _mm512_add_ps(sums[j % 2 * 2], a);
      sums[j % 2 * 2 + 1] = _mm512_add_ps(sums[j % 2 * 2 + 1], b);
      pairs[j] = round_pairs(a, b);
    }
    transpose_16x16(pairs);
    for (int64_t n = 0; n < kLanes; ++n) {
      _mm512_store_ps(weights + (half * kLanes + n) * kStep, pairs[n]);
    }
  }
  _mm512_store_ps(work.sum + row,
                  _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
  if (_mm512_cmp_ps_mask(decay, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) return;
  alignas(64) float factors[kLanes];
  _mm512_store_ps(factors, decay);
  float* out = work.out + row * work.value_dim;
  for (int64_t n = 0; n < kLanes; ++n) {
    const __m512 factor = _mm512_set1_ps(factors[n]);
    for (int64_t i = 0; i < work.value_dim; i += kLanes) {
      float* lanes = out + i * kLanes + n * kLanes;
      _mm512_store_ps(lanes, _mm512_mul_ps(_mm512_load_ps(lanes), factor));
    }
  }
}

// ---- values --------------------------------------------------------------------------------

// Adds the values, by the weights of kGroups neighbouring groups, to their rows.
template <int kGroups, typename Tiles>
void add_values(Tiles& tiles, const Work& work, int64_t group) {
  constexpr int64_t kTileSize = kLanes * kLanes;         // of floats
  constexpr int64_t kHalfSize = kLanes * kStep;          // of weights, or values
  constexpr int64_t kWeightsSize = kHalves * kHalfSize;  // of a group
  const int64_t out_size = kLanes * work.value_dim;      // of a group
  float* out = work.out + group * out_size;
  const uint16_t* values = work.values;
  for (int64_t i = 0; i < work.value_dim; i += 2 * kLanes) {
    tiles.template load<0>(out, kTileBytes);
    tiles.template load<1>(out + kTileSize, kTileBytes);
    if constexpr (kGroups == 2) {
      tiles.template load<2>(out + out_size, kTileBytes);
      tiles.template load<3>(out + out_size + kTileSize, kTileBytes);
    }
    for (int64_t half = 0; half < kHalves; ++half) {
      const uint16_t* weights = work.weights + half * kHalfSize;
      tiles.template load<4>(weights, kTileBytes);
      tiles.template load<6>(values + half * kHalfSize, kTileBytes);
      tiles.template dot<0, 4, 6>();
      tiles.template load<7>(values + kWeightsSize + half * kHalfSize, kTileBytes);
      tiles.template dot<1, 4, 7>();
      if constexpr (kGroups == 2) {
        tiles.template load<5>(weights + kWeightsSize, kTileBytes);
        tiles.template dot<2, 5, 6>();
        tiles.template dot<3, 5, 7>();
      }
    }
    tiles.template store<0>(out, kTileBytes);
    tiles.template store<1>(out + kTileSize, kTileBytes);
    if constexpr (kGroups == 2) {
      tiles.template store<2>(out + out_size, kTileBytes);
      tiles.template store<3>(out + out_size + kTileSize, kTileBytes);
    }
    out += 2 * kTileSize;
    values += 2 * kWeightsSize;
  }
}

// ---- the whole -----------------------------------------------------------------------------

// kGroups neighbouring groups against a tile of keys.
template <int kGroups, typename Tiles>
void attend_groups(Tiles& tiles, Work& work, int64_t group, int64_t begin, int64_t end,
                   const KeyRows* keys) {
  if constexpr (kGroups == 2) {
    score_groups(tiles, work, group, keys);
  } else {
    score_group(tiles, work, group, keys);
  }
  for (int64_t i = 0; i < kGroups; ++i) {
    float* scores = work.scores + i * kKeys * kLanes;
    if (work.adjusts) adjust_group(work, group + i, begin, end - begin, scores);
    // Ranges only move up from row to row, so the first and the last row bound them.
    const int64_t row = (group + i) * kLanes;
    const bool is_masked = work.first[row + kLanes - 1] > begin || work.last[row] < begin + kKeys;
    const auto weigh = is_masked ? weigh_group<true> : weigh_group<false>;
    weigh(work, group + i, begin, scores, work.weights + i * kKeys * kLanes);
  }
  add_values<kGroups>(tiles, work, group);
}

void finish(const Work& work, const TileResult& result) {
  const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (int64_t row = 0; row < work.count; ++row) {
    const float* tile = work.out + row / kLanes * kLanes * work.value_dim + row % kLanes * kLanes;
    float* target = result.out + row * work.value_dim;
    for (int64_t i = 0; i < work.value_dim; i += 2 * kLanes, tile += 2 * kLanes * kLanes) {
      const __m512d a = _mm512_castps_pd(_mm512_load_ps(tile));
      const __m512d b = _mm512_castps_pd(_mm512_load_ps(tile + kLanes * kLanes));
      _mm512_storeu_ps(target + i, _mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b)));
      _mm512_storeu_ps(target + i + kLanes, _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b)));
    }
    result.max[row] = work.max[row];
    result.sum[row] = work.sum[row];
  }
}

template <typename Tiles>
void attend_head(Tiles& tiles, const AttentionTile& tile, const TileResult& result) {
  Work work;
  start(tile, work);
  if (work.num_groups == 1) work.next = plan_reading(tile, kKeys);
  const int64_t tile_bytes =
      kKeys * (work.head_dim + work.value_dim) * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t first = tile.key_begin / kKeys * kKeys;
  for (int64_t begin = first, end; begin < tile.key_end; begin = end) {
    end = end_of_keys(tile, begin);
    // Groups before the first end, and groups from the last on begin, outside these keys.
    int64_t group = 0, last = work.num_groups;
    while (group < last && work.last[group * kLanes + kLanes - 1] <= begin) ++group;
    while (last > group && work.first[(last - 1) * kLanes] >= end) --last;
    if (group == last) continue;
    KeyRows keys[kParts];
    work.next.begin(tile_bytes);
    load_tile(tile, begin, end, keys, work);
    for (; group + 2 <= last; group += 2) attend_groups<2>(tiles, work, group, begin, end, keys);
    if (group < last) attend_groups<1>(tiles, work, group, begin, end, keys);
  }
  finish(work, result);
}

bool may_hold_codes(const PagedAttentionArgs& args) {
  return args.int8.num_blocks > 0 || args.int4.num_blocks > 0 || args.cache_dtype != args.dtype;
}

template <typename Tiles>
void attend(const AttentionTile& tile, const TileResult* results) {
  const int64_t num_rows = tile.row_end - tile.row_begin;
  const int64_t few = may_hold_codes(*tile.args) ? kFewRows : kFewRowsBesideTiles;
  if (num_rows <= few && !tile.args->batch_invariant) {
    avx512_kernel(DType::kBFloat16, {tile.args->head_dim, tile.args->value_dim})
        ->attend(tile, results);
    return;
  }
  Tiles tiles;  // configures the registers, and releases them at the end
  for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
    AttentionTile one = tile;
    one.kv_head += head;
    one.num_kv_heads = 1;
    attend_head(tiles, one, results[head]);
  }
}

template <typename Tiles>
const AttentionKernel* tile_kernel(DType dtype, HeadDims dims) {
  if (dtype != DType::kBFloat16 || !dims.are_multiples_of(kStep)) return nullptr;
  static const AttentionKernel* const rows = avx512_kernel(dtype, dims);
  static const AttentionKernel kernel = {kTileRows, kFewRows, attend<Tiles>, rows->narrow,
                                         rows->widen};
  return &kernel;
}

}  // namespace
}  // namespace kvkernels
