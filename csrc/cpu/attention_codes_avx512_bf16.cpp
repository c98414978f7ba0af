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
  __m512i a[8], b[8];  // a[t]: rows 0 to 3, then 8 to 11 in lower halves, those 4 further in upper
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t) {
    const uint8_t* const row = rows + (t + t / 4 * 4) * stride;
    const auto* low = reinterpret_cast<const __m256i*>(row);
    const auto* high = reinterpret_cast<const __m256i*>(row + 4 * stride);
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
  // Each quarter of a[c] holds 4 rows of column c or c + 4, in turn; a[c + 4] holds the last 8
  // rows.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    columns[c] = _mm512_shuffle_i64x2(a[c], a[c + 4], 0x88);
    columns[c + 4] = _mm512_shuffle_i64x2(a[c], a[c + 4], 0xdd);
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

// 16 * kSets keys of up to kMaxCodeDim channels, transposed piece by piece.
template <int kSets>
using TransposedKeys = __m512i[kMaxCodeDim / 64][kSets][8];

// Scores 16 * kSets keys. A lane belongs to one key, so nothing is added across lanes.
template <int kRows, int kSets, Asking kAsking>
void score_keys(const SixteenRows* keys, int64_t num_pieces, const FoldedQuery& folded,
                float* scores, ReadAhead& next) {
  // Independent sums, because products can start faster than one is done.
  constexpr int kSums = kRows * kSets > 4 ? 2 : 4;
  // All pieces first: beside the sums there are not registers enough to transpose, and a sum that
  // waits in memory is late for the next product (a tenth of the time on Zen 5).
  TransposedKeys<kSets> columns;
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
#pragma GCC unroll 2
    for (int set = 0; set < kSets; ++set) {
      transpose_keys(keys[set].data + 32 * piece, keys[set].stride, columns[piece][set]);
    }
  }
  const __m512i table = _mm512_load_si512(kTable.data());
  __m512 sums[kRows][kSets][kSums];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kSets * kSums; ++i) sums[r][i / kSums][i % kSums] = _mm512_setzero_ps();
  }
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    auto ahead = next.take<kAsking>(kSets * 512, keys[0].data);
    for (int c = 0; c < 8; ++c) {
      ahead.template ask<kSets * 64>();
#pragma GCC unroll 4
      for (int nibble = 0; nibble < 4; ++nibble) {
        __m512i codes[kSets];
#pragma GCC unroll 2
        for (int set = 0; set < kSets; ++set) {
          codes[set] = look_up(table, _mm512_srli_epi16(columns[piece][set][c], 4 * nibble));
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
      const __m512 base = _mm512_set1_ps(folded.base[4 * r]);
      _mm512_storeu_ps(scores + r * kCodeRowStride + 16 * set, _mm512_add_ps(sum, base));
    }
  }
}

constexpr int64_t kMaxKeyGroups = kMaxKeys / 16;  // groups of keys in a tile, at most

// Scores a run's keys with kRows rows. kIsWhole: rows end with a piece. The query is folded with
// the scales of all groups first, so that the work for one group fills the waits of another.
template <bool kIsWhole, Asking kAsking, int kRows>
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
    const FoldedQuery& query_of_group = folded[group - first_group];
    float* const target = scores + slot - run.slot;
    SixteenRows keys[2] = {buffers[0].find<kIsWhole>(rows, count, pieces)};
    if (count > 16) {
      keys[1] = buffers[1].find<kIsWhole>(rows + 16 * num_bytes, count - 16, pieces);
      score_keys<kRows, 2, kAsking>(keys, pieces.count(), query_of_group, target, next);
    } else {
      score_keys<kRows, 1, kAsking>(keys, pieces.count(), query_of_group, target, next);
    }
  }
}

using ScoreRows = void (*)(const CodeRun&, const float*, float*, ReadAhead&);

template <bool kIsWhole, Asking kAsking>
constexpr ScoreRows kScoreRows[kMaxBatch + 1] = {
    nullptr, score_rows<kIsWhole, kAsking, 1>, score_rows<kIsWhole, kAsking, 2>,
    score_rows<kIsWhole, kAsking, 3>, score_rows<kIsWhole, kAsking, 4>};

