// The data that the matrix-tile attention (attention_amx_kernel.h) works on. In an anonymous
// namespace, as are all of its parts.
#pragma once

#include <cstring>

#include "cpu/attention_avx512.h"
#include "cpu/attention_scores.h"
#include "cpu/attention_spans.h"

namespace kvkernels {
namespace {

// Keys per step. The output is read and written once per step, which takes longer than the products
// if the keys are few: with half as many, prompts of 2k and 8k tokens took a tenth longer.
constexpr int64_t kKeys = 128;
constexpr int64_t kLanes = 16;      // query rows of a tile, side by side
constexpr int64_t kTileRows = 128;  // query rows that share the interleaved values
constexpr int64_t kStep = 32;       // channels, or keys, that one dot sums over
constexpr int64_t kTileBytes = 64;  // of a row of a tile register
constexpr int64_t kParts = kKeys / kLanes, kHalves = kKeys / kStep;

// Up to this many rows the AVX-512 kernel, which reads each element once and uses no tiles, is as
// fast as memory, or faster than this one: a tile always has 16 rows.
constexpr int64_t kFewRowsBesideTiles = 4;

// From this many rows on 4-bit codes are faster on tiles of bytes, where four rows take as long as
// one.
constexpr int64_t kLeastCodeRows = 4;

// One item's query rows, in groups of kLanes, and the tile of keys that is being worked on. `out`
// lies in tiles; of 32 neighbouring channels the first tile holds those at 0 to 3 of every 8, the
// second the others: the order that the cheapest unpacking of pairs gives.
struct Work {
  const AttentionTile* tile;
  int64_t count, num_groups, head_dim, value_dim;
  int64_t num_sets;  // of lanes: 1 or 2, see attention_amx_softmax.h
  bool adjusts;      // whether scores need more than a factor
  float scale;
  uint16_t* query;     // [num_groups, head_dim / 32, 16, kLanes, 2]
  uint16_t* keys;      // [kKeys, head_dim]: copies of keys that do not lie in one block
  uint16_t* values;    // [value_dim / 16, kKeys / 2, 16, 2]
  uint16_t* unpacked;  // [kKeys, value_dim]
  uint16_t* zeros;     // [value_dim]: the value of a missing key
  uint16_t* weights;   // [2 groups, kHalves, kLanes, kStep]
  float* scores;       // [2, kKeys, kLanes]
  float* out;          // [num_groups, value_dim / 16, kLanes, 16]
  float* scales;       // two rows: scales and minimums being unpacked
  alignas(64) float max[kTileRows], sum[kTileRows];
  alignas(64) int32_t first[kTileRows], last[kTileRows];  // the keys [first, last) that a row sees
};

void start_group(const AttentionTile& tile, int64_t group, Work& work) {
  const int64_t first_row = group * kLanes, set_lanes = kLanes / work.num_sets;
  const uint16_t* sources[kLanes];
  for (int64_t n = 0; n < kLanes; ++n) {
    const int64_t lane = first_row + n, row = first_row + n % set_lanes;
    // Rows past the last are zeros that see what the last row sees.
    const int64_t real = std::min(row, work.count - 1);
    sources[n] = row < work.count ? read_query<uint16_t>(tile, tile.row_begin + row) : nullptr;
    const KeyRange seen = visible_keys(tile, tile.row_begin + real);
    const int64_t first_key = n / set_lanes * (kKeys / work.num_sets);  // of the lane's set of keys
    work.first[lane] = static_cast<int32_t>(seen.begin - first_key);
    work.last[lane] = static_cast<int32_t>(seen.end - first_key);
    work.max[lane] = -kInfinity;
    work.sum[lane] = 0;
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
  // With two sets, the order in which a row's weights are summed depends on the number of rows.
  work.num_sets = work.count <= kLanes / 2 && !tile.args->batch_invariant ? 2 : 1;
  work.head_dim = tile.args->head_dim;
  work.value_dim = tile.args->value_dim;
  work.adjusts = adjusts_scores(*tile.args);
  work.scale = work.adjusts ? 1.0f : tile.args->sm_scale * kLog2E;
  const int64_t num_rows = work.num_groups * kLanes;
  const int64_t query_size = num_rows * work.head_dim, out_size = num_rows * work.value_dim;
  const int64_t key_size = kKeys * work.head_dim, value_size = kKeys * work.value_dim;
  const int64_t score_size = 2 * kKeys * kLanes;
  const int64_t num_halves = query_size + key_size + 2 * value_size + work.value_dim + score_size;
  const int64_t scales_size = 2 * std::max(work.head_dim, work.value_dim);
  work.scores = thread_scratch(1, num_halves / 2 + score_size + out_size + scales_size);
  work.out = work.scores + score_size;
  work.scales = work.out + out_size;
  work.query = reinterpret_cast<uint16_t*>(work.scales + scales_size);
  work.keys = work.query + query_size;
  work.values = work.keys + key_size;
  work.unpacked = work.values + value_size;
  work.zeros = work.unpacked + value_size;
  work.weights = work.zeros + work.value_dim;
  std::memset(work.zeros, 0, (work.value_dim + score_size) * sizeof(uint16_t));
  for (int64_t group = 0; group < work.num_groups; ++group) start_group(tile, group, work);
}

}  // namespace
}  // namespace kvkernels
