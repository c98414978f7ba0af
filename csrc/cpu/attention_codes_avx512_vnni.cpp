// Products with codes by integer dot products (AVX512-VNNI): 32 products of 16-bit integers an
// instruction, as many as of bfloat16, and a code becomes a 16-bit integer by mere zero extension.
//
// The float factor of a product is multiplied by the scales and rounded to 16-bit integers x; sums
// of their products with codes are exact. That rounds less than bfloat16, which keeps 8 bits. With
// element = minimum + scale * code and the codes' middle c:
//
//   query * key = sum (q * scale) * (code - c)  +  sum q * (minimum + c * scale)
//
// and likewise for weights and values. Codes around 0 keep the effect of rounding x small. The
// instruction takes unsigned codes: that adds c times the sum of x, which is subtracted exactly.
//
// (Codes as bytes would take half as many instructions, but each x needs two bytes: twice as many
// products again, and shifts. A tile of 64 int8 keys with 4 rows took 1.43 us that way on Zen 4,
// and takes 1.25 us this way.)
#include <algorithm>

#include "cpu/attention_codes_rounding_avx512.h"

namespace kvkernels {
namespace {

// |x| <= kLargest keeps 256 products with codes up to 255 within 31 bits.
constexpr float kLargest = 32767;

// ---- codes ---------------------------------------------------------------------------------

__m512i low_nibbles(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi16(15)); }
__m512i high_nibbles(__m512i bytes) { return _mm512_srli_epi16(bytes, 4); }

// Loads one piece of a row's codes as 16-bit integers, in the order of channels.
template <bool kIsInt4, bool kIsWhole>
void load_row_codes(const uint8_t* row, int64_t piece, int64_t num_bytes, __m512i* halves) {
  if constexpr (kIsInt4) {
    const __m512i bytes = _mm512_cvtepu8_epi16(load_bytes<kIsWhole>(row, 32 * piece, num_bytes));
    halves[0] = low_nibbles(bytes);
    halves[1] = high_nibbles(bytes);
  } else {
    halves[0] = _mm512_cvtepu8_epi16(load_bytes<kIsWhole>(row, 64 * piece, num_bytes));
    halves[1] = _mm512_cvtepu8_epi16(load_bytes<kIsWhole>(row, 64 * piece + 32, num_bytes));
  }
}

// Interleaves the bytes of two rows, as 16-bit integers. Of 32 channels, pairs[0] holds those at 0
// to 7 and 16 to 23, pairs[1] the others.
void interleave(__m256i a, __m256i b, __m512i* pairs) {
  pairs[0] = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(a, b));
  pairs[1] = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(a, b));
}

// Loads one piece of two rows' codes, interleaved; pairs[2 h] and pairs[2 h + 1] are those of half
// h.
template <bool kIsInt4, bool kIsWhole>
void load_pairs_of_codes(const uint8_t* a, const uint8_t* b, int64_t piece, int64_t num_bytes,
                         __m512i* pairs) {
  constexpr int64_t kStep = kIsInt4 ? 32 : 64;
  interleave(load_bytes<kIsWhole>(a, kStep * piece, num_bytes),
             load_bytes<kIsWhole>(b, kStep * piece, num_bytes), pairs);
  if constexpr (kIsInt4) {
    for (int i = 0; i < 2; ++i) {
      pairs[i + 2] = high_nibbles(pairs[i]);
      pairs[i] = low_nibbles(pairs[i]);
    }
  } else {
    interleave(load_bytes<kIsWhole>(a, kStep * piece + 32, num_bytes),
               load_bytes<kIsWhole>(b, kStep * piece + 32, num_bytes), pairs + 2);
  }
}

// ---- keys ----------------------------------------------------------------------------------

// Scores neighbouring keys that share their scales, `pairs`, with a fixed number of rows.
using ScoreGroup = void (*)(const uint8_t* codes, const uint16_t* pairs, int64_t count, int64_t dim,
                            const float* query, float* scores, ReadAhead& next);

// Scores all keys of a run; kernels[n] serves n rows.
void score_groups(const CodeRun& run, const ScoreGroup* kernels, const float* query,
                  int64_t num_rows, float* scores, ReadAhead& next_read) {
  const int64_t num_bytes = run.is_int4 ? run.dim / 2 : run.dim;
  for_each_key_group(run, [&](int64_t slot, int64_t num_keys, const uint16_t* pairs) {
    for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t count) {
      kernels[count](run.codes + slot * num_bytes, pairs, num_keys, run.dim,
                     query + first * run.dim, scores + first * kCodeRowStride + slot - run.slot,
                     next_read);
    });
  });
}

