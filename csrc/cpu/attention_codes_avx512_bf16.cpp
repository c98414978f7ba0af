// Products with 4-bit codes by dot products of bfloat16 (AVX512-BF16): as many an instruction as of
// 16-bit integers. A code less its middle is a small whole number, which bfloat16 holds exactly,
// and one instruction finds 32 of them in a table that fits a register.
//
// The float side, folded with the scales, is rounded to bfloat16, as a cache of bfloat16 rounds the
// weights and holds the keys. No maximum must be known for that and no unit kept, which with whole
// numbers is a third of the time: each 32 keys have scales of their own.
#include <algorithm>
#include <array>
#include <bit>

#include "cpu/attention_codes_avx512.h"
#include "cpu/simd_avx512_bf16.h"

namespace kvkernels {
namespace {

using Piece = Pieces<true>;

constexpr int64_t kMaxKeyGroups = kMaxKeys / 16;  // of a tile
constexpr float kMiddle = middle_code(true);

__m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

__m512i round_to_pairs(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// first_lanes() without a branch. The instruction looks at 8 bits of a count.
__mmask16 lanes_of(int64_t count) {
  return static_cast<__mmask16>(
      _bzhi_u32(0xffff, static_cast<uint32_t>(std::clamp<int64_t>(count, 0, 16))));
}

// Code less middle, as bfloat16. Twice, so that the fifth bit of an index may be anything.
constexpr std::array<uint16_t, 32> make_table() {
  std::array<uint16_t, 32> table = {};
  for (int i = 0; i < 32; ++i) {
    const float value = static_cast<float>(i % 16) - kMiddle;
    table[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
  }
  return table;
}

alignas(64) constexpr std::array<uint16_t, 32> kTable = make_table();

// Of the four low bits of each 16.
__m512i look_up(__m512i table, __m512i codes) { return _mm512_permutexvar_epi16(codes, table); }

// ---- keys ----------------------------------------------------------------------------------

// In the order of pairs that `turn_keys` and nibbles give: 4 of each column.
struct alignas(64) FoldedQuery {
  int32_t pairs[kMaxBatch][kMaxCodeDim / 2];
  float base[16];  // of row r in quarter r: what the middle of all codes gives
};

template <int kRows>
void fold_query(const float* query, int64_t dim, const uint16_t* scales, FoldedQuery& folded) {
  const Piece pieces = {dim};
  // Of two halves of a piece, channels 0 and 2 of the first, of the second, 1 and 3 of both; then
  // those 4 further on, and so forth.
  const __m512i first_columns =
      _mm512_set_epi16(47, 45, 15, 13, 46, 44, 14, 12, 43, 41, 11, 9, 42, 40, 10, 8, 39, 37, 7, 5,
                       38, 36, 6, 4, 35, 33, 3, 1, 34, 32, 2, 0);
  const __m512i last_columns = _mm512_add_epi16(first_columns, _mm512_set1_epi16(16));
  __m512 base[kRows], more[kRows];  // two sums: one would wait for itself
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) base[r] = more[r] = _mm512_setzero_ps();
  for (int64_t piece = 0; piece < pieces.count(); ++piece) {
    __m512i halves[kRows][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t first = pieces.begin(piece, half), count = pieces.end(half) - first;
      const Scales low = load_scales(scales + 2 * first, lanes_of(count), kMiddle);
      const Scales high = load_scales(scales + 2 * first + 32, lanes_of(count - 16), kMiddle);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const float* row = query + r * dim + first;
        const __m512 a = _mm512_maskz_loadu_ps(lanes_of(count), row);
        const __m512 b = _mm512_maskz_loadu_ps(lanes_of(count - 16), row + 16);
        base[r] = _mm512_fmadd_ps(a, low.middle, base[r]);
        more[r] = _mm512_fmadd_ps(b, high.middle, more[r]);
        halves[r][half] = round_to_pairs(_mm512_mul_ps(a, low.scale), _mm512_mul_ps(b, high.scale));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      int32_t* const pairs = folded.pairs[r] + 32 * piece;
      const auto [low, high] = halves[r];
      _mm512_store_si512(pairs, _mm512_permutex2var_epi16(low, first_columns, high));
      _mm512_store_si512(pairs + 16, _mm512_permutex2var_epi16(low, last_columns, high));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) base[r] = _mm512_add_ps(base[r], more[r]);
  _mm512_store_ps(folded.base, combine_rows<kRows>(base, SumOf()));
}

// 32 bytes of each of 16 rows in columns of 4: lane t of columns[c] is that of row t.
inline void turn_keys(const uint8_t* rows, int64_t stride, __m512i* columns) {
  __m512i a[8], b[8];  // quarters 0 and 1 of rows 0 to 7, 2 and 3 of rows 8 to 15
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
  // Columns c and c + 4 of rows 0 to 3 and 8 to 11 are in a[c], of the others in a[c + 4].
  const __m512i first = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0);
  const __m512i last = _mm512_add_epi64(first, _mm512_set1_epi64(2));
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    columns[c] = _mm512_permutex2var_epi64(a[c], first, a[c + 4]);
    columns[c + 4] = _mm512_permutex2var_epi64(a[c], last, a[c + 4]);
  }
}

// Where 16 rows of codes are, whole pieces of each.
struct SixteenRows {
  const uint8_t* data;
  int64_t stride;
};

// Keys of which fewer are left, or whose rows end within a piece, are copied.
class KeyBuffer {
 public:
  SixteenRows find(const uint8_t* codes, int64_t count, const Piece& pieces) {
    const int64_t num_bytes = pieces.row_bytes();
    if (count >= 16 && pieces.are_whole()) return {codes, num_bytes};
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

// Scores of 16 * kSets keys, whose codes lie in lanes for that: products need not be added across.
template <int kRows, int kSets>
void score_keys(const SixteenRows* keys, int64_t num_pieces, const FoldedQuery& folded,
                float* scores) {
  // Independent sums, for products follow each other faster than one is done.
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
      turn_keys(keys[set].data + 32 * piece, keys[set].stride, columns[set]);
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

// Scores of a run's keys with kRows rows. The query is folded with the scales of all groups first:
// what one group waits for, the next can do meanwhile.
template <int kRows>
void score_rows(const CodeRun& run, const float* query, float* scores, const Ahead& next) {
  const Piece pieces = {run.dim};
  const int64_t num_bytes = pieces.row_bytes(), group_size = run.block_size / run.groups;
  const int64_t first_group = run.slot / group_size, end = run.slot + run.count;
  FoldedQuery folded[kMaxKeyGroups];
  for (int64_t group = first_group; group * group_size < end; ++group) {
    fold_query<kRows>(query, run.dim, run.scales + group * run.dim * 2,
                      folded[group - first_group]);
  }
  KeyBuffer buffers[2];
  for (int64_t slot = run.slot, count; slot < end; slot += count) {
    const int64_t group = slot / group_size;
    count = std::min({(group + 1) * group_size - slot, end - slot, int64_t{32}});
    const uint8_t* const rows = run.codes + slot * num_bytes;
    next(count * num_bytes);
    const FoldedQuery& query_of_group = folded[group - first_group];
    float* const target = scores + slot - run.slot;
    SixteenRows keys[2] = {buffers[0].find(rows, count, pieces)};
    if (count > 16) {
      keys[1] = buffers[1].find(rows + 16 * num_bytes, count - 16, pieces);
      score_keys<kRows, 2>(keys, pieces.count(), query_of_group, target);
    } else {
      score_keys<kRows, 1>(keys, pieces.count(), query_of_group, target);
    }
  }
}

using ScoreRows = void (*)(const CodeRun&, const float*, float*, const Ahead&);

constexpr ScoreRows kScoreRows[kMaxBatch + 1] = {nullptr, score_rows<1>, score_rows<2>,
                                                 score_rows<3>, score_rows<4>};

void score(const CodeRun& keys, const float* query, int64_t num_rows, float* scores,
           const Ahead& next) {
  for_each_batch(num_rows, [&](int64_t first, int64_t count) {
    kScoreRows[count](keys, query + first * keys.dim, scores + first * kCodeRowStride, next);
  });
}

// ---- values --------------------------------------------------------------------------------

// Numbers that belong to a key and a group of channels lie in lanes, key by key, `stride` lanes a
// key: the groups rounded up to a power of two. Where two vectors of them go apart into keys at
// even and at odd places.
struct alignas(64) LaneOrder {
  int16_t even[32], odd[32];  // scales, then minimums, in two vectors of pairs of them
  int32_t even_weight[16], odd_weight[16];  // in two vectors of weights, one a key
  int64_t stride, keys_a_vector;
};

constexpr std::array<LaneOrder, kMaxGroups + 1> make_lane_orders() {
  std::array<LaneOrder, kMaxGroups + 1> orders = {};
  for (int groups = 1; groups <= kMaxGroups; ++groups) {
    LaneOrder& order = orders[groups];
    order.stride = static_cast<int64_t>(std::bit_ceil(static_cast<unsigned>(groups)));
    order.keys_a_vector = 16 / order.stride;
    const int stride = static_cast<int>(order.stride), keys_a_vector = 16 / stride;
    for (int lane = 0; lane < 16; ++lane) {
      const int group = lane % stride < groups ? lane % stride : 0;
      for (int is_odd = 0; is_odd < 2; ++is_odd) {
        const int key = lane / stride * 2 + is_odd;
        const int pair = key / keys_a_vector * 16 + key % keys_a_vector * groups + group;
        int16_t* const numbers = is_odd ? order.odd : order.even;
        numbers[lane] = static_cast<int16_t>(2 * pair);
        numbers[lane + 16] = static_cast<int16_t>(2 * pair + 1);
        (is_odd ? order.odd_weight : order.even_weight)[lane] = key;
      }
    }
  }
  return orders;
}

constexpr std::array<LaneOrder, kMaxGroups + 1> kLaneOrders = make_lane_orders();

constexpr int64_t kPairsOfRow = kMaxKeys / 2 * kMaxGroups;

// Of each row, in lanes: pairs of neighbouring keys, as bfloat16; what the middle of all codes
// gives.
struct alignas(64) FoldedWeights {
  int32_t pairs[kMaxBatch][kPairsOfRow];
  float base[kMaxBatch][16];
};

// Sums of the lanes that are `stride` apart, in the first `stride` of them.
__m512 sum_keys(__m512 lanes, int64_t stride) {
  lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4e));
  if (stride <= 4) lanes = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xb1));
  if (stride <= 2) lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0x4e));
  if (stride == 1) lanes = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0xb1));
  return lanes;
}