void score(const CodeRun& keys, const float* query, int64_t num_rows, float* scores,
           ReadAhead& next) {
  const auto score_with = [&](const ScoreRows* kernels) {
    for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t count) {
      kernels[count](keys, query + first * keys.dim, scores + first * kCodeRowStride, next);
    });
  };
  if (Piece{keys.dim}.are_whole()) {
    with_asking_once([&](auto asking) { score_with(kScoreRows<true, asking()>); });
  } else {
    score_with(kScoreRows<false, kUsually>);
  }
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
template <bool kIsWhole, Asking kAsking, int kRows>
void add_piece(const CodeRun& run, int64_t piece, const FoldedWeights& weights, const float* decay,
               float* sums, ReadAhead& next) {
  const int64_t dim = run.dim;
  const Piece pieces = {dim};
  const int64_t num_bytes = pieces.row_bytes(), group_size = dim / run.groups;
  const int64_t left = num_bytes - 32 * piece;
  const int64_t stride = kLaneOrders[run.groups].stride;
  int64_t group[2];
  for (int half = 0; half < 2; ++half) {
    group[half] = std::min(pieces.begin(piece, half) / group_size, run.groups - 1);
  }
  __m512 products[kRows][2][2];  // [row][half][even or odd]
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) products[r][i / 2][i % 2] = _mm512_setzero_ps();
  }
  const __m512i table = _mm512_load_si512(kTable.data());
  // Where the next pair of keys, and its weights for each half, begin.
  const uint8_t* key = run.codes + run.slot * num_bytes + 32 * piece;
  const int32_t *low_weights = weights.pairs[0] + group[0],
                *high_weights = weights.pairs[0] + group[1];
  const auto add_pair = [&](const uint8_t* odd) {
    const __m512i bytes =
        interleave(load_bytes<kIsWhole>(key, 0, left), load_bytes<kIsWhole>(odd, 0, left));
    key += 2 * num_bytes;
    __m512i pairs[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      pairs[0][i] = look_up(table, _mm512_srli_epi16(bytes, 8 * i));
      pairs[1][i] = look_up(table, _mm512_srli_epi16(bytes, 8 * i + 4));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i low = _mm512_set1_epi32(low_weights[r * kPairsOfRow]);
      const __m512i high = _mm512_set1_epi32(high_weights[r * kPairsOfRow]);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        products[r][0][i] = add_products(products[r][0][i], pairs[0][i], low);
        products[r][1][i] = add_products(products[r][1][i], pairs[1][i], high);
      }
    }
    low_weights += stride;
    high_weights += stride;
  };
  constexpr int64_t kStep = 32;  // keys
  for (int64_t begin = 0; begin < run.count; begin += kStep) {
    const int64_t count = std::min(run.count - begin, kStep);
    auto ahead = next.take<kAsking>(32 * kStep, key);
    for (int64_t t = 0; t + 1 < count; t += 2) {
      ahead.template ask<64>();
      add_pair(key + num_bytes);
    }
    // A key past the last has weight 0, so any codes will do.
    if (count % 2 == 1) add_pair(key);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      // The products need not wait for the base when they begin.
      const __m512 base = _mm512_set1_ps(weights.base[r][2 * group[half]]);
      __m512 a = _mm512_add_ps(products[r][half][0], base);
      __m512 b = _mm512_add_ps(products[r][half][1], base);
      BFloat16::restore(a, b);
      const int64_t first = pieces.begin(piece, half);
      add_to_row(a, b, kIsWhole ? 32 : pieces.end(half) - first, decay[r], sums + r * dim + first);
    }
  }
}

template <bool kIsWhole, Asking kAsking, int kRows>
void add_rows(const CodeRun& values, const float* weights, const float* decay, float* sums,
              ReadAhead& next) {
  FoldedWeights folded;
  fold_weights<kRows>(weights, values, folded);
  for (int64_t piece = 0; piece < Piece{values.dim}.count(); ++piece) {
    add_piece<kIsWhole, kAsking, kRows>(values, piece, folded, decay, sums, next);
  }
}

using AddRows = void (*)(const CodeRun&, const float*, const float*, float*, ReadAhead&);

template <bool kIsWhole, Asking kAsking>
constexpr AddRows kAddRows[kMaxBatch + 1] = {
    nullptr, add_rows<kIsWhole, kAsking, 1>, add_rows<kIsWhole, kAsking, 2>,
    add_rows<kIsWhole, kAsking, 3>, add_rows<kIsWhole, kAsking, 4>};

void add(const CodeRun& values, const float* weights, int64_t num_rows, const float* decay,
         float* sums, ReadAhead& next) {
  const auto add_with = [&](const AddRows* kernels) {
    for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t count) {
      kernels[count](values, weights + first * kCodeRowStride, decay + first,
                     sums + first * values.dim, next);
    });
  };
  if (Piece{values.dim}.are_whole()) {
    with_asking_once([&](auto asking) { add_with(kAddRows<true, asking()>); });
  } else {
    add_with(kAddRows<false, kUsually>);
  }
}

bool suits(const CodeShape& shape) { return shape.is_int4 && suits_vectors(shape); }

}  // namespace

const CodeKernels* avx512_bf16_code_kernels() {
  static const CodeKernels kernels = {suits, 1, score_each<score>, add_each<add>};
  return &kernels;
}

}  // namespace kvkernels
