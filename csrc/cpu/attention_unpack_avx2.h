// Unpacking with AVX2, into rows of floats. E, of simd_avx2.h, is the element type of a cache of
// floats wider than float8. Dims are multiples of 8.
#pragma once

#include "cpu/attention_unpack.h"
#include "cpu/simd_avx2.h"

namespace kvkernels {
namespace {

template <typename E>
struct Avx2Unpacker {
  using Item = float;

  static void widen_scales(const uint16_t* pairs, int64_t count, float* scales, float* minimums) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      __m256 scale, minimum;
      widen_float16_pairs(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs + 2 * i)),
                          scale, minimum);
      _mm256_storeu_ps(scales + i, scale);
      _mm256_storeu_ps(minimums + i, minimum);
    }
    for (; i < count; ++i) {
      scales[i] = _cvtsh_ss(pairs[2 * i]);
      minimums[i] = _cvtsh_ss(pairs[2 * i + 1]);
    }
  }

  template <typename Scales>
  static void scale_bytes(const uint8_t* codes, int64_t dim, const Scales& scales, Item* row) {
    for (int64_t i = 0; i < dim; i += 8) scale(load_bytes(codes + i), i, scales, row);
  }

  template <typename Scales>
  static void scale_nibbles(const uint8_t* codes, int64_t dim, const Scales& scales, Item* row) {
    const int64_t half = dim / 2;
    const __m128i low = _mm_set1_epi8(15);
    int64_t i = 0;
    for (; i + 8 <= half; i += 8) {
      const __m128i bytes = load_bytes(codes + i);
      scale(_mm_and_si128(bytes, low), i, scales, row);
      scale(_mm_and_si128(_mm_srli_epi16(bytes, 4), low), half + i, scales, row);
    }
    for (; i < half; ++i) {
      row[i] = scales.minimum(i) + scales.scale(i) * static_cast<float>(codes[i] & 15);
      row[half + i] =
          scales.minimum(half + i) + scales.scale(half + i) * static_cast<float>(codes[i] >> 4);
    }
  }

  static void convert(const void* cache, DType dtype, int64_t offset, int64_t dim, Item* row) {
    if (dtype != DType::kFloat8) {
      const auto* source = static_cast<const typename E::Item*>(cache) + offset;
      for (int64_t i = 0; i < dim; i += 8) _mm256_storeu_ps(row + i, E::load(source + i));
      return;
    }
    const auto* source = static_cast<const uint8_t*>(cache) + offset;
    for (int64_t i = 0; i < dim; i += 8) {
      _mm256_storeu_ps(row + i, widen_float8(load_bytes(source + i)));
    }
  }

 private:
  static __m128i load_bytes(const uint8_t* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  }

  // Scales, or minimums, of the 8 channels from i on.
  static __m256 load(const ChannelScales&, const float* numbers, int64_t i) {
    return _mm256_loadu_ps(numbers + i);
  }
  static __m256 load(const GroupScales& scales, const float* numbers, int64_t i) {
    return _mm256_broadcast_ss(numbers + scales.groups[i]);
  }

  template <typename Scales>
  static void scale(__m128i codes, int64_t i, const Scales& scales, Item* row) {
    const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
    _mm256_storeu_ps(row + i, _mm256_fmadd_ps(load(scales, scales.scales, i), wide,
                                              load(scales, scales.minimums, i)));
  }

  // float8 e4m3fn: sign, exponent and mantissa are moved to their places in a float16. Its exponent
  // then is 8 too small, which the factor 256 makes up for.
  static __m256 widen_float8(__m128i bytes) {
    const __m128i wide = _mm_cvtepu8_epi16(bytes);
    const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    const __m128i half = _mm_or_si128(_mm_slli_epi16(magnitude, 7), sign);
    const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
    const __m128i is_nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    return _mm256_blendv_ps(value, _mm256_set1_ps(__builtin_nanf("")),
                            _mm256_castsi256_ps(_mm256_cvtepi16_epi32(is_nan)));
  }
};

}  // namespace
}  // namespace kvkernels
