// Attention with AVX-512: every element is widened to a float, every product is one of floats.
#include "cpu/attention_few_rows_avx512.h"
#include "cpu/attention_many_rows_avx512.h"

namespace kvkernels {
namespace {

template <typename E>
void attend(const AttentionTile& tile, const TileResult* results) {
  if (tile.row_end - tile.row_begin <= kFewRows && !tile.args->batch_invariant) {
    attend_few_rows<WidenedRows<E>>(tile, results);
  } else {
    attend_many_rows<WidenedLanes<E>>(tile, results[0]);
  }
}

template <typename E>
void narrow(const float* in, float scale, void* out, int64_t size) {
  const __m512 scales = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = first_lanes(size - i);
    E::store(static_cast<typename E::Item*>(out) + i,
             _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, in + i), scales), mask);
  }
}

void merge(float* out, float weight, const float* added, float added_weight, int64_t size) {
  const __m512 weights = _mm512_set1_ps(weight), added_weights = _mm512_set1_ps(added_weight);
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = first_lanes(size - i);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, out + i), weights);
    _mm512_mask_storeu_ps(
        out + i, mask,
        _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, added + i), added_weights, scaled));
  }
}

template <typename E>
void widen(const void* in, float* out, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = first_lanes(size - i);
    _mm512_mask_storeu_ps(out + i, mask,
                          E::masked_load(static_cast<const typename E::Item*>(in) + i, mask));
  }
}

bool are_finite(const float* in, int64_t size) {
  __m512 found = _mm512_setzero_ps();  // x - x is 0 for a finite x, and NaN for any other
  for (int64_t i = 0; i < size; i += 16) {
    const __m512 v = _mm512_loadu_ps(in + i);
    found = _mm512_or_ps(found, _mm512_sub_ps(v, v));
  }
  const __m512i bits = _mm512_castps_si512(found);
  return _mm512_test_epi32_mask(bits, bits) == 0;
}

template <typename E>
constexpr AttentionKernel kKernel = {kMaxRows, kFewRows, attend<E>, narrow<E>,
                                     merge,    widen<E>, are_finite};

}  // namespace

void attend_few_rows_avx512(const AttentionTile& tile, const TileResult* results,
                            FindCodeKernels kernels_of) {
  attend_few_rows<WidenedRows<BFloat16>>(tile, results, kernels_of);
}

const AttentionKernel* avx512_kernel(DType dtype, HeadDims dims) {
  if (!dims.are_multiples_of(16)) return nullptr;
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