// Scores `count` keys that share their scales, with up to 4 rows.
template <bool kIsInt4, bool kIsWhole, Asking kAsking, int kRows>
void score_group(const uint8_t* codes, const uint16_t* pairs, int64_t count, int64_t dim,
                 const float* query, float* scores, ReadAhead& next) {
  using Columns = SixteenColumns<kRows, IntegerSumOf>;
  constexpr int kTokens = Columns::kColumns;
  const Pieces<kIsInt4> pieces = {dim};
  const int64_t num_bytes = pieces.row_bytes(), num_pieces = pieces.count();
  RoundedQuery rounded;
  round_query<kIsInt4, kRows>(query, dim, pairs, kLargest, rounded);
  for (int64_t first = 0; first < count; first += 16) {
    Columns columns;
#pragma GCC unroll 1
    for (int part = 0; part < 16 / kTokens; ++part) {
      const uint8_t* keys[kTokens];
      __m512i sums[kRows * kTokens];
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        keys[t] = codes + std::min(first + part * kTokens + t, count - 1) * num_bytes;
      }
#pragma GCC unroll 16
      for (__m512i& sum : sums) sum = _mm512_setzero_si512();
      auto ahead = next.take<kAsking>(kTokens * num_bytes, keys[0]);
      for (int64_t piece = 0; piece < num_pieces; ++piece) {
        __m512i x[kRows][2];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          x[r][0] = _mm512_load_si512(rounded.x[r] + 64 * piece);
          x[r][1] = _mm512_load_si512(rounded.x[r] + 64 * piece + 32);
        }
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          __m512i halves[2];
          load_row_codes<kIsInt4, kIsWhole>(keys[t], piece, num_bytes, halves);
          if (!kIsInt4 || t % 2 == 0) ahead.template ask<64>();
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            sums[r * kTokens + t] = add_products(sums[r * kTokens + t], halves[0], x[r][0]);
            sums[r * kTokens + t] = add_products(sums[r * kTokens + t], halves[1], x[r][1]);
          }
        }
      }
      columns.take(part, sums);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i sum = _mm512_castps_si512(columns.row(r));
      const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(rounded.excess[4 * r]));
      const __m512 score =
          _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(rounded.unit[4 * r]),
                          _mm512_set1_ps(rounded.base[4 * r]));
      _mm512_storeu_ps(scores + r * kCodeRowStride + first, score);
    }
  }
}

template <bool kIsInt4, bool kIsWhole, Asking kAsking>
constexpr ScoreGroup kScoreGroup[kMaxBatch + 1] = {
    nullptr, score_group<kIsInt4, kIsWhole, kAsking, 1>, score_group<kIsInt4, kIsWhole, kAsking, 2>,
    score_group<kIsInt4, kIsWhole, kAsking, 3>, score_group<kIsInt4, kIsWhole, kAsking, 4>};

void score(const CodeRun& keys, const float* query, int64_t num_rows, float* scores,
           ReadAhead& next) {
  const auto score_with = [&](const ScoreGroup* kernels) {
    score_groups(keys, kernels, query, num_rows, scores, next);
  };
  if (keys.is_int4) {
    score_with(Pieces<true>{keys.dim}.are_whole() ? kScoreGroup<true, true, kUsually>
                                                  : kScoreGroup<true, false, kUsually>);
  } else if (Pieces<false>{keys.dim}.are_whole()) {
    with_asking(next, [&](auto asking) { score_with(kScoreGroup<false, true, asking()>); });
  } else {
    score_with(kScoreGroup<false, false, kUsually>);
  }
}

// ---- values --------------------------------------------------------------------------------

// Adds sums of 32 channels, in the order of `interleave`, to a row of sums of which `count` are
// left.
void add_half(__m512 a, __m512 b, int64_t count, float decay, float* target) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 19, 18, 17, 16, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  add_to_row(_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b), count, decay,
             target);
}

