// The two products of decode with AVX2: few query rows times keys, and weights times values.
//
// Every key and value is read once and used for up to four rows. Dot products run along head_dim,
// so a key is a plain row: up to 8 sums (rows x keys), enough to hide the latency of a
// multiplication, are then added across lanes together. E is an element type of simd_avx2.h; rows
// of floats (queries, sums of values) are in the order of its arrange().
#pragma once

#include <cstring>

#include "cpu/attention_avx2.h"
#include "cpu/attention_spans.h"
#include "cpu/row_batches.h"

namespace kvkernels {
namespace {

constexpr int kBatch = 4;  // rows multiplied with a key while it is in registers
constexpr int kSums = 8;   // half of the registers

// Copies a row of floats, and calls change(a, b) on every two vectors on the way. The last vector
// may be a single one.
template <typename Change>
void copy_pairs(const float* from, int64_t dim, float* to, const Change& change) {
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    __m256 a = _mm256_loadu_ps(from + i), b = _mm256_loadu_ps(from + i + 8);
    change(a, b);
    _mm256_storeu_ps(to + i, a);
    _mm256_storeu_ps(to + i + 8, b);
  }
  if (i < dim) _mm256_storeu_ps(to + i, _mm256_loadu_ps(from + i));
}

// paired[i] = paired[i] * decay + row[i], where `row` is in the order of channels and `paired` in
// that of E::arrange.
template <typename E>
void add_row(const float* row, int64_t dim, float decay, float* paired) {
  const __m256 factor = _mm256_set1_ps(decay);
  const auto add = [&](__m256 sum, float* p) {
    _mm256_storeu_ps(p, _mm256_fmadd_ps(_mm256_loadu_ps(p), factor, sum));
  };
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    __m256 a = _mm256_loadu_ps(row + i), b = _mm256_loadu_ps(row + i + 8);
    E::arrange(a, b);
    add(a, paired + i);
    add(b, paired + i + 8);
  }
  if (i < dim) add(_mm256_loadu_ps(row + i), paired + i);
}

// scores[r][t] = query row r * key t, for t < num_keys rounded up to 8. Prefetches as many bytes
// from `next` as it reads.
template <typename E, int kRows>
void score_keys(const float* query, int64_t head_dim, const CacheRows<typename E::Item>& keys,
                ReadAhead& next, int64_t num_keys, float* scores) {
  constexpr int kTokens = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;
  for (int64_t first = 0; first < num_keys; first += kTokens) {
    __m256 sums[kSums];
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= head_dim; i += 16) {
      __m256 key[kTokens][2];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        key[t][0] = E::template load_half<0>(keys.row(first + t) + i);
        key[t][1] = E::template load_half<1>(keys.row(first + t) + i);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m256 q = _mm256_loadu_ps(query + r * head_dim + i + 8 * half);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            sums[r * kTokens + t] = _mm256_fmadd_ps(q, key[t][half], sums[r * kTokens + t]);
          }
        }
      }
    }
    if (i < head_dim) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const __m256 key = E::load(keys.row(first + t) + i);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m256 q = _mm256_loadu_ps(query + r * head_dim + i);
          sums[r * kTokens + t] = _mm256_fmadd_ps(q, key, sums[r * kTokens + t]);
        }
      }
    }
    float totals[kSums];
    _mm256_storeu_ps(totals, sum_lanes_of_8(sums));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(scores + r * kTileKeys + first, totals + r * kTokens, kTokens * sizeof(float));
    }
    next.advance(kTokens * head_dim * static_cast<int64_t>(sizeof(typename E::Item)));
  }
}

