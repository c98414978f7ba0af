// Attention with AVX2: every element is widened to a float, every product is one of floats.
#include "cpu/attention_few_rows_avx2.h"
#include "cpu/attention_many_rows_avx2.h"

namespace kvkernels {
namespace {

template <typename E>
void attend(const AttentionTile& tile, const TileResult* results) {
  if (tile.row_end - tile.row_begin <= kFewRows && !tile.args->batch_invariant) {
    attend_few_rows<E>(tile, results);
  } else {
    attend_many_rows<E>(tile, results[0]);
  }
}

template <typename E>
void narrow(const float* in, float scale, void* out, int64_t size) {
  for (int64_t i = 0; i < size; i += 8) {
    E::store(static_cast<typename E::Item*>(out) + i,
             _mm256_mul_ps(_mm256_loadu_ps(in + i), _mm256_set1_ps(scale)));
  }
}

void merge(float* out, float weight, const float* added, float added_weight, int64_t size) {
  const __m256 weights = _mm256_set1_ps(weight), added_weights = _mm256_set1_ps(added_weight);
  for (int64_t i = 0; i < size; i += 8) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(out + i), weights);
    _mm256_storeu_ps(out + i, _mm256_fmadd_ps(_mm256_loadu_ps(added + i), added_weights, scaled));
  }
}

template <typename E>
void widen(const void* in, float* out, int64_t size) {
  for (int64_t i = 0; i < size; i += 8) {
    _mm256_storeu_ps(out + i, E::load(static_cast<const typename E::Item*>(in) + i));
  }
}

bool are_finite(const float* in, int64_t size) {
  __m256 found = _mm256_setzero_ps();  // x - x is 0 for a finite x, and NaN for any other
  for (int64_t i = 0; i < size; i += 8) {
    const __m256 v = _mm256_loadu_ps(in + i);
    found = _mm256_or_ps(found, _mm256_sub_ps(v, v));
  }
  const __m256i bits = _mm256_castps_si256(found);
  return _mm256_testz_si256(bits, bits) != 0;
}

template <typename E>
constexpr AttentionKernel kKernel = {kMaxRows, kFewRows, attend<E>, narrow<E>,
                                     merge,    widen<E>, are_finite};

}  // namespace

const AttentionKernel* avx2_kernel(DType dtype, HeadDims dims) {
  if (!dims.are_multiples_of(8)) return nullptr;
  switch (dtype) {
    case DType::kFloat32:
      return &kKernel<Float32>;
    case DType::kFloat16:
      return &kKernel<Float16>;
    default:
      return &kKernel<BFloat16>;
  }
}

}  // namespace kvkernels
