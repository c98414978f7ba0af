// Attention in plain C++ for any processor and any head_dim. Loops are laid out so that a compiler
// turns them into vectors of whatever width it may use.
#include <cstring>
#include <limits>

#include "cpu/attention_kernel.h"
#include "cpu/float_bits.h"

namespace kvkernels {
namespace {

constexpr int64_t kTileRows = 32, kTileKeys = 32;
// Sums over head_dim are begun anew after this many products and added up at the end: rounding
// errors grow with the length of a sum.
constexpr int64_t kSumLength = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

float to_float(float value) { return value; }

float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  if (value.bits & 0x7c00) {
    const bool is_special = (value.bits & 0x7c00) == 0x7c00;  // infinity or not a number
    return float_from_bits(sign |
                           (magnitude + (is_special ? (255u - 31) << 23 : (127u - 15) << 23)));
  }
  // Subnormal: as the low bits of a number whose unit in the last place is 2^-24, less its base.
  const float base = float_from_bits((127u - 14) << 23);
  return float_from_bits(sign |
                         bits_from_float(float_from_bits(((127u - 14) << 23) + magnitude) - base));
}

void from_float(float value, float& out) { out = value; }

void from_float(float value, BFloat16& out) { out.bits = bfloat16_from_float(value); }

void from_float(float value, Float16& out) {
  const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds past the largest finite value, 65504
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the adder rounds to a multiple of 2^-24
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
  } else {
    half = (magnitude - ((127u - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000));
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
  float* query;  // [kTileRows, head_dim]
  float* key;    // [head_dim, kTileKeys]: transposed, so that the dot products run side by side
  float* value;  // [kTileKeys, head_dim]
};

template <typename T>
void load_keys(const AttentionTile& tile, int64_t begin, int64_t end, const Tiles& tiles) {
  const int64_t head_dim = tile.args->head_dim;
  int64_t key_offsets[kTileKeys], value_offsets[kTileKeys];
  find_rows(tile, begin, end, key_offsets, value_offsets);
  const T* keys = static_cast<const T*>(tile.args->key_cache);
  const T* values = static_cast<const T*>(tile.args->value_cache);
  for (int64_t token = 0; token < end - begin; ++token) {
    const T* key = keys + key_offsets[token];
    for (int64_t i = 0; i < head_dim; ++i) tiles.key[i * kTileKeys + token] = to_float(key[i]);
    widen<T>(values + value_offsets[token], tiles.value + token * head_dim, head_dim);
  }
}

// Adds the keys of one tile to one row's result. Columns [first, last) are those the row sees;
// those outside may hold anything.
void attend_row(const float* query, const Tiles& tiles, int64_t head_dim, float scale,
                int64_t first, int64_t last, float* out, float& max, float& sum) {
  float scores[kTileKeys] = {};
  for (int64_t begin = 0; begin < head_dim; begin += kSumLength) {
    float sums[kTileKeys] = {};
    const int64_t end = begin + kSumLength < head_dim ? begin + kSumLength : head_dim;
    for (int64_t i = begin; i < end; ++i) {
      const float* key = tiles.key + i * kTileKeys;
      for (int64_t t = 0; t < kTileKeys; ++t) sums[t] += query[i] * key[t];
    }
    for (int64_t t = 0; t < kTileKeys; ++t) scores[t] += sums[t];
  }
  float new_max = max;
  for (int64_t t = first; t < last; ++t) {
    scores[t] *= scale;
    if (scores[t] > new_max) new_max = scores[t];
  }
  // Where every score is minus infinity so far, the weights must come out as 0, not as NaN.
  const float base = new_max == -kInfinity ? 0.0f : new_max;
  const float decay = exp2_scalar(max - base);
  for (int64_t i = 0; i < head_dim; ++i) out[i] *= decay;
  sum *= decay;
  for (int64_t t = 0; t < kTileKeys; ++t) scores[t] = exp2_scalar(scores[t] - base);
  for (int64_t t = first; t < last; ++t) {
    sum += scores[t];
    const float* value = tiles.value + t * head_dim;
    for (int64_t i = 0; i < head_dim; ++i) out[i] += scores[t] * value[i];
  }
  max = new_max;
}

template <typename T>
void attend(const AttentionTile& tile, const TileResult* results) {
  const TileResult& result = results[0];
  const int64_t head_dim = tile.args->head_dim, num_rows = tile.row_end - tile.row_begin;
  float* scratch = thread_scratch(1, (kTileRows + 2 * kTileKeys) * head_dim);
  const Tiles tiles = {scratch, scratch + kTileRows * head_dim,
                       scratch + (kTileRows + kTileKeys) * head_dim};
  // Columns past the tile's last key take part in the dot products, and must not trap there.
  std::memset(tiles.key, 0, kTileKeys * head_dim * sizeof(float));
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t offset = query_offset(tile, tile.row_begin + row);
    widen<T>(static_cast<const T*>(tile.args->query) + offset, tiles.query + row * head_dim,
             head_dim);
    std::memset(result.out + row * head_dim, 0, head_dim * sizeof(float));
    result.max[row] = -kInfinity;
    result.sum[row] = 0;
  }
  for (int64_t begin = tile.key_begin; begin < tile.key_end; begin += kTileKeys) {
    const int64_t end = begin + kTileKeys < tile.key_end ? begin + kTileKeys : tile.key_end;
    load_keys<T>(tile, begin, end, tiles);
    for (int64_t row = 0; row < num_rows; ++row) {
      const KeyRange range = visible_keys(tile, tile.row_begin + row);
      const int64_t first = range.begin > begin ? range.begin - begin : 0;
      const int64_t last = (range.end < end ? range.end : end) - begin;
      if (first >= last) continue;
      attend_row(tiles.query + row * head_dim, tiles, head_dim, tile.args->sm_scale * kLog2E, first,
                 last, result.out + row * head_dim, result.max[row], result.sum[row]);
    }
  }
}

template <typename T>
constexpr AttentionKernel kKernel = {kTileRows, 0, attend<T>, narrow<T>, widen<T>};

}  // namespace

const AttentionKernel* portable_kernel(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return &kKernel<float>;
    case DType::kFloat16:
      return &kKernel<Float16>;
    case DType::kBFloat16:
      break;
  }
  return &kKernel<BFloat16>;
}

}  // namespace kvkernels
