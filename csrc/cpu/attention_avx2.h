// What the AVX2 attention kernels share. Only for files compiled for AVX2.
#pragma once

#include <algorithm>

#include "cpu/attention_kernel.h"
#include "cpu/attention_unpack_avx2.h"
#include "cpu/simd_avx2.h"

namespace kvkernels {
namespace {

constexpr int64_t kTileKeys = 64;  // keys per tile

// With at most this many query rows attend_few_rows reads keys and values straight from the cache;
// with more it pays to convert and transpose the keys first.
constexpr int64_t kFewRows = 8;

// Turns one row's raw scores of up to kTileKeys keys into weights, for results of the element type
// E, and updates the running maximum and sum (8 lanes). Columns outside [first, last), and those
// that fill up the last vector, get the weight 0 whatever their scores. Returns the factor for what
// was summed up before.
template <typename E>
inline float softmax_step(float* scores, int64_t num_keys, int64_t first, int64_t last, float scale,
                          float* max, float* sum) {
  const int64_t end = (num_keys + 7) / 8 * 8;
  for (int64_t t = 0; t < end; t += 8) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(scale));
    _mm256_storeu_ps(scores + t, scaled);
  }
  for (int64_t t = 0; t < std::min(first, end); ++t) scores[t] = -kInfinity;
  for (int64_t t = std::max<int64_t>(last, 0); t < end; ++t) scores[t] = -kInfinity;
  __m256 top = _mm256_set1_ps(-kInfinity);
  for (int64_t t = 0; t < end; t += 8) top = _mm256_max_ps(top, _mm256_loadu_ps(scores + t));
  const float old_max = *max, new_max = std::max(old_max, max_lane(top));
  // If every score so far is minus infinity, the weights must come out as 0, not as NaN.
  const __m256 base = _mm256_set1_ps(new_max == -kInfinity ? 0.0f : new_max);
  const __m256 decay = exp2_of<E>(_mm256_sub_ps(_mm256_set1_ps(old_max), base));
  __m256 total = _mm256_mul_ps(_mm256_loadu_ps(sum), decay);
  for (int64_t t = 0; t < end; t += 8) {
    const __m256 weights = exp2_of<E>(_mm256_sub_ps(_mm256_loadu_ps(scores + t), base));
    _mm256_storeu_ps(scores + t, weights);
    total = _mm256_add_ps(total, weights);
  }
  _mm256_storeu_ps(sum, total);
  *max = new_max;
  return _mm256_cvtss_f32(decay);
}

}  // namespace
}  // namespace kvkernels