template <int kRows>
void fold_weights(const float* weights, const CodeRun& run, FoldedWeights& folded) {
  const LaneOrder& order = kLaneOrders[run.groups];
  const int64_t keys_a_vector = order.keys_a_vector, groups = run.groups;
  const uint16_t* scales = run.scales + run.slot * groups * 2;
  const __m512i even_order = _mm512_load_si512(order.even);
  const __m512i odd_order = _mm512_load_si512(order.odd);
  const __m512i even_weights = _mm512_load_si512(order.even_weight);
  const __m512i odd_weights = _mm512_load_si512(order.odd_weight);
  __m512 base[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) base[r] = _mm512_setzero_ps();
  int32_t* target = folded.pairs[0];
  for (int64_t left = run.count; left > 0; left -= 2 * keys_a_vector) {
    const __m512i a = _mm512_maskz_loadu_epi32(lanes_of(left * groups), scales);
    const __m512i b = _mm512_maskz_loadu_epi32(lanes_of((left - keys_a_vector) * groups),
                                               scales + 2 * keys_a_vector * groups);
    const __mmask16 low_weights = lanes_of(left), high_weights = lanes_of(left - 16);
    const Scales even = widen_scales(_mm512_permutex2var_epi16(a, even_order, b), kMiddle);
    const Scales odd = widen_scales(_mm512_permutex2var_epi16(a, odd_order, b), kMiddle);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float* row = weights + r * kCodeRowStride;
      const __m512 low = _mm512_maskz_loadu_ps(low_weights, row);
      const __m512 high = _mm512_maskz_loadu_ps(high_weights, row + 16);
      const __m512 x = _mm512_permutex2var_ps(low, even_weights, high);
      const __m512 y = _mm512_permutex2var_ps(low, odd_weights, high);
      base[r] = _mm512_fmadd_ps(x, even.middle, base[r]);
      base[r] = _mm512_fmadd_ps(y, odd.middle, base[r]);
      _mm512_store_ps(target + r * kPairsOfRow,
                      round_pairs(_mm512_mul_ps(x, even.scale), _mm512_mul_ps(y, odd.scale)));
    }
    weights += 2 * keys_a_vector;
    scales += 4 * keys_a_vector * groups;
    target += 16;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) _mm512_store_ps(folded.base[r], sum_keys(base[r], order.stride));
}

