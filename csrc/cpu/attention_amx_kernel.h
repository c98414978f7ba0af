// Attention for bfloat16 on 16-row matrix tiles, with AVX-512 for all that is not a product.
// Written against a small interface (Tiles) so that one text serves the AMX instructions and their
// emulation. Only for files compiled for AVX512-BF16. In an anonymous namespace: each file that
// includes this gets its own copy, compiled with that file's flags.
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

#include "cpu/attention_amx_few_rows.h"
#include "cpu/attention_amx_keys.h"
#include "cpu/attention_amx_softmax.h"
#include "cpu/attention_amx_work.h"

namespace kvkernels {
namespace {

// ---- scores --------------------------------------------------------------------------------

// Scores one group of 16 rows: all dots share its tile of the query.
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

// Scores two neighbouring groups: each load serves two dots.
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

// ---- values --------------------------------------------------------------------------------

// Adds the values, by the weights of kGroups neighbouring groups, to those groups' rows.
template <int kGroups, typename Tiles>
void add_values(Tiles& tiles, const Work& work, int64_t group) {
  constexpr int64_t kTileSize = kLanes * kLanes;         // of floats
  constexpr int64_t kHalfSize = kLanes * kStep;          // of weights, or of values
  constexpr int64_t kWeightsSize = kHalves * kHalfSize;  // of one group
  const int64_t out_size = kLanes * work.value_dim;      // of one group
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

// Attends kGroups neighbouring groups to a tile of keys.
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
    for (int64_t set = 1; set < work.num_sets; ++set) {
      result.sum[row] += work.sum[row + set * (kLanes / work.num_sets)];
    }
  }
}

template <typename Tiles>
void attend_head(Tiles& tiles, const AttentionTile& tile, Prefetch& next, int64_t tile_bytes,
                 const TileResult& result) {
  Work work;
  start(tile, work);
  const int64_t first = tile.key_begin / kKeys * kKeys;
  for (int64_t begin = first, end; begin < tile.key_end; begin = end) {
    end = key_tile_end(tile, begin, kKeys);
    // Groups before `group` see only keys before these, groups from `last` on only keys after them.
    int64_t group = 0, last = work.num_groups;
    if (last > 1) {
      while (group < last && work.last[group * kLanes + kLanes - 1] <= begin) ++group;
      while (last > group && work.first[(last - 1) * kLanes] >= end) --last;
      if (group == last) continue;
    }
    KeyRows keys[kParts];
    ValueRows values;
    next.begin(tile_bytes);
    find_tile(tile, begin, end, work, keys, values);
    if (work.num_groups == 1) {
      attend_few_rows(tiles, work, begin, end, keys, values, next);
      continue;
    }
    interleave_values(values, work);
    const int64_t next_bytes = share_of_bytes(tile_bytes, (last - group + 1) / 2);
    for (; group + 2 <= last; group += 2) {
      attend_groups<2>(tiles, work, group, begin, end, keys);
      next.advance(next_bytes);
    }
    if (group < last) attend_groups<1>(tiles, work, group, begin, end, keys);
  }
  finish(work, result);
}

// Whether keys and values may have to be unpacked: from codes, or from a cache of another dtype.
bool may_need_unpacking(const PagedAttentionArgs& args) {
  return args.int8.num_blocks > 0 || args.int4.num_blocks > 0 || args.cache_dtype != args.dtype;
}

template <typename Tiles, auto kAttendCodes>
void attend(const AttentionTile& tile, const TileResult* results) {
  const int64_t num_rows = tile.row_end - tile.row_begin;
  const bool needs_unpacking = may_need_unpacking(*tile.args);
  const int64_t few = needs_unpacking ? kFewRows : kFewRowsBesideTiles;
  if (num_rows <= few && !tile.args->batch_invariant) {
    if (needs_unpacking && num_rows >= kLeastCodeRows) return kAttendCodes(tile, results);
    avx512_kernel(DType::kBFloat16, {tile.args->head_dim, tile.args->value_dim})
        ->attend(tile, results);
    return;
  }
  Tiles tiles;  // configures the registers, and releases them at the end
  Prefetch next;
  const int64_t tile_bytes = plan_reading(tile, kKeys, next);
  next.set_lead(tile_bytes);
  for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
    AttentionTile one = tile;
    one.kv_head += head;
    one.num_kv_heads = 1;
    attend_head(tiles, one, next, tile_bytes, results[head]);
  }
}

template <typename Tiles, auto kAttendCodes>
const AttentionKernel* tile_kernel(DType dtype, HeadDims dims) {
  if (dtype != DType::kBFloat16 || !dims.are_multiples_of(kStep)) return nullptr;
  static const AttentionKernel* const rows = avx512_kernel(dtype, dims);
  static const AttentionKernel kernel = {kTileRows,       kFewRows,    attend<Tiles, kAttendCodes>,
                                         rows->narrow,    rows->merge, rows->widen,
                                         rows->are_finite};
  return &kernel;
}

}  // namespace
}  // namespace kvkernels
