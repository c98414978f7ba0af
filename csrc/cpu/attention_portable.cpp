// Attention in plain C++ for any processor and any head_dim. Loops are written so that a compiler
// turns them into vectors of whatever width the processor has.
#include <bit>
#include <cstring>

#include "cpu/attention_scores.h"
#include "cpu/attention_unpack_portable.h"

namespace kvkernels {
namespace {

constexpr int64_t kTileRows = 32, kTileKeys = 32;
// A sum over head_dim is cut into parts of this many products, added up at the end: rounding errors
// grow with the length of a sum.
constexpr int64_t kSumLength = 16;

void merge(float* out, float weight, const float* added, float added_weight, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = weight * out[i] + added_weight * added[i];
}

bool are_finite(const float* in, int64_t size) {
  uint32_t found = 0;  // x - x is 0 for a finite x, and NaN for any other
  for (int64_t i = 0; i < size; ++i) found |= std::bit_cast<uint32_t>(in[i] - in[i]);
  return found == 0;
}

template <typename T>
void widen(const void* in, float* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = to_float(static_cast<const T*>(in)[i]);
}

template <typename T>
void narrow(const float* in, float scale, void* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) from_float(in[i] * scale, static_cast<T*>(out)[i]);
}

// Scratch of one tile.
struct Tiles {
  float* query;   // [kTileRows, head_dim]
  float* key;     // [head_dim, kTileKeys]: transposed, so that the dot products run side by side
  float* value;   // [kTileKeys, value_dim]
  float* rows;    // [kTileKeys, head_dim]: unpacked keys
  float* scales;  // two rows: scales and minimums being unpacked
};

struct FloatWriter {
  using Item = float;
  static float narrow(float value) { return value; }
};
using Unpacker = PortableUnpacker<FloatWriter>;

// Fills columns [first, count) of a tile of keys: target[i][token].
template <typename T>
void transpose_keys(const T* keys, const int64_t* offsets, int64_t first, int64_t count,
                    int64_t head_dim, float* target) {
  for (int64_t token = first; token < count; ++token) {
    const T* key = keys + offsets[token];
    for (int64_t i = 0; i < head_dim; ++i) target[i * kTileKeys + token] = to_float(key[i]);
  }
}

// Loads the tile of keys [begin, end), as far as they belong to the item: a key has the same column
// in every call.
template <typename T>
void load_keys(const AttentionTile& tile, int64_t begin, int64_t end, const Tiles& tiles) {
  const int64_t head_dim = tile.args->head_dim, value_dim = tile.args->value_dim;
  int64_t key_offsets[kTileKeys], value_offsets[kTileKeys];
  const int64_t count = end - begin, first = std::max<int64_t>(tile.key_begin - begin, 0);
  if (lies_plain(tile, begin + first, end)) {
    find_rows(tile, begin + first, end, key_offsets + first, value_offsets + first);
    const T* values = static_cast<const T*>(tile.args->value_cache);
    transpose_keys(static_cast<const T*>(tile.args->key_cache), key_offsets, first, count, head_dim,
                   tiles.key);
    for (int64_t token = first; token < count; ++token) {
      widen<T>(values + value_offsets[token], tiles.value + token * value_dim, value_dim);
    }
    return;
  }
  unpack_keys<Unpacker>(tile, 0, begin + first, end, tiles.scales, tiles.rows + first * head_dim);
  for (int64_t token = first; token < count; ++token) key_offsets[token] = token * head_dim;
  transpose_keys<float>(tiles.rows, key_offsets, first, count, head_dim, tiles.key);
  unpack_values<Unpacker>(tile, 0, begin + first, end, tiles.scales,
                          tiles.value + first * value_dim);
}

// scores[t] = query * key t
void score_row(const float* query, const Tiles& tiles, int64_t head_dim, float* scores) {
  std::memset(scores, 0, kTileKeys * sizeof(float));
  for (int64_t begin = 0; begin < head_dim; begin += kSumLength) {
    float sums[kTileKeys] = {};
    const int64_t end = begin + kSumLength < head_dim ? begin + kSumLength : head_dim;
    for (int64_t i = begin; i < end; ++i) {
      const float* key = tiles.key + i * kTileKeys;
      for (int64_t t = 0; t < kTileKeys; ++t) sums[t] += query[i] * key[t];
    }
    for (int64_t t = 0; t < kTileKeys; ++t) scores[t] += sums[t];
  }
}

// Adds the values of one tile of keys to one row's result, weighted by its scores. The row sees
// columns [first, last); scores outside may be anything.
void add_row(float* scores, const Tiles& tiles, int64_t value_dim, float scale, int64_t first,
             int64_t last, float* out, float& max, float& sum) {
  float new_max = max;
  for (int64_t t = first; t < last; ++t) {
    scores[t] *= scale;
    if (scores[t] > new_max) new_max = scores[t];
  }
  // If every score so far is minus infinity, the weights must come out as 0, not as NaN.
  const float base = new_max == -kInfinity ? 0.0f : new_max;
  const float decay = exp2_scalar(max - base);
  for (int64_t i = 0; i < value_dim; ++i) out[i] *= decay;
  sum *= decay;
  for (int64_t t = 0; t < kTileKeys; ++t) scores[t] = exp2_scalar(scores[t] - base);
  for (int64_t t = first; t < last; ++t) {
    sum += scores[t];
    const float* value = tiles.value + t * value_dim;
    for (int64_t i = 0; i < value_dim; ++i) out[i] += scores[t] * value[i];
  }
  max = new_max;
}

template <typename T>
void attend(const AttentionTile& tile, const TileResult* results) {
  const TileResult& result = results[0];
  const PagedAttentionArgs& args = *tile.args;
  const int64_t head_dim = args.head_dim, value_dim = args.value_dim;
  const int64_t num_rows = tile.row_end - tile.row_begin;
  const int64_t wide_dim = head_dim > value_dim ? head_dim : value_dim;
  float* scratch = thread_scratch(
      1, (kTileRows + 2 * kTileKeys) * head_dim + kTileKeys * value_dim + 2 * wide_dim);
  Tiles tiles;
  tiles.query = scratch;
  tiles.key = tiles.query + kTileRows * head_dim;
  tiles.rows = tiles.key + kTileKeys * head_dim;
  tiles.value = tiles.rows + kTileKeys * head_dim;
  tiles.scales = tiles.value + kTileKeys * value_dim;
  // Columns without a key of the tile take part in the dot products, and must hold numbers.
  std::memset(tiles.key, 0, kTileKeys * head_dim * sizeof(float));
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t offset = query_offset(tile, tile.row_begin + row);
    widen<T>(static_cast<const T*>(args.query) + offset, tiles.query + row * head_dim, head_dim);
    std::memset(result.out + row * value_dim, 0, value_dim * sizeof(float));
    result.max[row] = -kInfinity;
    result.sum[row] = 0;
  }
  const bool adjusts = adjusts_scores(args);
  const int64_t first_begin = tile.key_begin / kTileKeys * kTileKeys;
  for (int64_t begin = first_begin; begin < tile.key_end; begin += kTileKeys) {
    const int64_t end = key_tile_end(tile, begin, kTileKeys);
    load_keys<T>(tile, begin, end, tiles);
    for (int64_t row = 0; row < num_rows; ++row) {
      const KeyRange range = visible_keys(tile, tile.row_begin + row);
      const int64_t first = range.begin > begin ? range.begin - begin : 0;
      const int64_t last = (range.end < end ? range.end : end) - begin;
      if (first >= last) continue;
      float scores[kTileKeys];
      score_row(tiles.query + row * head_dim, tiles, head_dim, scores);
      if (adjusts) adjust_scores(tile, tile.row_begin + row, 0, begin, end - begin, scores);
      add_row(scores, tiles, value_dim, adjusts ? 1.0f : args.sm_scale * kLog2E, first, last,
              result.out + row * value_dim, result.max[row], result.sum[row]);
    }
  }
}

template <typename T>
constexpr AttentionKernel kKernel = {kTileRows, 0,        attend<T>, narrow<T>,
                                     merge,     widen<T>, are_finite};

}  // namespace

const AttentionKernel* portable_kernel(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return &kKernel<float>;
    case DType::kFloat16:
      return &kKernel<Float16>;
    default:
      return &kKernel<BFloat16>;
  }
}

}  // namespace kvkernels
