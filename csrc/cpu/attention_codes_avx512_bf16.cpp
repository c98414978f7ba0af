// Products with 4-bit codes by dot products of bfloat16 (AVX512-BF16), which makes as many an
// instruction as of 16-bit integers. A code minus its middle is a small integer, which bfloat16
// holds exactly, and one instruction looks up 32 of them in a table that fits in a register.
//
// The float factor, multiplied by the scales, is rounded to bfloat16, as attention over a cache of
// bfloat16 rounds its weights and holds its keys. Rounding to integers would need a maximum and a
// unit first, for every 32 keys, as these have scales of their own: a third of the time.
#include <algorithm>
#include <array>
#include <bit>

#include "cpu/attention_codes_folding_avx512_bf16.h"

namespace kvkernels {
namespace {

// Code minus middle, as bfloat16. The table is there twice, so that the fifth bit of an index may
// be anything.
constexpr std::array<uint16_t, 32> make_table() {
  std::array<uint16_t, 32> table = {};
  for (int i = 0; i < 32; ++i) {
    const float value = static_cast<float>(i % 16) - kMiddle;
    table[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
  }
  return table;
}

alignas(64) constexpr std::array<uint16_t, 32> kTable = make_table();

// Looks up the four low bits of each 16-bit lane.
__m512i look_up(__m512i table, __m512i codes) { return _mm512_permutexvar_epi16(codes, table); }

// ---- keys ----------------------------------------------------------------------------------

// Transposes 32 bytes of each of 16 rows in units of 4 bytes: lane t of columns[c] is unit c of row
// t.
inline void transpose_keys(const uint8_t* rows, int64_t stride, __m512i* columns) {
  __m512i a[8], b[8];  // a[t]: row t in its lower half, row t + 8 in its upper half
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t) {
    const auto* low = reinterpret_cast<const __m256i*>(rows + t * stride);
    const auto* high = reinterpret_cast<const __m256i*>(rows + (t + 8) * stride);
    a[t] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(low)),
                              _mm256_loadu_si256(high), 1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[c] holds columns c and c + 4 of rows 0 to 3 and 8 to 11, a[c + 4] those of the other rows.
  const __m512i first = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0);
  const __m512i last = _mm512_add_epi64(first, _mm512_set1_epi64(2));
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    columns[c] = _mm512_permutex2var_epi64(a[c], first, a[c + 4]);
    columns[c + 4] = _mm512_permutex2var_epi64(a[c], last, a[c + 4]);
  }
}

// 16 rows of codes, whole pieces of each. `stride` is in bytes.
struct SixteenRows {
  const uint8_t* data;
  int64_t stride;
};

// Gives 16 keys as SixteenRows. Copies them if fewer are left, or if their rows end within a piece.
class KeyBuffer {
 public:
  template <bool kIsWhole>  // whether rows end with a piece
  SixteenRows find(const uint8_t* codes, int64_t count, const Piece& pieces) {
    const int64_t num_bytes = pieces.row_bytes();
    if (kIsWhole && count >= 16) return {codes, num_bytes};
    for (int64_t t = 0; t < 16; ++t) {
      for (int64_t i = 0; i < num_bytes; i += 32) {
        const __m256i bytes = t < count ? load_bytes<false>(codes + t * num_bytes, i, num_bytes)
                                        : _mm256_setzero_si256();
        _mm256_store_si256(reinterpret_cast<__m256i*>(rows_[t] + i), bytes);
      }
    }
    return {rows_[0], kMaxCodeDim / 2};
  }

 private:
  alignas(64) uint8_t rows_[16][kMaxCodeDim / 2];
};

