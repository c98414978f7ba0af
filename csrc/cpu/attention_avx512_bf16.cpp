// Attention of bfloat16 with AVX512-BF16. One instruction multiplies 16 pairs and adds both
// products of each to a float: twice as many products as on floats, and nothing to widen. The
// softmax weights are rounded to bfloat16 for the product with the values; the sum of the weights
// is taken before rounding.
#include "cpu/attention_few_rows_avx512.h"
#include "cpu/attention_many_rows_avx512.h"
#include "cpu/simd_avx512_bf16.h"

namespace kvkernels {
namespace {

// 32 elements, of which the first `count` (even) are loaded and the rest are 0.
__m512i load_some(const uint16_t* p, int64_t count) {
  return _mm512_maskz_loadu_epi32(first_lanes(count / 2), p);
}

__m512i load_or_zero(const uint16_t* p, int64_t first, int64_t count) {
  return p == nullptr ? _mm512_setzero_si512() : load_some(p + first, count);
}

// a0 b0 a1 b1 ... of the elements 0 to 15 (kHalf 0), or 16 to 31 (kHalf 1).
template <int kHalf>
__m512i interleave(__m512i a, __m512i b) {
  const __m512i pairs = _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a,
                                         0x290009, 0x280008, 0x270007, 0x260006, 0x250005, 0x240004,
                                         0x230003, 0x220002, 0x210001, 0x200000);
  const __m512i indices = _mm512_add_epi32(pairs, _mm512_set1_epi32(kHalf * 0x100010));
  return _mm512_permutex2var_epi16(a, indices, b);
}

// Quarters (128 bits) kFirst and kFirst + 1 of a and b in turn: a b a b.
template <int kFirst>
__m512 merge_quarters(__m512 a, __m512 b) {
  const __m512i indices =
      _mm512_add_epi64(_mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), _mm512_set1_epi64(2 * kFirst));
  return _mm512_castpd_ps(
      _mm512_permutex2var_pd(_mm512_castps_pd(a), indices, _mm512_castps_pd(b)));
}

// Rounds `num_weights` weights, up to the next 16, to bfloat16, in place.
void round_weights(float* weights, int64_t num_weights) {
  auto* rounded = reinterpret_cast<uint16_t*>(weights);
  for (int64_t i = 0; i < num_weights; i += 32) {
    const bool has_more = i + 16 < num_weights;
    const __m512 a = _mm512_load_ps(weights + i);
    const __m512 b = has_more ? _mm512_load_ps(weights + i + 16) : _mm512_setzero_ps();
    _mm512_store_si512(rounded + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }
}

// ---- few rows ------------------------------------------------------------------------------

using Rows16 = CacheRows<uint16_t>;

// Adds the products of the 32 elements from `i` on to the sums, and asks for as many bytes `ahead`.
// kIsWhole: all 32 are there.
template <int kRows, int kTokens, bool kIsWhole, typename Lines>
inline void add_key_products(const float* query, int64_t head_dim, const uint16_t* const* keys,
                             int64_t i, Lines& ahead, __m512* sums) {
  __m512i q[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) q[r] = _mm512_load_si512(query + r * head_dim + i / 2);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    const __m512i key =
        kIsWhole ? _mm512_loadu_si512(keys[t] + i) : load_some(keys[t] + i, head_dim - i);
    ahead.template ask<kIsWhole ? 64 : 32>();
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r * kTokens + t] = add_products(sums[r * kTokens + t], q[r], key);
    }
  }
}

// Scores up to 4 rows: an instruction multiplies 16 pairs of channels of one row and one key.
template <Asking kAsking, int kRows>
void score_pairs(const float* query, int64_t head_dim, const Rows16& keys, ReadAhead& next,
                 int64_t num_keys, float* scores) {
  using Columns = SixteenColumns<kRows>;
  constexpr int kTokens = Columns::kColumns;
  for (int64_t first = 0; first < num_keys; first += 16) {
    Columns columns;
#pragma GCC unroll 4
    for (int part = 0; part < 16 / kTokens; ++part) {
      const uint16_t* rows[kTokens];
      __m512 sums[kRows * kTokens];
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) rows[t] = keys.row(first + part * kTokens + t);
#pragma GCC unroll 16
      for (__m512& sum : sums) sum = _mm512_setzero_ps();
      auto ahead = next.take<kAsking>(kTokens * head_dim * 2, rows[0]);
      int64_t i = 0;
      for (; i + 32 <= head_dim; i += 32) {
        add_key_products<kRows, kTokens, true>(query, head_dim, rows, i, ahead, sums);
      }
      if (i < head_dim) {
        add_key_products<kRows, kTokens, false>(query, head_dim, rows, i, ahead, sums);
      }
      columns.take(part, sums);
    }
    store_scores(columns, first, scores);
  }
}

