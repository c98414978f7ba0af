// Unpacking with AVX-512, into rows of the element type E of simd_avx512.h. Dims are multiples
// of 16.
#pragma once

#include <cstring>

#include "cpu/attention_unpack.h"
#include "cpu/simd_avx512.h"

namespace kvkernels {
namespace {

inline __m512 widen_bytes(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)); }

template <typename E>
struct Avx512Unpacker {
  using Item = typename E::Item;

  static void widen_scales(const uint16_t* pairs, int64_t count, float* scales, float* minimums) {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = first_lanes(count - i);
      const __m512i both = _mm512_maskz_loadu_epi32(mask, pairs + 2 * i);
      const __m512 scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
      const __m512 minimum = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
      _mm512_mask_storeu_ps(scales + i, mask, scale);
      _mm512_mask_storeu_ps(minimums + i, mask, minimum);
    }
  }

  template <typename Scales>
  static void scale_bytes(const uint8_t* codes, int64_t dim, const Scales& scales, Item* row) {
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32) {
      scale_32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)), i, scales, row);
    }
    if (i < dim) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
      scale_some(bytes, i, 0xffff, scales, row);
    }
  }

  template <typename Scales>
  static void scale_nibbles(const uint8_t* codes, int64_t dim, const Scales& scales, Item* row) {
    const int64_t half = dim / 2;
    const __m256i low = _mm256_set1_epi8(15);
    int64_t i = 0;
    for (; i + 32 <= half; i += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
      scale_32(_mm256_and_si256(bytes, low), i, scales, row);
      scale_32(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), half + i, scales, row);
    }
    const __m128i some_low = _mm256_castsi256_si128(low);
    for (; i < half; i += 16) {
      const __mmask16 mask = first_lanes(half - i);
      const __m128i bytes = _mm_maskz_loadu_epi8(mask, codes + i);
      scale_some(_mm_and_si128(bytes, some_low), i, mask, scales, row);
      scale_some(_mm_and_si128(_mm_srli_epi16(bytes, 4), some_low), half + i, mask, scales, row);
    }
  }

  static void convert(const void* cache, DType dtype, int64_t offset, int64_t dim, Item* row) {
    if (dtype != DType::kFloat8) {  // the cache has the dtype of the rows
      std::memcpy(row, static_cast<const Item*>(cache) + offset, dim * sizeof(Item));
      return;
    }
    const auto* source = static_cast<const uint8_t*>(cache) + offset;
    for (int64_t i = 0; i < dim; i += 16) {
      E::store(row + i, widen_float8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))),
               0xffff);
    }
  }

 private:
  // Scales, or minimums, of the 16 channels from i on.
  static __m512 load(const ChannelScales&, const float* numbers, int64_t i, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, numbers + i);
  }
  static __m512 load(const GroupScales& scales, const float* numbers, int64_t i, __mmask16) {
    return _mm512_set1_ps(numbers[scales.groups[i]]);
  }

  template <typename Scales>
  static __m512 scaled(__m128i codes, int64_t i, __mmask16 mask, const Scales& scales) {
    return _mm512_fmadd_ps(load(scales, scales.scales, i, mask), widen_bytes(codes),
                           load(scales, scales.minimums, i, mask));
  }

  template <typename Scales>
  static void scale_some(__m128i codes, int64_t i, __mmask16 mask, const Scales& scales,
                         Item* row) {
    E::store(row + i, scaled(codes, i, mask, scales), mask);
  }

  template <typename Scales>
  static void scale_32(__m256i codes, int64_t i, const Scales& scales, Item* row) {
    const __m512 a = scaled(_mm256_castsi256_si128(codes), i, 0xffff, scales);
    const __m512 b = scaled(_mm256_extracti128_si256(codes, 1), i + 16, 0xffff, scales);
    if constexpr (requires { E::store_32(row + i, a, b); }) {
      E::store_32(row + i, a, b);
    } else {
      E::store(row + i, a, 0xffff);
      E::store(row + i + 16, b, 0xffff);
    }
  }

  // float8 e4m3fn: sign, exponent and mantissa are moved to their places in a float16. Its exponent
  // then is 8 too small, which the factor 256 makes up for.
  static __m512 widen_float8(__m128i bytes) {
    const __m256i wide = _mm256_cvtepu8_epi16(bytes);
    const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
    const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
    const __mmask16 is_nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
    return _mm512_mask_blend_ps(is_nan, value, _mm512_set1_ps(__builtin_nanf("")));
  }
};

}  // namespace
}  // namespace kvkernels
