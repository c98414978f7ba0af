// Products of few query rows with keys and values; every key and value is used for up to four rows
// while it is in registers.
//
// Dot products run along head_dim, so a key is a plain row: 16 sums (rows x keys) are kept in 16
// registers and then added across lanes together. The arithmetic is the parameter R of
// attention_few_rows_avx512.h: WidenedRows below, or PairRows of attention_avx512_bf16.cpp.
#pragma once

#include "cpu/attention_avx512.h"
#include "cpu/attention_codes.h"
#include "cpu/attention_spans.h"
#include "cpu/attention_unpack_avx512.h"

namespace kvkernels {
namespace {

constexpr int kBatch = 4;  // rows multiplied with a key while it is in registers

// Stores the scores of 16 keys from `first` on.
template <int kRows>
inline void store_scores(const SixteenColumns<kRows>& columns, int64_t first, float* scores) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    _mm512_store_ps(scores + r * kTileKeys + first, columns.row(r));
  }
}

// scores[r][t] = query row r * key t, for t < num_keys rounded up to 16. Prefetches as many bytes
// from `next` as it reads.
template <typename E, int kRows, Asking kAsking>
void score_widened(const float* query, int64_t head_dim, const CacheRows<typename E::Item>& keys,
                   ReadAhead& next, int64_t num_keys, float* scores) {
  using Columns = SixteenColumns<kRows>;
  constexpr int kTokens = Columns::kColumns;
  constexpr int64_t kItemBytes = sizeof(typename E::Item);
  for (int64_t first = 0; first < num_keys; first += 16) {
    Columns columns;
#pragma GCC unroll 1
    for (int part = 0; part < 16 / kTokens; ++part) {
      const int64_t token = first + part * kTokens;
      auto ahead = next.take<kAsking>(kTokens * head_dim * kItemBytes, keys.row(token));
      __m512 sums[kRows * kTokens];
#pragma GCC unroll 16
      for (__m512& sum : sums) sum = _mm512_setzero_ps();
      int64_t i = 0;
      for (; i + 32 <= head_dim; i += 32) {
        __m512 q[2 * kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          q[2 * r] = _mm512_load_ps(query + r * head_dim + i);
          q[2 * r + 1] = _mm512_load_ps(query + r * head_dim + i + 16);
        }
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          __m512 a, b;
          E::load_pair(keys.row(token + t) + i, a, b);
          ahead.template ask<32 * kItemBytes>();
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            sums[r * kTokens + t] = _mm512_fmadd_ps(q[2 * r], a, sums[r * kTokens + t]);
            sums[r * kTokens + t] = _mm512_fmadd_ps(q[2 * r + 1], b, sums[r * kTokens + t]);
          }
        }
      }
      if (i < head_dim) {
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          const __m512 a = E::load(keys.row(token + t) + i);
          ahead.template ask<16 * kItemBytes>();
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const __m512 q = _mm512_load_ps(query + r * head_dim + i);
            sums[r * kTokens + t] = _mm512_fmadd_ps(q, a, sums[r * kTokens + t]);
          }
        }
      }
      columns.take(part, sums);
    }
    store_scores(columns, first, scores);
  }
}

template <typename E, int kRows>
void score_keys(const float* query, int64_t head_dim, const CacheRows<typename E::Item>& keys,
                ReadAhead& next, int64_t num_keys, float* scores) {
  with_asking(next, [&](auto asking) {
    score_widened<E, kRows, asking()>(query, head_dim, keys, next, num_keys, scores);
  });
}

