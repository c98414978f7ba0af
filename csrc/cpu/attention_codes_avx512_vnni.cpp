// Products with codes by integer dot products (AVX512-VNNI): 32 products of 16-bit numbers an
// instruction, as many as of bfloat16, and a code becomes such a number by mere widening.
//
// The float side of a product is folded with the scales and rounded to whole numbers x of 16 bits;
// sums of products are exact. That is closer than bfloat16, which keeps 8 bits. With
// element = minimum + scale * code and the codes' middle c:
//
//   query * key = sum (q * scale) * (code - c)  +  sum q * (minimum + c * scale)
//
// and likewise for weights and values. Codes around 0 keep the rounding of x small; what unsigned
// codes add is c times the sum of x, taken off exactly.
//
// (Bytes take half as many instructions, but x needs two of them: as many again, and shifts. A tile
// of 64 int8 keys with 4 rows took 1.43 us that way on Zen 4, and takes 1.25 us this way.)
#include <algorithm>

#include "cpu/attention_codes_rounding_avx512.h"

namespace kvkernels {
namespace {

// |x| <= kLargest keeps 256 products with codes up to 255 within 31 bits.
constexpr float kLargest = 32767;

// ---- codes ---------------------------------------------------------------------------------

// 32 bytes of a row from `first` on; what lies past the row is 0.
template <bool kIsWhole>
__m256i load_bytes(const uint8_t* row, int64_t first, int64_t num_bytes) {
  const int64_t left = num_bytes - first;
  if (kIsWhole || left >= 32) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + first));
  }
  const __mmask32 mask = left <= 0 ? 0 : (__mmask32{1} << left) - 1;
  return _mm256_maskz_loadu_epi8(mask, row + first);
}

__m512i low_nibbles(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi16(15)); }
__m512i high_nibbles(__m512i bytes) { return _mm512_srli_epi16(bytes, 4); }

// The codes of one row, 16 bits each, in the order of channels.
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

// Bytes of two rows in turn, 16 bits each. Of 32 channels, those at 0 to 7 and 16 to 23 come first.
void interleave(__m256i a, __m256i b, __m512i* pairs) {
  pairs[0] = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(a, b));
  pairs[1] = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(a, b));
}

// The codes of two rows in turn; pairs[2 h] and pairs[2 h + 1] are those of half h.
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

// Scores of `count` keys that share their scales, with up to 4 rows.
template <bool kIsInt4, bool kIsWhole, int kRows>
void score_group(const uint8_t* codes, const uint16_t* pairs, int64_t count, int64_t dim,
                 const float* query, float* scores, const Ahead& next) {
  constexpr int kTokens = keys_at_once(kRows);
  const Pieces<kIsInt4> pieces = {dim};
  const int64_t num_bytes = pieces.row_bytes(), num_pieces = pieces.count();
  RoundedQuery rounded;
  round_query<kIsInt4, kRows>(query, dim, pairs, kLargest, rounded);
  for (int64_t first = 0; first < count; first += kTokens) {
    const uint8_t* keys[kTokens];
    __m512i sums[16];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      keys[t] = codes + (first + t < count ? first + t : count - 1) * num_bytes;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_si512();
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
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          add_products(sums[r * kTokens + t], halves[0], x[r][0]);
          add_products(sums[r * kTokens + t], halves[1], x[r][1]);
        }
      }
    }
    const __m512i products = _mm512_sub_epi32(sum_lanes_of_16(sums), rounded.excess);
    store_sixteen<kRows>(_mm512_fmadd_ps(_mm512_cvtepi32_ps(products), rounded.unit, rounded.base),
                         scores + first);
    next(kTokens * num_bytes);
  }
}

using ScoreGroup = void (*)(const uint8_t*, const uint16_t*, int64_t, int64_t, const float*, float*,
                            const Ahead&);

template <bool kIsInt4, bool kIsWhole>
constexpr ScoreGroup kScoreGroup[kMaxBatch + 1] = {
    nullptr, score_group<kIsInt4, kIsWhole, 1>, score_group<kIsInt4, kIsWhole, 2>,
    score_group<kIsInt4, kIsWhole, 3>, score_group<kIsInt4, kIsWhole, 4>};

template <bool kIsInt4>
void score_run(const CodeRun& run, const float* query, int64_t num_rows, float* scores,
               const Ahead& next_read) {
  const Pieces<kIsInt4> pieces = {run.dim};
  const ScoreGroup* const kernels =
      pieces.are_whole() ? kScoreGroup<kIsInt4, true> : kScoreGroup<kIsInt4, false>;
  const int64_t num_bytes = pieces.row_bytes(), end = run.slot + run.count;
  const int64_t group_size = run.block_size / run.groups;
  const int64_t num_batches = (num_rows + kMaxBatch - 1) / kMaxBatch;
  for (int64_t slot = run.slot, next; slot < end; slot = next) {
    next = std::min((slot / group_size + 1) * group_size, end);
    const uint16_t* pairs = run.scales + slot / group_size * run.dim * 2;
    for (int64_t b = 0, r = 0, count; b < num_batches; ++b, r += count) {
      count = (num_rows - r) / (num_batches - b);
      kernels[count](run.codes + slot * num_bytes, pairs, next - slot, run.dim, query + r * run.dim,
                     scores + r * kCodeRowStride + slot - run.slot, next_read);
    }
  }
}