// Scores 5 to 8 rows: a vector holds 2 pairs of channels for each of 8 rows, so that little must be
// added across lanes. The load repeats two pairs of a key for all rows, at no cost on Zen 5 (4
// pairs would be half as many loads, but run on the ports of the products, and took a tenth
// longer). One core decoded 7 rows of head_dim 64 in 15 % less time than 4 rows and then 3.
//
// Queries lie in that order: [head_dim / 4, 8, 4]. Returns an offset in elements.
inline int64_t place_in_eights(int64_t row, int64_t channel) { return 8 * channel + 4 * row; }

// Adds up the sums of 4 keys, which are in lanes 2 r and 2 r + 1 for row r. Quarter q of `even`
// gets the 4 keys' sums for row 2 q, that of `odd` those for row 2 q + 1.
inline void combine_eights(const __m512* keys, __m512& even, __m512& odd) {
  __m512 both[2];  // in each quarter: its two rows in turn, for two keys
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = keys[2 * i], b = keys[2 * i + 1];
    both[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }
  even = _mm512_shuffle_ps(both[0], both[1], 0x88);
  odd = _mm512_shuffle_ps(both[0], both[1], 0xdd);
}

template <Asking kAsking, int kRows>
void score_eights(const float* query, int64_t head_dim, const Rows16& keys, ReadAhead& next,
                  int64_t num_keys, float* scores) {
  constexpr int kTokens = 8;
  const auto* eights = reinterpret_cast<const uint16_t*>(query);
  for (int64_t first = 0; first < num_keys; first += 16) {
    __m512 even[4], odd[4];
#pragma GCC unroll 1
    for (int part = 0; part < 16 / kTokens; ++part) {
      const uint16_t* rows[kTokens];
      __m512 sums[2][kTokens];  // channels in turn: hides a product's latency
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        rows[t] = keys.row(first + part * kTokens + t);
        sums[0][t] = sums[1][t] = _mm512_setzero_ps();
      }
      auto ahead = next.take<kAsking>(kTokens * head_dim * 2, rows[0]);
      for (int64_t i = 0; i < head_dim; i += 8) {
        ahead.template ask<kTokens * 16>();
#pragma GCC unroll 2
        for (int step = 0; step < 2; ++step) {
          const __m512i q = _mm512_load_si512(eights + place_in_eights(0, i + 4 * step));
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            const __m128i pairs = _mm_loadu_si64(rows[t] + i + 4 * step);
            sums[step][t] = add_products(sums[step][t], q, _mm512_broadcastq_epi64(pairs));
          }
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) sums[0][t] = _mm512_add_ps(sums[0][t], sums[1][t]);
      combine_eights(sums[0], even[2 * part], odd[2 * part]);
      combine_eights(sums[0] + 4, even[2 * part + 1], odd[2 * part + 1]);
    }
    transpose_quarters(even);
    transpose_quarters(odd);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      _mm512_store_ps(scores + r * kTileKeys + first, (r % 2 == 0 ? even : odd)[r / 2]);
    }
  }
}

template <int kRows>
void score_rows(const float* query, int64_t head_dim, const Rows16& keys, ReadAhead& next,
                int64_t num_keys, float* scores) {
  with_asking(next, [&](auto asking) {
    if constexpr (kRows <= kBatch) {
      score_pairs<asking(), kRows>(query, head_dim, keys, next, num_keys, scores);
    } else {
      score_eights<asking(), kRows>(query, head_dim, keys, next, num_keys, scores);
    }
  });
}