// out[r] = out[r] * decay[r] + sum over t of weights[r][t] * value t, for 16 * kVectors channels
// from `first` on. Prefetches as many bytes from `next` as it reads.
template <typename E, int kRows, int kVectors, Asking kAsking>
void add_value_panel(const float* weights, const float* decay,
                     const CacheRows<typename E::Item>& values, ReadAhead& next, int64_t num_keys,
                     int64_t head_dim, int64_t first, float* out) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums[r][i] = _mm512_mul_ps(_mm512_set1_ps(decay[r]),
                                 _mm512_load_ps(out + r * head_dim + first + 16 * i));
    }
  }
  constexpr int64_t kTokenBytes = 16 * kVectors * sizeof(typename E::Item);
  for (int64_t begin = 0; begin < num_keys; begin += 16) {
    const int64_t end = std::min<int64_t>(begin + 16, num_keys);
    auto ahead = next.take<kAsking>((end - begin) * kTokenBytes, values.row(begin) + first);
    for (int64_t t = begin; t < end; ++t) {
      __m512 v[kVectors];
      if constexpr (kVectors == 1) {
        v[0] = E::load(values.row(t) + first);
      } else {
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; i += 2) {
          E::load_pair(values.row(t) + first + 16 * i, v[i], v[i + 1]);
        }
      }
      ahead.template ask<kTokenBytes>();
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512 weight = _mm512_set1_ps(weights[r * kTileKeys + t]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) sums[r][i] = _mm512_fmadd_ps(weight, v[i], sums[r][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      _mm512_store_ps(out + r * head_dim + first + 16 * i, sums[r][i]);
    }
  }
}

template <typename E, int kRows>
void add_values(float* weights, const float* decay, const CacheRows<typename E::Item>& values,
                ReadAhead& next, int64_t num_keys, int64_t head_dim, float* out) {
  with_asking(next, [&](auto asking) {
    int64_t i = 0;
    for (; i + 64 <= head_dim; i += 64) {
      add_value_panel<E, kRows, 4, asking()>(weights, decay, values, next, num_keys, head_dim, i,
                                             out);
    }
    if (i + 32 <= head_dim) {
      add_value_panel<E, kRows, 2, asking()>(weights, decay, values, next, num_keys, head_dim, i,
                                             out);
      i += 32;
    }
    if (i < head_dim) {
      add_value_panel<E, kRows, 1, asking()>(weights, decay, values, next, num_keys, head_dim, i,
                                             out);
    }
  });
}

// The two products for a fixed number of rows. AddRows may overwrite the weights.
template <typename Item>
using ScoreRows = void (*)(const float* query, int64_t head_dim, const CacheRows<Item>& keys,
                           ReadAhead& next, int64_t num_keys, float* scores);
template <typename Item>
using AddRows = void (*)(float* weights, const float* decay, const CacheRows<Item>& values,
                         ReadAhead& next, int64_t num_keys, int64_t head_dim, float* out);

// Arithmetic on floats: every element is widened to a float in a register. Query and output lie in
// the order of E::load_pair.
template <typename E>
struct WidenedRows {
  using Element = E;
  using Item = typename E::Item;
  using Unpacker = Avx512Unpacker<E>;

  static constexpr ScoreRows<Item> kScore[] = {nullptr, score_keys<E, 1>, score_keys<E, 2>,
                                               score_keys<E, 3>, score_keys<E, 4>};
  static constexpr AddRows<Item> kAdd[] = {nullptr, add_values<E, 1>, add_values<E, 2>,
                                           add_values<E, 3>, add_values<E, 4>};

  static const CodeKernels* code_kernels(const CodeShape&) { return avx512_vnni_code_kernels(); }

  static void start_row(const Item* query, int64_t row, int64_t, int64_t head_dim, float* rows) {
    float* const target = rows + row * head_dim;
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) {
      __m512 a, b;
      E::load_pair(query + i, a, b);
      _mm512_store_ps(target + i, a);
      _mm512_store_ps(target + i + 16, b);
    }
    if (i < head_dim) _mm512_store_ps(target + i, E::load(query + i));
  }

  static void finish_row(const float* out, float* target, int64_t head_dim) {
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) {
      __m512 a = _mm512_load_ps(out + i), b = _mm512_load_ps(out + i + 16);
      E::restore(a, b);
      _mm512_storeu_ps(target + i, a);
      _mm512_storeu_ps(target + i + 16, b);
    }
    if (i < head_dim) _mm512_storeu_ps(target + i, _mm512_load_ps(out + i));
  }
};

}  // namespace
}  // namespace kvkernels