// out[r] = out[r] * decay[r] + sum over t of weights[r][t] * value t, for kVectors vectors of
// value_dim from `first` on. Prefetches as many bytes from `next` as it reads.
template <typename E, int kRows, int kVectors>
void add_value_panel(const float* weights, const float* decay,
                     const CacheRows<typename E::Item>& values, ReadAhead& next, int64_t num_keys,
                     int64_t value_dim, int64_t first, float* out) {
  constexpr int64_t kAhead =
      8;  // keys per request: one request takes longer than one step of this loop
  __m256 sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums[r][i] = _mm256_mul_ps(_mm256_set1_ps(decay[r]),
                                 _mm256_loadu_ps(out + r * value_dim + first + 8 * i));
    }
  }
  for (int64_t t = 0; t < num_keys; ++t) {
    if (t % kAhead == 0) {
      next.advance(kAhead * 8 * kVectors * static_cast<int64_t>(sizeof(typename E::Item)));
    }
    const auto* value = values.row(t) + first;
    __m256 v[kVectors];
    if constexpr (kVectors == 1) {
      v[0] = E::load(value);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i += 2) {
        v[i] = E::template load_half<0>(value + 8 * i);
        v[i + 1] = E::template load_half<1>(value + 8 * i);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256 weight = _mm256_set1_ps(weights[r * kTileKeys + t]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sums[r][i] = _mm256_fmadd_ps(weight, v[i], sums[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      _mm256_storeu_ps(out + r * value_dim + first + 8 * i, sums[r][i]);
    }
  }
}

// add_value_panel for all of value_dim, whose last vector may be a single one.
template <typename E, int kRows>
void add_values(const float* weights, const float* decay, const CacheRows<typename E::Item>& values,
                ReadAhead& next, int64_t num_keys, int64_t value_dim, float* out) {
  constexpr int kVectors = kRows <= 2 ? 4 : 2;
  int64_t i = 0;
  for (; i + 8 * kVectors <= value_dim; i += 8 * kVectors) {
    add_value_panel<E, kRows, kVectors>(weights, decay, values, next, num_keys, value_dim, i, out);
  }
  for (; i + 16 <= value_dim; i += 16) {
    add_value_panel<E, kRows, 2>(weights, decay, values, next, num_keys, value_dim, i, out);
  }
  if (i < value_dim) {
    add_value_panel<E, kRows, 1>(weights, decay, values, next, num_keys, value_dim, i, out);
  }
}

// score_keys for any number of rows.
template <typename E>
void score_all(const float* query, int64_t num_rows, int64_t head_dim,
               const CacheRows<typename E::Item>& keys, ReadAhead& next, int64_t num_keys,
               float* scores) {
  constexpr decltype(&score_keys<E, 1>) kKernels[kBatch] = {score_keys<E, 1>, score_keys<E, 2>,
                                                            score_keys<E, 3>, score_keys<E, 4>};
  for_each_batch(num_rows, kBatch, [&](int64_t r, int64_t count) {
    kKernels[count - 1](query + r * head_dim, head_dim, keys, next, num_keys,
                        scores + r * kTileKeys);
  });
}

// add_values for any number of rows.
template <typename E>
void add_all(const float* weights, int64_t num_rows, const float* decay,
             const CacheRows<typename E::Item>& values, ReadAhead& next, int64_t num_keys,
             int64_t value_dim, float* out) {
  constexpr decltype(&add_values<E, 1>) kKernels[kBatch] = {add_values<E, 1>, add_values<E, 2>,
                                                            add_values<E, 3>, add_values<E, 4>};
  constexpr float kNoDecay[kBatch] = {1, 1, 1, 1};
  const int64_t step = keys_of_part(value_dim * sizeof(typename E::Item), kTileKeys);
  for (int64_t first = 0; first < num_keys; first += step) {
    const int64_t num_left = std::min(num_keys - first, step);
    for_each_batch(num_rows, kBatch, [&](int64_t r, int64_t count) {
      kKernels[count - 1](weights + r * kTileKeys + first, first == 0 ? decay + r : kNoDecay,
                          {values.cache, values.offsets + first}, next, num_left, value_dim,
                          out + r * value_dim);
    });
  }
}

}  // namespace
}  // namespace kvkernels
