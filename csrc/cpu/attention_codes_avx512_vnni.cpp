// Products with codes by integer dot products (AVX512-VNNI): 64 products of an unsigned and a
// signed byte an instruction, twice those of bfloat16 pairs, and nothing to convert.
//
// The float side of a product is folded with the scales and becomes whole numbers of 15 bits,
// x = 128 * high + low, in two signed bytes; sums of both are exact. That is closer than bfloat16,
// which keeps 8 bits. With element = minimum + scale * code and the code's middle c:
//
//   query * key = sum (q * scale) * (code - c)  +  sum q * (minimum + c * scale)
//
// and likewise for weights and values. Codes around 0 keep the rounding of x small; what the
// unsigned codes add is c times the sum of x, known exactly.
#include <algorithm>

#include "cpu/attention_codes_avx512_vnni.h"

namespace kvkernels {
namespace {

// ---- keys ----------------------------------------------------------------------------------

struct alignas(64) RoundedQuery {
  int8_t high[kMaxBatch][kMaxCodeDim], low[kMaxBatch][kMaxCodeDim];
  // score = sum of products * unit + base; of each row as often as there are keys at a time.
  float unit[16], base[16];
};

// Rounds rows of the query, folded with the scales of a group of keys.
template <bool kIsInt4, int kRows>
void round_query(const float* query, int64_t dim, const uint16_t* pairs, RoundedQuery& rounded) {
  const int64_t num_parts = 4 * num_vectors<kIsInt4>(dim);
  alignas(64) float folded[kMaxBatch][kMaxCodeDim];
  __m512 largest[kRows], base[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) largest[r] = base[r] = _mm512_setzero_ps();
  for (int64_t part = 0; part < num_parts; ++part) {
    const Channels channels = channels_of_part<kIsInt4>(part, dim);
    const __mmask16 mask = first_lanes(channels.count);
    const Scales scales = load_scales(pairs + 2 * channels.first, mask, middle_code(kIsInt4));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512 q = _mm512_maskz_loadu_ps(mask, query + r * dim + channels.first);
      const __m512 x = _mm512_mul_ps(q, scales.scale);
      _mm512_store_ps(folded[r] + 16 * part, x);
      largest[r] = _mm512_max_ps(largest[r], _mm512_abs_ps(x));
      base[r] = _mm512_fmadd_ps(q, scales.middle, base[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    Rounding rounding(largest[r]);
    for (int64_t part = 0; part < num_parts; part += 2) {
      const float* x = folded[r] + 16 * part;
      rounding.round(_mm512_load_ps(x), _mm512_load_ps(x + 16), rounded.high[r] + 16 * part,
                     rounded.low[r] + 16 * part);
    }
    const float excess = middle_code(kIsInt4) * rounding.unit() * rounding.total();
    constexpr int kTokens = keys_at_once(kRows);
    std::fill_n(rounded.unit + kTokens * r, kTokens, rounding.unit());
    std::fill_n(rounded.base + kTokens * r, kTokens, _mm512_reduce_add_ps(base[r]) - excess);
  }
}

// Inlined by force, like add_value_products: its sums are to stay in registers.
template <bool kIsInt4, int kRows, int kVectors, int kTokens>
[[gnu::always_inline]] inline void add_key_products(const uint8_t* const* keys, int64_t num_bytes,
                                                    const int8_t (*query)[kMaxCodeDim],
                                                    __m512i* sums) {
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const __m512i codes = load_codes<kIsInt4>(keys[t], j, num_bytes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        sums[r * kTokens + t] =
            _mm512_dpbusd_epi32(sums[r * kTokens + t], codes, _mm512_load_si512(query[r] + 64 * j));
      }
    }
  }
}

// Lane i of the result is the sum over the lanes of v[i].
[[gnu::always_inline]] inline __m512i sum_lanes_of_16(const __m512i* v) {
  __m512i w[4];
  for (int i = 0; i < 4; ++i) {
    const __m512i ab = _mm512_add_epi32(_mm512_shuffle_i32x4(v[i], v[i + 4], 0x44),
                                        _mm512_shuffle_i32x4(v[i], v[i + 4], 0xee));
    const __m512i cd = _mm512_add_epi32(_mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x44),
                                        _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xee));
    w[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
  }
  const __m512i low =
      _mm512_add_epi32(_mm512_unpacklo_epi32(w[0], w[1]), _mm512_unpackhi_epi32(w[0], w[1]));
  const __m512i high =
      _mm512_add_epi32(_mm512_unpacklo_epi32(w[2], w[3]), _mm512_unpackhi_epi32(w[2], w[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

// Scores of `count` keys from `codes` on with the rows of one rounding.
template <bool kIsInt4, int kRows, int kVectors>
void score_group(const uint8_t* codes, int64_t count, int64_t num_bytes, const RoundedQuery& query,
                 float* scores, const Ahead& next) {
  constexpr int kTokens = keys_at_once(kRows);
  for (int64_t first = 0; first < count; first += kTokens) {
    const uint8_t* keys[kTokens];
    __m512i sums[16];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      keys[t] = codes + (first + t < count ? first + t : count - 1) * num_bytes;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_si512();
    add_key_products<kIsInt4, kRows, kVectors, kTokens>(keys, num_bytes, query.high, sums);
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kTokens; ++i) sums[i] = _mm512_slli_epi32(sums[i], kLowBits);
    add_key_products<kIsInt4, kRows, kVectors, kTokens>(keys, num_bytes, query.low, sums);
    const __m512 products = _mm512_cvtepi32_ps(sum_lanes_of_16(sums));
    store_sixteen<kRows>(
        _mm512_fmadd_ps(products, _mm512_load_ps(query.unit), _mm512_load_ps(query.base)),
        scores + first);
    next(kTokens * num_bytes);
  }
}

// Keys that share their scales, with up to 4 rows.
template <bool kIsInt4, int kRows>
void score_rows(const uint8_t* codes, const uint16_t* pairs, int64_t count, int64_t dim,
                const float* query, float* scores, const Ahead& next) {
  const int64_t num_bytes = row_bytes<kIsInt4>(dim);
  RoundedQuery rounded;
  round_query<kIsInt4, kRows>(query, dim, pairs, rounded);
  switch (num_vectors<kIsInt4>(dim)) {
    case 1:
      return score_group<kIsInt4, kRows, 1>(codes, count, num_bytes, rounded, scores, next);
    case 2:
      return score_group<kIsInt4, kRows, 2>(codes, count, num_bytes, rounded, scores, next);
    case 3:
      return score_group<kIsInt4, kRows, 3>(codes, count, num_bytes, rounded, scores, next);
    default:
      return score_group<kIsInt4, kRows, 4>(codes, count, num_bytes, rounded, scores, next);
  }
}

template <bool kIsInt4>
constexpr decltype(&score_rows<kIsInt4, 1>) kScoreRows[kMaxBatch + 1] = {
    nullptr, score_rows<kIsInt4, 1>, score_rows<kIsInt4, 2>, score_rows<kIsInt4, 3>,
    score_rows<kIsInt4, 4>};

template <bool kIsInt4>
void score_run(const CodeRun& run, const float* query, int64_t num_rows, float* scores,
               const Ahead& next_read) {
  const int64_t num_bytes = row_bytes<kIsInt4>(run.dim), end = run.slot + run.count;
  const int64_t group_size = run.block_size / run.groups;
  const int64_t num_batches = (num_rows + kMaxBatch - 1) / kMaxBatch;
  for (int64_t slot = run.slot, next; slot < end; slot = next) {
    next = std::min((slot / group_size + 1) * group_size, end);
    const uint16_t* pairs = run.scales + slot / group_size * run.dim * 2;
    for (int64_t b = 0, r = 0, count; b < num_batches; ++b, r += count) {
      count = (num_rows - r) / (num_batches - b);
      kScoreRows<kIsInt4>[count](run.codes + slot* num_bytes, pairs, next - slot, run.dim,
                                 query + r* run.dim, scores + r* kCodeRowStride + slot - run.slot,
                                 next_read);
    }
  }
}

void score(const CodeRun& keys, const float* query, int64_t num_rows, float* scores,
           const Ahead& next) {
  (keys.is_int4 ? score_run<true> : score_run<false>)(keys, query, num_rows, scores, next);
}

// ---- values --------------------------------------------------------------------------------

constexpr int64_t kMaxFours = kMaxKeys / 4;

struct alignas(64) RoundedWeights {
  // Of each group of channels, bytes of neighbouring keys.
  int8_t high[kMaxBatch][kMaxGroups][kMaxKeys], low[kMaxBatch][kMaxGroups][kMaxKeys];
  float unit[kMaxBatch][kMaxGroups], base[kMaxBatch][kMaxGroups];
};

void round_weights(const float* weights, int64_t num_rows, const CodeRun& run, float c,
                   const KeyScales& scales, RoundedWeights& rounded) {
  const int64_t num_parts = (run.count + 15) / 16;
  for (int64_t r = 0; r < num_rows; ++r) {
    __m512 weight[kMaxKeys / 16];
    for (int64_t part = 0; part < num_parts; ++part) {
      weight[part] = _mm512_maskz_loadu_ps(first_lanes(run.count - 16 * part),
                                           weights + r * kCodeRowStride + 16 * part);
    }
    for (int64_t group = 0; group < run.groups; ++group) {
      __m512 folded[kMaxKeys / 16 + 1];
      __m512 largest = _mm512_setzero_ps(), base = _mm512_setzero_ps();
      for (int64_t part = 0; part < num_parts; ++part) {
        const __m512 scale = _mm512_load_ps(scales.scale[group] + 16 * part);
        const __m512 middle = _mm512_load_ps(scales.middle[group] + 16 * part);
        folded[part] = _mm512_mul_ps(weight[part], scale);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(folded[part]));
        base = _mm512_fmadd_ps(weight[part], middle, base);
      }
      Rounding rounding(largest);
      folded[num_parts] = _mm512_setzero_ps();
      for (int64_t part = 0; part < num_parts; part += 2) {
        rounding.round(folded[part], folded[part + 1], rounded.high[r][group] + 16 * part,
                       rounded.low[r][group] + 16 * part);
      }
      rounded.unit[r][group] = rounding.unit();
      rounded.base[r][group] = _mm512_reduce_add_ps(base) - c * rounding.unit() * rounding.total();
    }
  }
}

// Codes of four neighbouring keys side by side. Of a vector of 64 channels, the four vectors
// k = 0 .. 3 hold in their quarter q the channels 16 q + 4 k to 16 q + 4 k + 3.
template <bool kIsInt4>
void interleave_keys(const CodeRun& run, int64_t vectors, uint8_t* fours, const Ahead& next) {
  const int64_t num_bytes = row_bytes<kIsInt4>(run.dim);
  const uint8_t* rows = run.codes + run.slot * num_bytes;
  for (int64_t first = 0; first < run.count; first += 4) {
    const uint8_t* row[4];
    next(num_bytes);
    for (int64_t t = 0; t < 4; ++t) {
      // A key past the last has no weight.
      row[t] = rows + (first + t < run.count ? first + t : run.count - 1) * num_bytes;
    }
    for (int64_t j = 0; j < vectors; ++j, fours += 256) {
      const __m512i a = load_codes<kIsInt4>(row[0], j, num_bytes);
      const __m512i b = load_codes<kIsInt4>(row[1], j, num_bytes);
      const __m512i c = load_codes<kIsInt4>(row[2], j, num_bytes);
      const __m512i d = load_codes<kIsInt4>(row[3], j, num_bytes);
      const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
      const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
      _mm512_store_si512(fours, _mm512_unpacklo_epi16(ab_low, cd_low));
      _mm512_store_si512(fours + 64, _mm512_unpackhi_epi16(ab_low, cd_low));
      _mm512_store_si512(fours + 128, _mm512_unpacklo_epi16(ab_high, cd_high));
      _mm512_store_si512(fours + 192, _mm512_unpackhi_epi16(ab_high, cd_high));
    }
  }
}

// The groups of the lower and upper 32 channels of vector j.
struct VectorGroups {
  int64_t low, high;
};

template <bool kIsInt4>
VectorGroups groups_of_vector(int64_t j, const CodeRun& run) {
  if (run.groups == 1) return {0, 0};
  const int64_t group_size = run.dim / run.groups;
  return {channels_of_part<kIsInt4>(4 * j, run.dim).first / group_size,
          channels_of_part<kIsInt4>(4 * j + 2, run.dim).first / group_size};
}

// Weights of four keys for the channels of a vector.
template <bool kHasTwoGroups>
__m512i load_weights(const int8_t (*weights)[kMaxKeys], VectorGroups groups, int64_t four) {
  const __m512i low =
      _mm512_set1_epi32(reinterpret_cast<const int32_t*>(weights[groups.low])[four]);
  if constexpr (!kHasTwoGroups) return low;
  return _mm512_mask_broadcastd_epi32(
      low, 0xff00, _mm_loadu_si32(reinterpret_cast<const int32_t*>(weights[groups.high]) + four));
}

template <int kRows, bool kHasTwoGroups>
[[gnu::always_inline]] inline void add_value_products(const uint8_t* fours, int64_t stride,
                                                      int64_t num_fours,
                                                      const int8_t (*weights)[kMaxGroups][kMaxKeys],
                                                      VectorGroups groups, __m512i (*sums)[4]) {
  for (int64_t four = 0; four < num_fours; ++four, fours += stride) {
    __m512i codes[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) codes[k] = _mm512_load_si512(fours + 64 * k);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i weight = load_weights<kHasTwoGroups>(weights[r], groups, four);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[r][k] = _mm512_dpbusd_epi32(sums[r][k], codes[k], weight);
    }
  }
}

// Quarter q of the result holds quarter q of the four vectors, one after the other.
void gather_quarters(const __m512i* v, __m512i* quarters) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44);  // v0.0 v0.1 v1.0 v1.1
  const __m512i b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xee);  // v0.2 v0.3 v1.2 v1.3
  const __m512i d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  quarters[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  quarters[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  quarters[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  quarters[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// One vector of 64 channels, for all keys of the run.
template <bool kIsInt4, int kRows, bool kHasTwoGroups>
void add_vector(const CodeRun& run, int64_t j, const uint8_t* fours, int64_t stride,
                const RoundedWeights& weights, float* sums, const Ahead& next) {
  const VectorGroups groups = groups_of_vector<kIsInt4>(j, run);
  const int64_t num_fours = (run.count + 3) / 4;
  __m512i products[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) products[r][k] = _mm512_setzero_si512();
  }
  add_value_products<kRows, kHasTwoGroups>(fours, stride, num_fours, weights.high, groups,
                                           products);
  next(run.count * 16);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) products[r][k] = _mm512_slli_epi32(products[r][k], kLowBits);
  }
  add_value_products<kRows, kHasTwoGroups>(fours, stride, num_fours, weights.low, groups, products);
  next(run.count * 16);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __m512i quarters[4];
    gather_quarters(products[r], quarters);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const Channels channels = channels_of_part<kIsInt4>(4 * j + q, run.dim);
      const __mmask16 mask = first_lanes(channels.count);
      const int64_t group = q < 2 ? groups.low : groups.high;
      float* target = sums + r * run.dim + channels.first;
      const __m512 part =
          _mm512_fmadd_ps(_mm512_cvtepi32_ps(quarters[q]), _mm512_set1_ps(weights.unit[r][group]),
                          _mm512_set1_ps(weights.base[r][group]));
      const __m512 before = _mm512_maskz_loadu_ps(mask, target);
      _mm512_mask_storeu_ps(target, mask, _mm512_add_ps(before, part));
    }
  }
}

