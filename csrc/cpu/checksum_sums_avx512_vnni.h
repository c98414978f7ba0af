// Checksums by dot products of bytes (AVX512-VNNI): 3 instructions for 16 words, where sums of
// words take 5.
//
// Byte k of a word counts 256^k. A shuffle puts the bytes k of a quarter's four words side by side,
// so that of a vector's 16 sums of 32 bits, sum 4 q + k is over the bytes k of words 4 q to 4 q +
// 3. Vectors are taken in groups of a fixed number of words. For word w of vector v of group g, and
// G groups in all,
//
//   first = sum of the bytes
//   outer = sum of (G - 1 - g) * bytes: `first` before each group, added up
//   inner = sum of (16 * v + w % 4 - 128) * bytes, which is in the range of a signed byte
//
// and the place of a byte's word is (words of a group) * g + 16 * v + 4 * q + w % 4.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cpu/intrinsics_avx512.h"
#include "kvkernels/checksum.h"

namespace kvkernels::avx512_vnni {
namespace {

constexpr std::size_t kVectorBytes = 64;
constexpr std::size_t kMostVectors = 16;  // of a group
constexpr int kLowestWeight = 128;        // the lowest weight is minus this

struct alignas(kVectorBytes) Weights {
  std::array<std::int8_t, kMostVectors * kVectorBytes> of_bytes;
};

constexpr Weights kWeights = [] {
  Weights weights{};
  for (std::size_t i = 0; i < weights.of_bytes.size(); ++i) {
    const auto weight = static_cast<int>(i / kVectorBytes * 16 + i % 4) - kLowestWeight;
    weights.of_bytes[i] = static_cast<std::int8_t>(weight);
  }
  return weights;
}();

// The lower or upper half of a vector.
inline __m256i half(__m512i v, bool is_upper) {
  return is_upper ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
}

// The sum modulo 2^64; GCC's intrinsic for it adds signed numbers, where overflow is undefined.
inline std::uint64_t add_lanes(__m512i v) {
  const __m256i four = _mm256_add_epi64(half(v, false), half(v, true));
  const __m128i two =
      _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(two)) +
         static_cast<std::uint64_t>(_mm_extract_epi64(two, 1));
}

struct ByteSums {
  __m512i first = _mm512_setzero_si512(), inner = first, outer = first;

  void begin_group() { outer = _mm512_add_epi32(outer, first); }

  // Adds vector `index` of a group.
  void take(__m512i words, std::size_t index) {
    const __m512i by_place = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    const __m512i bytes = _mm512_shuffle_epi8(words, by_place);
    const __m512i weights = _mm512_load_si512(&kWeights.of_bytes[index * kVectorBytes]);
    first = _mm512_dpbusd_epi32(first, bytes, _mm512_set1_epi8(1));
    inner = _mm512_dpbusd_epi32(inner, bytes, weights);
  }

  void add(const ByteSums& other) {
    first = _mm512_add_epi32(first, other.first);
    inner = _mm512_add_epi32(inner, other.inner);
    outer = _mm512_add_epi32(outer, other.outer);
  }

  // The sums over all words; the first word has place 1.
  WordSums finish(std::size_t num_groups, std::size_t group_words) const {
    const __m512i later_groups = _mm512_set1_epi64(static_cast<long long>(num_groups - 1));
    const __m512i words = _mm512_set1_epi64(static_cast<long long>(group_words));
    const __m512i shifts = _mm512_set_epi64(24, 16, 8, 0, 24, 16, 8, 0);
    __m512i sum = _mm512_setzero_si512(), weighted = sum;
    for (const bool is_upper : {false, true}) {
      const __m512i bytes = _mm512_cvtepu32_epi64(half(first, is_upper));
      // The sum of g * bytes.
      const __m512i groups = _mm512_sub_epi64(_mm512_mul_epu32(bytes, later_groups),
                                              _mm512_cvtepu32_epi64(half(outer, is_upper)));
      const long long place = kLowestWeight + (is_upper ? 8 : 0) + 1, next = place + 4;
      const __m512i quarter = _mm512_set_epi64(next, next, next, next, place, place, place, place);
      __m512i places = _mm512_mullo_epi64(groups, words);
      places = _mm512_add_epi64(places, _mm512_cvtepi32_epi64(half(inner, is_upper)));
      places = _mm512_add_epi64(places, _mm512_mul_epu32(bytes, quarter));
      sum = _mm512_add_epi64(sum, _mm512_sllv_epi64(bytes, shifts));
      weighted = _mm512_add_epi64(weighted, _mm512_sllv_epi64(places, shifts));
    }
    return {add_lanes(sum), add_lanes(weighted)};
  }
};

}  // namespace
}  // namespace kvkernels::avx512_vnni
