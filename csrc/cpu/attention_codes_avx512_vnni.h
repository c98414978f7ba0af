// Codes as vectors of bytes, and floats as whole numbers in bytes: what the products of
// attention_codes_avx512_vnni.cpp are made of.
#pragma once

#include "cpu/attention_codes_avx512.h"

namespace kvkernels {
namespace {

constexpr int64_t kMaxVectors = kMaxCodeDim / 64;  // of 64 codes in a row
constexpr float kLargest = 127 * 128;              // of the whole numbers
constexpr int kLowBits = 7;

// Which 16 channels lie in part k of a row's vectors, 4 parts each; `count` of them are there.
// Bytes lie in order. Of two codes a byte, a vector holds 32 channels and the 32 that share their
// bytes.
struct Channels {
  int64_t first, count;
};

template <bool kIsInt4>
Channels channels_of_part(int64_t part, int64_t dim) {
  int64_t first = 16 * part, end = dim, base = 0;
  if constexpr (kIsInt4) {
    first = part / 4 * 32 + part % 2 * 16;
    end = dim / 2;
    if (part % 4 >= 2) base = end;
  }
  const int64_t left = end - first;
  return {base + first, left < 0 ? 0 : left < 16 ? left : 16};
}

template <bool kIsInt4>
int64_t num_vectors(int64_t dim) {
  return kIsInt4 ? (dim / 2 + 31) / 32 : (dim + 63) / 64;
}

template <bool kIsInt4>
int64_t row_bytes(int64_t dim) {
  return kIsInt4 ? dim / 2 : dim;
}

// Vector j of a row of codes; what lies past the row is 0.
template <bool kIsInt4>
__m512i load_codes(const uint8_t* row, int64_t j, int64_t num_bytes) {
  if constexpr (kIsInt4) {
    const int64_t left = num_bytes - 32 * j;
    const uint8_t* first = row + 32 * j;
    const __m256i bytes = left >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first))
                                     : _mm256_maskz_loadu_epi8((__mmask32{1} << left) - 1, first);
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(4), 1);
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_broadcast_i64x4(bytes), shifts),
                            _mm512_set1_epi8(15));
  } else {
    const int64_t left = num_bytes - 64 * j;
    if (left >= 64) return _mm512_loadu_si512(row + 64 * j);
    return _mm512_maskz_loadu_epi8((__mmask64{1} << left) - 1, row + 64 * j);
  }
}

// Floats as whole numbers in two bytes each.
class Rounding {
 public:
  explicit Rounding(__m512 largest) {
    const float max = _mm512_reduce_max_ps(largest);
    inverse_ = _mm512_set1_ps(max > 0 ? kLargest / max : 0.0f);
    unit_ = max / kLargest;
  }

  // Writes 32 of them.
  void round(__m512 a, __m512 b, int8_t* high, int8_t* low) {
    const __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a)), narrow(b), 1);
    const __m512i half = _mm512_set1_epi16(1 << (kLowBits - 1));
    const __m512i top = _mm512_srai_epi16(_mm512_add_epi16(x, half), kLowBits);
    const __m512i rest = _mm512_sub_epi16(x, _mm512_slli_epi16(top, kLowBits));
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), _mm512_cvtepi16_epi8(top));
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), _mm512_cvtepi16_epi8(rest));
    total_ = _mm512_add_epi32(total_, _mm512_madd_epi16(x, _mm512_set1_epi16(1)));
  }

  float unit() const { return unit_; }
  // Of the whole numbers.
  float total() const { return static_cast<float>(_mm512_reduce_add_epi32(total_)); }

 private:
  __m256i narrow(__m512 x) const {
    return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse_)));
  }

  __m512 inverse_;
  float unit_;
  __m512i total_ = _mm512_setzero_si512();
};

}  // namespace
}  // namespace kvkernels
