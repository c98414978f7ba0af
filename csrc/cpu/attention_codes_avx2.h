// Products of few query rows with quantised keys and values, with AVX2, that never become floats of
// their own: an element is minimum + scale * code, so
//   query * key = query * minimums + (query * scales) * codes
// where tokens share their scales, and likewise for weights and values where channels do. Codes
// then cost no more to widen than bfloat16.
#pragma once

#include "cpu/attention_products_avx2.h"
#include "cpu/attention_unpack_avx2.h"

namespace kvkernels {
namespace {

// Codes as element types. Those of 4 bits are two rows of half the channels in the same bytes.
struct Codes8 {
  using Item = uint8_t;
  static __m256 widen(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)); }
  static __m256 load(const Item* p) {
    return widen(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
};
struct LowNibbles {
  using Item = uint8_t;
  static __m256 load(const Item* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return Codes8::widen(_mm_and_si128(bytes, _mm_set1_epi8(15)));
  }
};
struct HighNibbles {
  using Item = uint8_t;
  static __m256 load(const Item* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return Codes8::widen(_mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15)));
  }
};

// Whether all blocks of [begin, end) hold codes of one kind, in a shape whose groups are whole
// vectors. Not for float32: the two terms are larger than their sum, which costs the last bits.
inline bool suits_codes(const AttentionTile& tile, int64_t begin, int64_t end) {
  const PagedAttentionArgs& args = *tile.args;
  const BlockKind kind = block_entry(tile.blocks[begin / args.block_size]).kind;
  if (kind == BlockKind::kFloat || args.dtype == DType::kFloat32) return false;
  for (int64_t i = begin / args.block_size; i * args.block_size < end; ++i) {
    if (block_entry(tile.blocks[i]).kind != kind) return false;
  }
  const QuantizedCache& cache = quantized_cache(args, kind);
  return args.block_size / cache.key_groups % 8 == 0 &&
         code_row_bytes(kind, args.head_dim) % 8 == 0 &&
         args.value_dim / cache.value_groups % 8 == 0 &&
         code_row_bytes(kind, args.value_dim) % 8 == 0;
}

// find_rows for blocks of codes, of one kind.
inline void find_code_rows(const AttentionTile& tile, int64_t begin, int64_t end,
                           int64_t* key_offsets, int64_t* value_offsets) {
  const PagedAttentionArgs& args = *tile.args;
  for_each_run(tile, begin, end, [&](const Run& run) {
    const QuantizedCache& cache = quantized_cache(args, run.block.kind);
    const auto write = [&](const CachePart<uint8_t>& codes, int64_t dim, int64_t* offsets) {
      const int64_t first = run.block.id * codes.block_stride + tile.kv_head * codes.head_stride;
      const int64_t row_bytes = code_row_bytes(run.block.kind, dim);
      for (int64_t t = 0; t < run.count; ++t) {
        offsets[run.first + t] = first + (run.slot + t) * row_bytes;
      }
    };
    write(cache.key_codes, args.head_dim, key_offsets);
    write(cache.value_codes, args.value_dim, value_offsets);
  });
}

// A tile of codes of one kind, for one of the tile's heads.
struct CodeTile {
  const AttentionTile& tile;
  int64_t head, begin, end;
  BlockKind kind;
  const int64_t* offsets;  // of rows of codes, for the first head

  CacheRows<uint8_t> rows(const CachePart<uint8_t>& codes) const {
    return {codes.data + head * codes.head_stride, offsets};
  }
};

// scaled[half][r][i] = query[r][i] * scales[i], biases[r] = query row r * minimums. One half, or
// two for codes of 4 bits.
inline void scale_query(const float* query, int64_t num_rows, int64_t dim, int64_t half_dim,
                        const float* scales, const float* minimums, float* scaled, float* biases) {
  for (int64_t r = 0; r < num_rows; ++r, query += dim) {
    __m256 bias = _mm256_setzero_ps();
    for (int64_t half = 0; half < dim; half += half_dim) {
      float* target = scaled + half * num_rows + r * half_dim;
      for (int64_t i = half; i < half + half_dim; i += 8, target += 8) {
        const __m256 q = _mm256_loadu_ps(query + i);
        _mm256_storeu_ps(target, _mm256_mul_ps(q, _mm256_loadu_ps(scales + i)));
        bias = _mm256_fmadd_ps(q, _mm256_loadu_ps(minimums + i), bias);
      }
    }
    biases[r] = sum_lanes(bias);
  }
}