// Scores 16 * kSets keys. A lane belongs to one key, so nothing is added across lanes.
template <int kRows, int kSets>
void score_keys(const SixteenRows* keys, int64_t num_pieces, const FoldedQuery& folded,
                float* scores) {
  // Independent sums, because products can start faster than one is done.
  constexpr int kSums = kRows * kSets > 4 ? 2 : 4;
  const __m512i table = _mm512_load_si512(kTable.data());
  __m512 sums[kRows][kSets][kSums];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512 base = _mm512_set1_ps(folded.base[4 * r]);
#pragma GCC unroll 8
    for (int i = 0; i < kSets * kSums; ++i) {
      sums[r][i / kSums][i % kSums] = i % kSums == 0 ? base : _mm512_setzero_ps();
    }
  }
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    __m512i columns[kSets][8];
#pragma GCC unroll 2
    for (int set = 0; set < kSets; ++set) {
      transpose_keys(keys[set].data + 32 * piece, keys[set].stride, columns[set]);
    }
    for (int c = 0; c < 8; ++c) {
#pragma GCC unroll 4
      for (int nibble = 0; nibble < 4; ++nibble) {
        __m512i codes[kSets];
#pragma GCC unroll 2
        for (int set = 0; set < kSets; ++set) {
          codes[set] = look_up(table, _mm512_srli_epi16(columns[set][c], 4 * nibble));
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i x = _mm512_set1_epi32(folded.pairs[r][32 * piece + 4 * c + nibble]);
#pragma GCC unroll 2
          for (int set = 0; set < kSets; ++set) {
            __m512& sum = sums[r][set][nibble % kSums];
            sum = add_products(sum, codes[set], x);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int set = 0; set < kSets; ++set) {
      const __m512* s = sums[r][set];
      const __m512 sum = kSums == 2 ? _mm512_add_ps(s[0], s[1])
                                    : _mm512_add_ps(_mm512_add_ps(s[0], s[1]),
                                                    _mm512_add_ps(s[kSums - 2], s[kSums - 1]));
      _mm512_storeu_ps(scores + r * kCodeRowStride + 16 * set, sum);
    }
  }
}

constexpr int64_t kMaxKeyGroups = kMaxKeys / 16;  // groups of keys in a tile, at most

// Scores a run's keys with kRows rows. kIsWhole: rows end with a piece. The query is folded with
// the scales of all groups first, so that the work for one group fills the waits of another.
template <bool kIsWhole, int kRows>
void score_rows(const CodeRun& run, const float* query, float* scores, ReadAhead& next) {
  const Piece pieces = {run.dim};
  const int64_t num_bytes = pieces.row_bytes(), group_size = run.block_size / run.groups;
  const int64_t first_group = run.slot / group_size, end = run.slot + run.count;
  FoldedQuery folded[kMaxKeyGroups];
  for (int64_t group = first_group; group * group_size < end; ++group) {
    fold_query<kIsWhole, kRows>(query, run.dim, run.scales + group * run.dim * 2,
                                folded[group - first_group]);
  }
  KeyBuffer buffers[2];
  for (int64_t slot = run.slot, count; slot < end; slot += count) {
    const int64_t group = slot / group_size;
    count = std::min({(group + 1) * group_size - slot, end - slot, int64_t{32}});
    const uint8_t* const rows = run.codes + slot * num_bytes;
    next.advance(count * num_bytes);
    const FoldedQuery& query_of_group = folded[group - first_group];
    float* const target = scores + slot - run.slot;
    SixteenRows keys[2] = {buffers[0].find<kIsWhole>(rows, count, pieces)};
    if (count > 16) {
      keys[1] = buffers[1].find<kIsWhole>(rows + 16 * num_bytes, count - 16, pieces);
      score_keys<kRows, 2>(keys, pieces.count(), query_of_group, target);
    } else {
      score_keys<kRows, 1>(keys, pieces.count(), query_of_group, target);
    }
  }
}

using ScoreRows = void (*)(const CodeRun&, const float*, float*, ReadAhead&);

template <bool kIsWhole>
constexpr ScoreRows kScoreRows[kMaxBatch + 1] = {nullptr, score_rows<kIsWhole, 1>,
                                                 score_rows<kIsWhole, 2>, score_rows<kIsWhole, 3>,
                                                 score_rows<kIsWhole, 4>};

void score(const CodeRun& keys, const float* query, int64_t num_rows, float* scores,
           ReadAhead& next) {
  const ScoreRows* const kernels =
      Piece{keys.dim}.are_whole() ? kScoreRows<true> : kScoreRows<false>;
  for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t count) {
    kernels[count](keys, query + first * keys.dim, scores + first * kCodeRowStride, next);
  });
}

