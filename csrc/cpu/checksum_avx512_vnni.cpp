// Checksums by dot products of bytes (AVX512-VNNI): 3 instructions for 16 words, where sums of
// words take 5.
//
// Byte k of a word counts 256^k. A shuffle puts the bytes k of a quarter's four words side by side,
// so that of a vector's 16 sums of 32 bits, sum 4 q + k is of the bytes k of words 4 q to 4 q + 3.
// Vectors go in groups of kGroup. With word w of vector v of group g, and G groups,
//
//   first = sum of the bytes
//   outer = sum of (G - 1 - g) * bytes: `first` before each group, added up
//   inner = sum of (16 * v + w % 4 - 128) * bytes, which is in the range of a signed byte
//
// and the place of a byte's word is 16 * kGroup * g + 16 * v + 4 * q + w % 4.
#include <immintrin.h>

#include <algorithm>
#include <array>

#include "cpu/checksum_kernels.h"

namespace kvkernels::avx512_vnni {
namespace {

using Byte = unsigned char;

constexpr std::size_t kVectorBytes = 64;
constexpr std::size_t kGroup = 16;  // vectors
constexpr std::size_t kGroupBytes = kGroup * kVectorBytes, kGroupWords = kGroupBytes / 4;
constexpr std::size_t kChains = 4;  // hide the latency of dependent products
constexpr int kLowestWeight = 128;  // less than zero

// Of all four chains together a group adds at most 16 * 4 * 255 to `first`, so that `outer` stays
// within 32 bits for 725 groups, and 128 times as much to `inner`, which has a sign, for 1,028.
constexpr std::size_t kMostGroups = 512;

struct alignas(64) Weights {
  std::array<std::int8_t, kGroupBytes> of_bytes;
};

constexpr Weights kWeights = [] {
  Weights weights{};
  for (std::size_t i = 0; i < kGroupBytes; ++i) {
    const auto weight = static_cast<int>(i / kVectorBytes * 16 + i % 4) - kLowestWeight;
    weights.of_bytes[i] = static_cast<std::int8_t>(weight);
  }
  return weights;
}();

__m512i add_all(const __m512i* chains) {
  return _mm512_add_epi32(_mm512_add_epi32(chains[0], chains[1]),
                          _mm512_add_epi32(chains[2], chains[3]));
}

// Of at most kMostGroups groups.
WordSums sum_groups(const Byte* source, std::size_t num_groups) {
  const __m512i by_place = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i first[kChains], inner[kChains], outer[kChains];
  for (std::size_t c = 0; c < kChains; ++c) {
    first[c] = inner[c] = outer[c] = _mm512_setzero_si512();
  }
  for (std::size_t group = 0; group < num_groups; ++group) {
#pragma GCC unroll 4
    for (std::size_t c = 0; c < kChains; ++c) outer[c] = _mm512_add_epi32(outer[c], first[c]);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kGroup; ++i) {
      const std::size_t offset = group * kGroupBytes + i * kVectorBytes;
      const __m512i words = _mm512_loadu_si512(source + offset);
      const __m512i bytes = _mm512_shuffle_epi8(words, by_place);
      const __m512i weights = _mm512_load_si512(&kWeights.of_bytes[i * kVectorBytes]);
      first[i % kChains] = _mm512_dpbusd_epi32(first[i % kChains], bytes, ones);
      inner[i % kChains] = _mm512_dpbusd_epi32(inner[i % kChains], bytes, weights);
    }
  }
  alignas(64) std::uint32_t plain[16], before[16];
  alignas(64) std::int32_t weighted[16];
  _mm512_store_si512(plain, add_all(first));
  _mm512_store_si512(before, add_all(outer));
  _mm512_store_si512(weighted, add_all(inner));
  WordSums sums{0, 0};
  for (std::size_t i = 0; i < 16; ++i) {
    const std::uint64_t bytes = plain[i];
    const std::uint64_t groups = (num_groups - 1) * bytes - before[i];  // of g * bytes
    const std::uint64_t places = kGroupWords * groups + static_cast<std::int64_t>(weighted[i]) +
                                 (kLowestWeight + i / 4 * 4 + 1) * bytes;
    sums.sum += bytes << (8 * (i % 4));
    sums.weighted += places << (8 * (i % 4));
  }
  return sums;
}

// Appends the sums of what begins at a word.
void append(const WordSums& part, std::size_t first_word, WordSums& sums) {
  sums.sum += part.sum;
  sums.weighted += part.weighted + first_word * part.sum;
}

}  // namespace

WordSums checksum_words(const void* data, std::size_t size) {
  const Byte* bytes = static_cast<const Byte*>(data);
  WordSums sums{0, 0};
  std::size_t done = 0;
  while (size - done >= kGroupBytes) {
    const std::size_t num_groups = std::min((size - done) / kGroupBytes, kMostGroups);
    append(sum_groups(bytes + done, num_groups), done / 4, sums);
    done += num_groups * kGroupBytes;
  }
  append(avx512::checksum_words(bytes + done, size - done), done / 4, sums);
  return sums;
}

}  // namespace kvkernels::avx512_vnni