using AddVector = void (*)(const CodeRun&, int64_t, const uint8_t*, int64_t, const RoundedWeights&,
                           float*, const Ahead&);

template <bool kIsInt4, bool kHasTwoGroups>
constexpr AddVector kAddVector[kMaxBatch + 1] = {
    nullptr, add_vector<kIsInt4, 1, kHasTwoGroups>, add_vector<kIsInt4, 2, kHasTwoGroups>,
    add_vector<kIsInt4, 3, kHasTwoGroups>, add_vector<kIsInt4, 4, kHasTwoGroups>};

template <bool kIsInt4>
void add_run(const CodeRun& run, const float* weights, int64_t num_rows, float* sums,
             const Ahead& next) {
  const int64_t vectors = num_vectors<kIsInt4>(run.dim);
  alignas(64) uint8_t fours[kMaxFours * kMaxVectors * 256];
  interleave_keys<kIsInt4>(run, vectors, fours, next);
  KeyScales scales;
  spread_scales(run, middle_code(kIsInt4), scales);
  const int64_t num_batches = (num_rows + kMaxBatch - 1) / kMaxBatch;
  RoundedWeights rounded;
  for (int64_t b = 0, r = 0, count; b < num_batches; ++b, r += count) {
    count = (num_rows - r) / (num_batches - b);
    round_weights(weights + r * kCodeRowStride, count, run, middle_code(kIsInt4), scales, rounded);
    const AddVector add =
        run.groups == 1 ? kAddVector<kIsInt4, false>[count] : kAddVector<kIsInt4, true>[count];
    for (int64_t j = 0; j < vectors; ++j) {
      add(run, j, fours + 256 * j, 256 * vectors, rounded, sums + r * run.dim, next);
    }
  }
}

void add(const CodeRun& values, const float* weights, int64_t num_rows, float* sums,
         const Ahead& next) {
  (values.is_int4 ? add_run<true> : add_run<false>)(values, weights, num_rows, sums, next);
}

}  // namespace

const CodeKernels* avx512_vnni_code_kernels() {
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  static const CodeKernels kernels = {score, add};
  return has_vnni ? &kernels : nullptr;
}

}  // namespace kvkernels
