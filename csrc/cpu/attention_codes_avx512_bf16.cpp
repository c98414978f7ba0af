// Products with 4-bit codes by products of bfloat16 pairs (AVX512-BF16). A code n becomes the
// bfloat16 128 + n by putting its bits below those of 128: one instruction for 32 of them. The
// float side is folded with the scales and rounded to bfloat16, x; the excess of the codes is taken
// off by the sum of x, which is known exactly:
//
//   sum (q * scale) * (n - 8)  =  sum x * (128 + n)  -  136 * sum x
//
// See attention_codes_avx512_vnni.cpp, which does the same in whole numbers. That is closer, and
// costs more where processors do as many products of bfloat16 a cycle.
#include <algorithm>

#include "cpu/attention_codes_avx512.h"

namespace kvkernels {
namespace {

constexpr float kMiddle = middle_code(true), kExcess = 128 + kMiddle;

__m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

__m512i ones() { return _mm512_set1_epi16(0x3f80); }

__m256i load_piece(const uint8_t* row, int64_t piece, int64_t num_bytes) {
  const int64_t left = num_bytes - 32 * piece;
  const uint8_t* first = row + 32 * piece;
  if (left >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  return _mm256_maskz_loadu_epi8((__mmask32{1} << left) - 1, first);
}

// 128 + the low or the high halves of 32 bytes, each in 16 bits of `wide`.
__m512i low_codes(__m512i wide) {
  const __m512i low = _mm512_set1_epi16(15), base = _mm512_set1_epi16(0x4300);
  return _mm512_ternarylogic_epi32(wide, low, base, 0xea);  // (wide & low) | base
}
__m512i high_codes(__m512i wide) {
  return _mm512_or_si512(_mm512_srli_epi16(wide, 4), _mm512_set1_epi16(0x4300));
}

__m512i round_pair(__m512 a, __m512 b) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
}

// ---- keys ----------------------------------------------------------------------------------

struct alignas(64) RoundedQuery {
  // Of each piece the 32 channels in the low halves of its bytes, then those in the high halves.
  uint16_t x[kMaxBatch][kMaxCodeDim];
  float base[16];  // of each row as often as there are keys at a time
};

template <int kRows>
void round_query(const float* query, int64_t dim, const uint16_t* pairs, RoundedQuery& rounded) {
  const int64_t half = dim / 2, num_pieces = (half + 31) / 32;
  __m512 base[kRows], total[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) base[r] = total[r] = _mm512_setzero_ps();
  for (int64_t part = 0; part < 2 * num_pieces; ++part) {
    const int64_t offset = part / 2 * 32, first = offset + part % 2 * half;
    const __mmask16 mask[2] = {first_lanes(half - offset), first_lanes(half - offset - 16)};
    const Scales a = load_scales(pairs + 2 * first, mask[0], kMiddle);
    const Scales b = load_scales(pairs + 2 * (first + 16), mask[1], kMiddle);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512 qa = _mm512_maskz_loadu_ps(mask[0], query + r * dim + first);
      const __m512 qb = _mm512_maskz_loadu_ps(mask[1], query + r * dim + first + 16);
      base[r] = _mm512_fmadd_ps(qa, a.middle, _mm512_fmadd_ps(qb, b.middle, base[r]));
      const __m512i x = round_pair(_mm512_mul_ps(qa, a.scale), _mm512_mul_ps(qb, b.scale));
      total[r] = add_products(total[r], x, ones());
      _mm512_store_si512(rounded.x[r] + 32 * part, x);
    }
  }
  const __m512 excess = _mm512_set1_ps(-kExcess);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const float sum = _mm512_reduce_add_ps(_mm512_fmadd_ps(total[r], excess, base[r]));
    std::fill_n(rounded.base + r * keys_at_once(kRows), keys_at_once(kRows), sum);
  }
}