// Adds the products of two values with their weights, and asks for as many bytes `ahead`. `odd` may
// be null: there is one value alone.
template <int kRows, int kVectors, typename Lines>
[[gnu::always_inline]] inline void add_two_values(const float* weights, const uint16_t* even,
                                                  const uint16_t* odd, Lines& ahead,
                                                  __m512 (*sums)[kVectors]) {
  constexpr int kCount = kVectors == 1 ? 16 : 32;
  __m512i pairs[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i += 2) {
    const __m512i a = load_some(even + 16 * i, kCount);
    const __m512i b = load_or_zero(odd, 16 * i, kCount);
    if constexpr (kVectors == 1) {
      pairs[i] = interleave<0>(a, b);
    } else {
      pairs[i] = _mm512_unpacklo_epi16(a, b);
      pairs[i + 1] = _mm512_unpackhi_epi16(a, b);
    }
  }
  ahead.template ask<2 * 16 * kVectors * 2>();
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512i weight = _mm512_castps_si512(_mm512_set1_ps(weights[r * kTileKeys]));
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sums[r][i] = add_products(sums[r][i], weight, pairs[i]);
  }
}

// `out` holds 32 neighbouring channels in another order: those at 0 to 3 of every 8 first, then
// those at 4 to 7. The cheapest unpacking of pairs gives that order; one that keeps the channels in
// order costs half as much again.
template <Asking kAsking, int kRows, int kVectors>
void add_value_pairs(const float* weights, const float* decay, const Rows16& values,
                     ReadAhead& next, int64_t num_keys, int64_t head_dim, int64_t first,
                     float* out) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums[r][i] = _mm512_mul_ps(_mm512_set1_ps(decay[r]),
                                 _mm512_load_ps(out + r * head_dim + first + 16 * i));
    }
  }
  constexpr int64_t kTokenBytes = 16 * kVectors * 2;
  const Rows16 panel = {values.cache + first, values.offsets};
  for (int64_t begin = 0; begin < num_keys; begin += 16) {
    const int64_t end = std::min<int64_t>(begin + 16, num_keys);
    auto ahead = next.take<kAsking>((end - begin) * kTokenBytes, panel.row(begin));
    int64_t t = begin;
    for (; t + 2 <= end; t += 2) {
      add_two_values<kRows, kVectors>(weights + t / 2, panel.row(t), panel.row(t + 1), ahead, sums);
    }
    if (t < end) {
      add_two_values<kRows, kVectors>(weights + t / 2, panel.row(t), nullptr, ahead, sums);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      _mm512_store_ps(out + r * head_dim + first + 16 * i, sums[r][i]);
    }
  }
}

template <int kRows>
void add_pairs(float* weights, const float* decay, const Rows16& values, ReadAhead& next,
               int64_t num_keys, int64_t head_dim, float* out) {
  for (int r = 0; r < kRows; ++r) round_weights(weights + r * kTileKeys, num_keys);
  // As many sums as fit in registers.
  constexpr int kVectors = kRows <= 4 ? 4 : 2;
  with_asking(next, [&](auto asking) {
    int64_t i = 0;
    for (; i + 16 * kVectors <= head_dim; i += 16 * kVectors) {
      add_value_pairs<asking(), kRows, kVectors>(weights, decay, values, next, num_keys, head_dim,
                                                 i, out);
    }
    if (kVectors == 4 && i + 32 <= head_dim) {
      add_value_pairs<asking(), kRows, 2>(weights, decay, values, next, num_keys, head_dim, i, out);
      i += 32;
    }
    if (i < head_dim) {
      add_value_pairs<asking(), kRows, 1>(weights, decay, values, next, num_keys, head_dim, i, out);
    }
  });
}

struct PairRows {
  using Element = BFloat16;
  using Item = uint16_t;
  using Unpacker = Avx512Unpacker<RoundedBFloat16>;

  static constexpr ScoreRows<Item> kScore[] = {nullptr,       score_rows<1>, score_rows<2>,
                                               score_rows<3>, score_rows<4>, score_rows<5>,
                                               score_rows<6>, score_rows<7>, score_rows<8>};
  static constexpr AddRows<Item> kAdd[] = {nullptr,      add_pairs<1>, add_pairs<2>,
                                           add_pairs<3>, add_pairs<4>, add_pairs<5>,
                                           add_pairs<6>, add_pairs<7>, add_pairs<8>};

