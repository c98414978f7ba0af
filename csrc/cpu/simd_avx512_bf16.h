// Rounding to bfloat16 and products of its pairs, in one instruction each. Only for files compiled
// for AVX512-BF16.
#pragma once

#include "cpu/simd_avx512.h"

namespace kvkernels {
namespace {

// sum + a * b, products of neighbouring bfloat16 added in pairs.
inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// BFloat16 rounded by these instructions: a result below the normal numbers becomes 0, as these
// instructions also take such factors for 0.
struct RoundedBFloat16 : BFloat16 {
  static void store(Item* p, __m512 v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
  static void store_32(Item* p, __m512 low, __m512 high) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
};

// Rounds two vectors and interleaves them: a pair per lane of 32 bits.
inline __m512 round_pairs(__m512 even, __m512 odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, rounded));
}

}  // namespace
}  // namespace kvkernels