// Scores of `count` keys that share their scales.
template <int kRows>
void score_group(const uint8_t* codes, const uint16_t* pairs, int64_t count, int64_t dim,
                 const float* query, float* scores, const Ahead& next) {
  constexpr int kTokens = keys_at_once(kRows);
  const int64_t num_bytes = dim / 2, num_pieces = (num_bytes + 31) / 32;
  RoundedQuery rounded;
  round_query<kRows>(query, dim, pairs, rounded);
  for (int64_t first = 0; first < count; first += kTokens) {
    const uint8_t* keys[kTokens];
    __m512 sums[16];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      keys[t] = codes + (first + t < count ? first + t : count - 1) * num_bytes;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
      __m512i low[kRows], high[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        low[r] = _mm512_load_si512(rounded.x[r] + 64 * piece);
        high[r] = _mm512_load_si512(rounded.x[r] + 64 * piece + 32);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const __m512i wide = _mm512_cvtepu8_epi16(load_piece(keys[t], piece, num_bytes));
        const __m512i a = low_codes(wide), b = high_codes(wide);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[r * kTokens + t] = add_products(sums[r * kTokens + t], a, low[r]);
          sums[r * kTokens + t] = add_products(sums[r * kTokens + t], b, high[r]);
        }
      }
    }
    store_sixteen<kRows>(_mm512_add_ps(sum_lanes_of_16(sums), _mm512_load_ps(rounded.base)),
                         scores + first);
    next(kTokens * num_bytes);
  }
}

constexpr decltype(&score_group<1>) kScoreGroup[kMaxBatch + 1] = {
    nullptr, score_group<1>, score_group<2>, score_group<3>, score_group<4>};

void score(const CodeRun& run, const float* query, int64_t num_rows, float* scores,
           const Ahead& next_read) {
  const int64_t num_bytes = run.dim / 2, end = run.slot + run.count;
  const int64_t group_size = run.block_size / run.groups;
  const int64_t num_batches = (num_rows + kMaxBatch - 1) / kMaxBatch;
  for (int64_t slot = run.slot, next; slot < end; slot = next) {
    next = std::min((slot / group_size + 1) * group_size, end);
    const uint16_t* pairs = run.scales + slot / group_size * run.dim * 2;
    for (int64_t b = 0, r = 0, count; b < num_batches; ++b, r += count) {
      count = (num_rows - r) / (num_batches - b);
      kScoreGroup[count](run.codes + slot * num_bytes, pairs, next - slot, run.dim,
                         query + r * run.dim, scores + r * kCodeRowStride + slot - run.slot,
                         next_read);
    }
  }
}

// ---- values --------------------------------------------------------------------------------

struct alignas(64) RoundedWeights {
  uint16_t x[kMaxBatch][kMaxGroups][kMaxKeys];  // for each group of channels, key by key
  float base[kMaxBatch][kMaxGroups];
};

void round_weights(const float* weights, int64_t num_rows, const CodeRun& run,
                   const KeyScales& scales, RoundedWeights& rounded) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* row = weights + r * kCodeRowStride;
    for (int64_t group = 0; group < run.groups; ++group) {
      const float *scale = scales.scale[group], *middle = scales.middle[group];
      __m512 base = _mm512_setzero_ps(), total = _mm512_setzero_ps();
      for (int64_t t = 0; t < run.count; t += 32) {
        const __m512 a = _mm512_maskz_loadu_ps(first_lanes(run.count - t), row + t);
        const __m512 b = _mm512_maskz_loadu_ps(first_lanes(run.count - t - 16), row + t + 16);
        base = _mm512_fmadd_ps(a, _mm512_load_ps(middle + t), base);
        base = _mm512_fmadd_ps(b, _mm512_load_ps(middle + t + 16), base);
        const __m512i x = round_pair(_mm512_mul_ps(a, _mm512_load_ps(scale + t)),
                                     _mm512_mul_ps(b, _mm512_load_ps(scale + t + 16)));
        total = add_products(total, x, ones());
        _mm512_store_si512(rounded.x[r][group] + t, x);
      }
      rounded.base[r][group] =
          _mm512_reduce_add_ps(_mm512_fmadd_ps(total, _mm512_set1_ps(-kExcess), base));
    }
  }
}