// ---- values --------------------------------------------------------------------------------

// Interleaves two rows of codes, two bytes at a time.
__m512i interleave(__m256i a, __m256i b) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), order, _mm512_castsi256_si512(b));
}

// Adds one piece of each value of the run. Sums of even channels are kept apart from those of odd
// ones, as their codes lie in different bytes.
template <bool kIsWhole, int kRows>
void add_piece(const CodeRun& run, int64_t piece, const FoldedWeights& weights, const float* decay,
               float* sums, ReadAhead& next) {
  const Piece pieces = {run.dim};
  const int64_t num_bytes = pieces.row_bytes(), group_size = run.dim / run.groups;
  const uint8_t* codes = run.codes + run.slot * num_bytes + 32 * piece;
  const __m512i table = _mm512_load_si512(kTable.data());
  const int64_t left = num_bytes - 32 * piece;
  const int64_t stride = kLaneOrders[run.groups].stride;
  int64_t group[2];
  for (int half = 0; half < 2; ++half) {
    group[half] = std::min(pieces.begin(piece, half) / group_size, run.groups - 1);
  }
  next.advance(run.count * 32);
  __m512 products[kRows][2][2];  // [row][half][even or odd]
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      products[r][half][0] = products[r][half][1] = _mm512_set1_ps(weights.base[r][group[half]]);
    }
  }
  for (int64_t t = 0; t < run.count; t += 2) {
    // A key past the last has weight 0, so any codes will do.
    const int64_t odd = t + 1 < run.count ? t + 1 : t;
    const __m512i bytes = interleave(load_bytes<kIsWhole>(codes + t * num_bytes, 0, left),
                                     load_bytes<kIsWhole>(codes + odd * num_bytes, 0, left));
    __m512i pairs[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      pairs[0][i] = look_up(table, _mm512_srli_epi16(bytes, 8 * i));
      pairs[1][i] = look_up(table, _mm512_srli_epi16(bytes, 8 * i + 4));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i weight = _mm512_set1_epi32(weights.pairs[r][t / 2 * stride + group[half]]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          products[r][half][i] = add_products(products[r][half][i], pairs[half][i], weight);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 a = products[r][half][0], b = products[r][half][1];
      BFloat16::restore(a, b);
      const int64_t first = pieces.begin(piece, half);
      add_to_row(a, b, kIsWhole ? 32 : pieces.end(half) - first, decay[r],
                 sums + r * run.dim + first);
    }
  }
}

template <bool kIsWhole, int kRows>
void add_rows(const CodeRun& values, const float* weights, const float* decay, float* sums,
              ReadAhead& next) {
  FoldedWeights folded;
  fold_weights<kRows>(weights, values, folded);
  for (int64_t piece = 0; piece < Piece{values.dim}.count(); ++piece) {
    add_piece<kIsWhole, kRows>(values, piece, folded, decay, sums, next);
  }
}

using AddRows = void (*)(const CodeRun&, const float*, const float*, float*, ReadAhead&);

template <bool kIsWhole>
constexpr AddRows kAddRows[kMaxBatch + 1] = {nullptr, add_rows<kIsWhole, 1>, add_rows<kIsWhole, 2>,
                                             add_rows<kIsWhole, 3>, add_rows<kIsWhole, 4>};

void add(const CodeRun& values, const float* weights, int64_t num_rows, const float* decay,
         float* sums, ReadAhead& next) {
  const AddRows* const kernels = Piece{values.dim}.are_whole() ? kAddRows<true> : kAddRows<false>;
  for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t count) {
    kernels[count](values, weights + first * kCodeRowStride, decay + first,
                   sums + first * values.dim, next);
  });
}

bool suits(const CodeShape& shape) { return shape.is_int4 && suits_vectors(shape); }

}  // namespace

const CodeKernels* avx512_bf16_code_kernels() {
  static const CodeKernels kernels = {suits, 1, score_each<score>, add_each<add>};
  return &kernels;
}

}  // namespace kvkernels