void score(const CodeRun& keys, const float* query, int64_t num_rows, float* scores,
           const Ahead& next) {
  (keys.is_int4 ? score_run<true> : score_run<false>)(keys, query, num_rows, scores, next);
}

// ---- values --------------------------------------------------------------------------------

// Sums of 32 channels in the order of `interleave`, added to a row of sums of which `count` are
// left.
void add_half(__m512 a, __m512 b, int64_t count, float* target) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 19, 18, 17, 16, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 parts[] = {_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b)};
  for (int i = 0; i < 2; ++i) {
    const __mmask16 mask = first_lanes(count - 16 * i);
    const __m512 before = _mm512_maskz_loadu_ps(mask, target + 16 * i);
    _mm512_mask_storeu_ps(target + 16 * i, mask, _mm512_add_ps(before, parts[i]));
  }
}

// One piece of each value of the run.
template <bool kIsInt4, bool kIsWhole, int kRows>
void add_piece(const CodeRun& run, int64_t piece, const RoundedWeights& weights, float* sums,
               const Ahead& next) {
  const Pieces<kIsInt4> pieces = {run.dim};
  const int64_t num_bytes = pieces.row_bytes(), group_size = run.dim / run.groups;
  const uint8_t* codes = run.codes + run.slot * num_bytes;
  int64_t sets[kRows][2];
  __m512i products[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      const int64_t group = std::min(pieces.begin(piece, half) / group_size, run.groups - 1);
      sets[r][half] = r * run.groups + group;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) products[r][i] = _mm512_setzero_si512();
  }
  next(run.count * (kIsInt4 ? 32 : 64));
  for (int64_t t = 0; t < run.count; t += 2) {
    // A key past the last has no weight.
    const int64_t odd = t + 1 < run.count ? t + 1 : t;
    __m512i pairs[4];
    load_pairs_of_codes<kIsInt4, kIsWhole>(codes + t * num_bytes, codes + odd * num_bytes, piece,
                                           num_bytes, pairs);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const auto* x = reinterpret_cast<const int32_t*>(weights.x[sets[r][i / 2]]);
        add_products(products[r][i], pairs[i], _mm512_set1_epi32(x[t / 2]));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      const int64_t set = sets[r][half];
      const __m512i excess = _mm512_set1_epi32(weights.excess[set]);
      const __m512 unit = _mm512_set1_ps(weights.unit[set]);
      const __m512 base = _mm512_set1_ps(weights.base[set]);
      __m512 parts[2];
      for (int i = 0; i < 2; ++i) {
        const __m512i exact = _mm512_sub_epi32(products[r][2 * half + i], excess);
        parts[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), unit, base);
      }
      const int64_t first = pieces.begin(piece, half);
      add_half(parts[0], parts[1], pieces.end(half) - first, sums + r * run.dim + first);
    }
  }
}

using AddPiece = void (*)(const CodeRun&, int64_t, const RoundedWeights&, float*, const Ahead&);

template <bool kIsInt4, bool kIsWhole>
constexpr AddPiece kAddPiece[kMaxBatch + 1] = {
    nullptr, add_piece<kIsInt4, kIsWhole, 1>, add_piece<kIsInt4, kIsWhole, 2>,
    add_piece<kIsInt4, kIsWhole, 3>, add_piece<kIsInt4, kIsWhole, 4>};

template <bool kIsInt4>
void add_run(const CodeRun& run, const float* weights, int64_t num_rows, float* sums,
             const Ahead& next) {
  const Pieces<kIsInt4> pieces = {run.dim};
  const AddPiece* const kernels =
      pieces.are_whole() ? kAddPiece<kIsInt4, true> : kAddPiece<kIsInt4, false>;
  KeyScales scales;
  spread_scales(run, middle_code(kIsInt4), scales);
  const int64_t num_batches = (num_rows + kMaxBatch - 1) / kMaxBatch;
  RoundedWeights rounded;
  for (int64_t b = 0, r = 0, count; b < num_batches; ++b, r += count) {
    count = (num_rows - r) / (num_batches - b);
    round_weights<kIsInt4>(weights + r * kCodeRowStride, count, run, scales, kLargest, rounded);
    for (int64_t piece = 0; piece < pieces.count(); ++piece) {
      kernels[count](run, piece, rounded, sums + r * run.dim, next);
    }
  }
}

void add(const CodeRun& values, const float* weights, int64_t num_rows, float* sums,
         const Ahead& next) {
  (values.is_int4 ? add_run<true> : add_run<false>)(values, weights, num_rows, sums, next);
}

bool suits(const CodeShape& shape) {
  return shape.head_dim <= kMaxCodeDim && shape.value_dim <= kMaxCodeDim &&
         shape.head_dim % 16 == 0 && shape.value_dim % 16 == 0 && shape.has_groups_of(32);
}

}  // namespace

const CodeKernels* avx512_vnni_code_kernels() {
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  static const CodeKernels kernels = {suits, score, add};
  return has_vnni ? &kernels : nullptr;
}

}  // namespace kvkernels