// Two rows of codes, two bytes of each in turn.
__m512i interleave(__m256i a, __m256i b) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), order, _mm512_castsi256_si512(b));
}

// One piece of each value of the run. Sums of channels at even places are kept apart from those at
// odd ones: their codes lie in different bytes.
template <bool kIsWhole, int kRows>
void add_piece(const CodeRun& run, int64_t piece, const FoldedWeights& weights, const float* decay,
               float* sums, const Ahead& next) {
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
  next(run.count * 32);
  __m512 products[kRows][2][2];  // [row][half][even or odd]
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      products[r][half][0] = products[r][half][1] = _mm512_set1_ps(weights.base[r][group[half]]);
    }
  }
  for (int64_t t = 0; t < run.count; t += 2) {
    // A key past the last has no weight.
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
      add_to_row(a, b, pieces.end(half) - first, decay[r], sums + r * run.dim + first);
    }
  }
}

template <bool kIsWhole, int kRows>
void add_rows(const CodeRun& values, const float* weights, const float* decay, float* sums,
              const Ahead& next) {
  FoldedWeights folded;
  fold_weights<kRows>(weights, values, folded);
  for (int64_t piece = 0; piece < Piece{values.dim}.count(); ++piece) {
    add_piece<kIsWhole, kRows>(values, piece, folded, decay, sums, next);
  }
}

using AddRows = void (*)(const CodeRun&, const float*, const float*, float*, const Ahead&);

template <bool kIsWhole>
constexpr AddRows kAddRows[kMaxBatch + 1] = {nullptr, add_rows<kIsWhole, 1>, add_rows<kIsWhole, 2>,
                                             add_rows<kIsWhole, 3>, add_rows<kIsWhole, 4>};

void add(const CodeRun& values, const float* weights, int64_t num_rows, const float* decay,
         float* sums, const Ahead& next) {
  const AddRows* const kernels = Piece{values.dim}.are_whole() ? kAddRows<true> : kAddRows<false>;
  for_each_batch(num_rows, [&](int64_t first, int64_t count) {
    kernels[count](values, weights + first * kCodeRowStride, decay + first,
                   sums + first * values.dim, next);
  });
}

bool suits(const CodeShape& shape) { return shape.is_int4 && suits_vectors(shape); }

}  // namespace

const CodeKernels* avx512_bf16_code_kernels() {
  static const CodeKernels kernels = {suits, score, add};
  return &kernels;
}

}  // namespace kvkernels