// Adds one piece of each value of the run.
template <bool kIsInt4, bool kIsWhole, Asking kAsking, int kRows>
void add_piece(const CodeRun& run, int64_t piece, const RoundedWeights& weights, const float* decay,
               float* sums, ReadAhead& next) {
  const int64_t dim = run.dim, groups = run.groups;
  const Pieces<kIsInt4> pieces = {dim};
  const int64_t num_bytes = pieces.row_bytes(), group_size = dim / groups;
  int64_t group[2];
  for (int half = 0; half < 2; ++half) {
    group[half] = std::min(pieces.begin(piece, half) / group_size, groups - 1);
  }
  __m512i products[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) products[r][i] = _mm512_setzero_si512();
  }
  // Where the next pair of keys, and its weights for each half, begin.
  const uint8_t* key = run.codes + run.slot * num_bytes;
  const auto* low_weights = reinterpret_cast<const int32_t*>(weights.x[0][group[0]]);
  const auto* high_weights = reinterpret_cast<const int32_t*>(weights.x[0][group[1]]);
  const auto add_pair = [&](const uint8_t* odd) {
    __m512i pairs[4];
    load_pairs_of_codes<kIsInt4, kIsWhole>(key, odd, piece, num_bytes, pairs);
    key += 2 * num_bytes;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      constexpr int64_t kRowStride = kMaxGroups * kMaxKeys / 2;
      const __m512i low = _mm512_set1_epi32(low_weights[r * kRowStride]);
      const __m512i high = _mm512_set1_epi32(high_weights[r * kRowStride]);
      products[r][0] = add_products(products[r][0], pairs[0], low);
      products[r][1] = add_products(products[r][1], pairs[1], low);
      products[r][2] = add_products(products[r][2], pairs[2], high);
      products[r][3] = add_products(products[r][3], pairs[3], high);
    }
    ++low_weights;
    ++high_weights;
  };
  for (int64_t begin = 0; begin < run.count; begin += 16) {
    const int64_t count = std::min<int64_t>(run.count - begin, 16);
    auto ahead = next.take<kAsking>(16 * (kIsInt4 ? 32 : 64), key);
    for (int64_t t = 0; t + 1 < count; t += 2) {
      ahead.template ask<kIsInt4 ? 64 : 128>();
      add_pair(key + num_bytes);
    }
    // A key past the last has weight 0, so any codes will do.
    if (count % 2 == 1) add_pair(key);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t set = r * groups + group[half];
      const __m512i excess = _mm512_set1_epi32(weights.excess[set]);
      const __m512 unit = _mm512_set1_ps(weights.unit[set]);
      const __m512 base = _mm512_set1_ps(weights.base[set]);
      __m512 parts[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512i exact = _mm512_sub_epi32(products[r][2 * half + i], excess);
        parts[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), unit, base);
      }
      const int64_t first = pieces.begin(piece, half);
      add_half(parts[0], parts[1], kIsWhole ? 32 : pieces.end(half) - first, decay[r],
               sums + r * dim + first);
    }
  }
}

using AddPiece = void (*)(const CodeRun&, int64_t, const RoundedWeights&, const float*, float*,
                          ReadAhead&);

template <bool kIsInt4, bool kIsWhole, Asking kAsking>
constexpr AddPiece kAddPiece[kMaxBatch + 1] = {
    nullptr, add_piece<kIsInt4, kIsWhole, kAsking, 1>, add_piece<kIsInt4, kIsWhole, kAsking, 2>,
    add_piece<kIsInt4, kIsWhole, kAsking, 3>, add_piece<kIsInt4, kIsWhole, kAsking, 4>};

template <bool kIsInt4>
void add_run(const CodeRun& run, const AddPiece* kernels, const float* weights, int64_t num_rows,
             const float* decay, float* sums, ReadAhead& next) {
  KeyScales scales;
  spread_scales(run, middle_code(kIsInt4), scales);
  RoundedWeights rounded;
  for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t count) {
    round_weights<kIsInt4>(weights + first * kCodeRowStride, count, run, scales, kLargest, rounded);
    for (int64_t piece = 0; piece < Pieces<kIsInt4>{run.dim}.count(); ++piece) {
      kernels[count](run, piece, rounded, decay + first, sums + first * run.dim, next);
    }
  });
}

void add(const CodeRun& values, const float* weights, int64_t num_rows, const float* decay,
         float* sums, ReadAhead& next) {
  const auto add_with = [&](auto is_int4, const AddPiece* kernels) {
    add_run<is_int4()>(values, kernels, weights, num_rows, decay, sums, next);
  };
  if (values.is_int4) {
    add_with(std::true_type(), Pieces<true>{values.dim}.are_whole()
                                   ? kAddPiece<true, true, kUsually>
                                   : kAddPiece<true, false, kUsually>);
  } else if (Pieces<false>{values.dim}.are_whole()) {
    with_asking(
        next, [&](auto asking) { add_with(std::false_type(), kAddPiece<false, true, asking()>); });
  } else {
    add_with(std::false_type(), kAddPiece<false, false, kUsually>);
  }
}

}  // namespace

const CodeKernels* avx512_vnni_code_kernels() {
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  static const CodeKernels kernels = {suits_vectors, 1, score_each<score>, add_each<add>};
  return has_vnni ? &kernels : nullptr;
}

}  // namespace kvkernels