// Vectors of 16 channels: of 32 neighbours those at 0 to 7 and 16 to 23 are in `a`, the others in
// `b`. Adds them, and the base of their group, to a row of sums.
void add_sums(__m512 a, __m512 b, float base, int64_t count, float* target) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 19, 18, 17, 16, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 parts[] = {_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b)};
  for (int i = 0; i < 2; ++i) {
    const __mmask16 mask = first_lanes(count - 16 * i);
    const __m512 part = _mm512_add_ps(parts[i], _mm512_set1_ps(base));
    const __m512 before = _mm512_maskz_loadu_ps(mask, target + 16 * i);
    _mm512_mask_storeu_ps(target + 16 * i, mask, _mm512_add_ps(before, part));
  }
}

__m512i load_weights(const uint16_t* weights, int64_t t) {
  return _mm512_set1_epi32(reinterpret_cast<const int32_t*>(weights)[t / 2]);
}

// The 64 channels whose codes lie in piece `piece` of each value.
template <int kRows>
void add_piece(const CodeRun& run, int64_t piece, const RoundedWeights& weights, float* sums,
               const Ahead& next) {
  const int64_t half = run.dim / 2, group_size = run.dim / run.groups;
  const int64_t low_group = 32 * piece / group_size;
  const int64_t high_group = (half + 32 * piece) / group_size;
  const uint8_t* codes = run.codes + run.slot * half;
  __m512 low[kRows][2], high[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    low[r][0] = low[r][1] = high[r][0] = high[r][1] = _mm512_setzero_ps();
  }
  for (int64_t t = 0; t < run.count; t += 2) {
    // A key past the last has no weight.
    const int64_t odd = t + 1 < run.count ? t + 1 : t;
    const __m256i a = load_piece(codes + t * half, piece, half);
    const __m256i b = load_piece(codes + odd * half, piece, half);
    const __m512i wide[] = {_mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(a, b)),
                            _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(a, b))};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i x = low_codes(wide[i]), y = high_codes(wide[i]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        low[r][i] = add_products(low[r][i], x, load_weights(weights.x[r][low_group], t));
        high[r][i] = add_products(high[r][i], y, load_weights(weights.x[r][high_group], t));
      }
    }
    if (t % 8 == 0) next(128);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* row = sums + r * run.dim + 32 * piece;
    add_sums(low[r][0], low[r][1], weights.base[r][low_group], half - 32 * piece, row);
    add_sums(high[r][0], high[r][1], weights.base[r][high_group], half - 32 * piece, row + half);
  }
}

constexpr decltype(&add_piece<1>) kAddPiece[kMaxBatch + 1] = {nullptr, add_piece<1>, add_piece<2>,
                                                              add_piece<3>, add_piece<4>};

void add(const CodeRun& run, const float* weights, int64_t num_rows, float* sums,
         const Ahead& next) {
  KeyScales scales;
  spread_scales(run, kMiddle, scales);
  const int64_t num_batches = (num_rows + kMaxBatch - 1) / kMaxBatch;
  const int64_t num_pieces = (run.dim / 2 + 31) / 32;
  RoundedWeights rounded;
  for (int64_t b = 0, r = 0, count; b < num_batches; ++b, r += count) {
    count = (num_rows - r) / (num_batches - b);
    round_weights(weights + r * kCodeRowStride, count, run, scales, rounded);
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
      kAddPiece[count](run, piece, rounded, sums + r * run.dim, next);
    }
  }
}

}  // namespace

const CodeKernels* avx512_bf16_code_kernels() {
  static const CodeKernels kernels = {score, add};
  return &kernels;
}

}  // namespace kvkernels