  static const CodeKernels* code_kernels(const CodeShape& shape) {
    return shape.is_int4 ? avx512_bf16_code_kernels() : avx512_vnni_code_kernels();
  }

  static void start_row(const Item* query, int64_t row, int64_t num_rows, int64_t head_dim,
                        float* target) {
    if (num_rows <= kBatch) {
      for (int64_t i = 0; i < head_dim; i += 32) {
        _mm512_store_si512(target + row * head_dim + i / 2, load_some(query + i, head_dim - i));
      }
      return;
    }
    // The last row is repeated to fill up to 8; what comes of the copies is not read.
    const int64_t end = row + 1 == num_rows ? 8 : row + 1;
    for (int64_t i = 0; i < head_dim; i += 4) {
      const __m128i channels = _mm_loadu_si64(query + i);
      for (int64_t r = row; r < end; ++r) {
        _mm_storeu_si64(reinterpret_cast<Item*>(target) + place_in_eights(r, i), channels);
      }
    }
  }

  static void finish_row(const float* out, float* target, int64_t head_dim) {
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) {
      const __m512 a = _mm512_load_ps(out + i), b = _mm512_load_ps(out + i + 16);
      _mm512_storeu_ps(target + i, merge_quarters<0>(a, b));
      _mm512_storeu_ps(target + i + 16, merge_quarters<2>(a, b));
    }
    if (i < head_dim) _mm512_storeu_ps(target + i, _mm512_load_ps(out + i));
  }
};

// ---- many rows -----------------------------------------------------------------------------

// Rounded to bfloat16 as they are written: two weights of neighbouring keys per lane, in the front
// half of the row.
struct PairWeights {
  using Element = BFloat16;

  template <int kVectors>
  static void store(const __m512* weights, float* row) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i += 2) {
      const __m512 more = i + 1 < kVectors ? weights[i + 1] : _mm512_setzero_ps();
      const __m512bh rounded = _mm512_cvtne2ps_pbh(more, weights[i]);
      _mm512_store_si512(row + 8 * i, reinterpret_cast<__m512i>(rounded));
    }
  }
};

// Two bfloat16 per lane.
struct PairLanes {
  using Weights = PairWeights;
  using Item = uint16_t;
  using Unpacker = Avx512Unpacker<RoundedBFloat16>;
  static constexpr int64_t kNumbers = 2;

  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
    return add_products(sum, _mm512_castps_si512(a), _mm512_castps_si512(b));
  }

  static __m512 load(const Item* row, int64_t first, int64_t num_lanes) {
    return _mm512_castsi512_ps(load_some(row + 2 * first, 2 * (num_lanes - first)));
  }

  // Writes the lanes of two values. One that is null counts as 0.
  static void pack_values(const Item* even, const Item* odd, int64_t head_dim, float* target) {
    for (int64_t i = 0; i < head_dim; i += 32) {
      const __m512i a = load_or_zero(even, i, head_dim - i);
      const __m512i b = load_or_zero(odd, i, head_dim - i);
      _mm512_store_si512(target + i, interleave<0>(a, b));
      if (i + 16 < head_dim) _mm512_store_si512(target + i + 16, interleave<1>(a, b));
    }
  }
};

void attend(const AttentionTile& tile, const TileResult* results) {
  if (tile.row_end - tile.row_begin <= kFewRows && !tile.args->batch_invariant) {
    attend_few_rows<PairRows>(tile, results);
  } else {
    attend_many_rows<PairLanes>(tile, results[0]);
  }
}

}  // namespace

const AttentionKernel* avx512_bf16_kernel(DType dtype, HeadDims dims) {
  if (dtype != DType::kBFloat16 || !dims.are_multiples_of(16)) return nullptr;
  static const AttentionKernel* const rows = avx512_kernel(dtype, dims);
  static const AttentionKernel kernel = {kMaxRows,    kFewRows,    attend,          rows->narrow,
                                         rows->merge, rows->widen, rows->are_finite};
  return &kernel;
}

}  // namespace kvkernels