// scores[r][t] = query row r * key t. `scratch` has room for num_rows + 2 rows.
inline void score_codes(const CodeTile& codes, const float* query, int64_t num_rows, float* scratch,
                        Prefetch& next, float* scores) {
  const PagedAttentionArgs& args = *codes.tile.args;
  const QuantizedCache& cache = quantized_cache(args, codes.kind);
  const Part part = {cache.key_codes, cache.key_scales};
  const int64_t dim = args.head_dim, half_dim = code_row_bytes(codes.kind, dim);
  const int64_t group_size = args.block_size / cache.key_groups;
  float *scales = scratch, *minimums = scales + dim, *scaled = minimums + dim;
  float biases[kFewRows];
  float others[kFewRows * kTileKeys] = {};  // of the high halves
  CacheRows<uint8_t> keys = codes.rows(cache.key_codes);
  for_each_run(codes.tile, codes.begin, codes.end, [&](const Run& run) {
    const uint16_t* pairs = part.scales_of(run.block.id, codes.tile.kv_head + codes.head);
    const int64_t end = run.slot + run.count;
    for (int64_t slot = run.slot, count; slot < end; slot += count) {
      const int64_t group = slot / group_size;
      count = std::min((group + 1) * group_size, end) - slot;
      Avx2Unpacker<Float32>::widen_scales(pairs + 2 * group * dim, dim, scales, minimums);
      scale_query(query, num_rows, dim, half_dim, scales, minimums, scaled, biases);
      // Up to 7 scores past `count` are written: the next group's, which follow, or nobody's.
      if (codes.kind == BlockKind::kInt8) {
        score_all<Codes8>(scaled, num_rows, dim, keys, next, count, scores);
      } else {
        score_all<LowNibbles>(scaled, num_rows, half_dim, keys, next, count, scores);
        score_all<HighNibbles>(scaled + num_rows * half_dim, num_rows, half_dim, keys, next, count,
                               others);
      }
      for (int64_t r = 0; r < num_rows; ++r) {
        float* row = scores + r * kTileKeys;
        for (int64_t t = 0; t < count; ++t) row[t] += others[r * kTileKeys + t] + biases[r];
      }
      keys.offsets += count;
      scores += count;
    }
  });
}

// The scales and minimums of the tile's values, [groups, kTileKeys] each; 0 past the last key.
// `scratch` has room for as much.
inline void find_value_scales(const CodeTile& codes, float* scratch, float* scales,
                              float* minimums) {
  const QuantizedCache& cache = quantized_cache(*codes.tile.args, codes.kind);
  const Part part = {cache.value_codes, cache.value_scales};
  const int64_t groups = cache.value_groups, num_keys = codes.end - codes.begin;
  float* const others = scratch + kTileKeys * groups;
  for_each_run(codes.tile, codes.begin, codes.end, [&](const Run& run) {
    const uint16_t* pairs = part.scales_of(run.block.id, codes.tile.kv_head + codes.head);
    Avx2Unpacker<Float32>::widen_scales(pairs + 2 * run.slot * groups, run.count * groups,
                                        scratch + run.first * groups, others + run.first * groups);
  });
  std::fill(scratch + num_keys * groups, others, 0.0f);
  std::fill_n(others + num_keys * groups, (kTileKeys - num_keys) * groups, 0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t t = 0; t < kTileKeys; ++t) {
      scales[group * kTileKeys + t] = scratch[t * groups + group];
      minimums[group * kTileKeys + t] = others[t * groups + group];
    }
  }
}

// scaled[t] = weights[t] * scales[t]. Returns weights * minimums. All up to the next 8 keys, where
// weights are 0.
inline float scale_weights(const float* weights, int64_t num_keys, const float* scales,
                           const float* minimums, float* scaled) {
  __m256 bias = _mm256_setzero_ps();
  for (int64_t t = 0; t < num_keys; t += 8) {
    const __m256 weight = _mm256_loadu_ps(weights + t);
    _mm256_storeu_ps(scaled + t, _mm256_mul_ps(weight, _mm256_loadu_ps(scales + t)));
    bias = _mm256_fmadd_ps(weight, _mm256_loadu_ps(minimums + t), bias);
  }
  return sum_lanes(bias);
}

// out[r] = out[r] * decay[r] + sum over t of weights[r][t] * value t. `scratch` has room for
// kTileKeys / 2 rows.
inline void add_codes(const CodeTile& codes, const float* weights, int64_t num_rows,
                      const float* decay, float* scratch, Prefetch& next, float* out) {
  const PagedAttentionArgs& args = *codes.tile.args;
  const QuantizedCache& cache = quantized_cache(args, codes.kind);
  const int64_t num_keys = codes.end - codes.begin, dim = args.value_dim;
  const int64_t half_dim = code_row_bytes(codes.kind, dim), groups = cache.value_groups;
  const int64_t group_size = dim / groups;
  float *scales = scratch, *minimums = scales + kTileKeys * groups;
  find_value_scales(codes, minimums + kTileKeys * groups, scales, minimums);
  float biases[kFewRows], scaled[kFewRows * kTileKeys];
  // Pieces of channels that share a scale and a half of the bytes.
  for (int64_t i = 0, count; i < dim; i += count) {
    const int64_t group = i / group_size, half = i < half_dim ? 0 : half_dim;
    count = std::min((group + 1) * group_size, half + half_dim) - i;
    for (int64_t r = 0; r < num_rows; ++r) {
      biases[r] = scale_weights(weights + r * kTileKeys, num_keys, scales + group * kTileKeys,
                                minimums + group * kTileKeys, scaled + r * kTileKeys);
    }
    CacheRows<uint8_t> values = codes.rows(cache.value_codes);
    values.cache += i - half;
    auto* const add = codes.kind == BlockKind::kInt8 ? &add_all<Codes8>
                      : half == 0                    ? &add_all<LowNibbles>
                                                     : &add_all<HighNibbles>;
    add(scaled, num_rows, decay, values, next, num_keys, count, dim, out + i);
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t j = i; j < i + count; ++j) out[r * dim + j] += biases[r];
    }
  }
}

}  // namespace
}  // namespace kvkernels
