// Checksums by dot products of bytes, see checksum_sums_avx512_vnni.h.
#include <algorithm>

#include "cpu/checksum_kernels.h"
#include "cpu/checksum_sums_avx512_vnni.h"

namespace kvkernels::avx512_vnni {
namespace {

using Byte = unsigned char;

constexpr std::size_t kGroupBytes = kMostVectors * kVectorBytes, kGroupWords = kGroupBytes / 4;
constexpr std::size_t kChains =
    4;  // independent sums, which hide the latency of dependent products

// So that sums stay within 32 bits. All four chains together, a group adds at most 16 * 4 * 255 to
// a lane of `first`: `outer` then stays within 32 bits for 725 groups. To `inner`, which is signed,
// it adds up to 128 times as much: 1,028 groups.
constexpr std::size_t kMostBytes = 512 * kGroupBytes;

// Sums of 1 to kMostBytes bytes. What the last group lacks counts as zeros.
WordSums sum_groups(const Byte* source, std::size_t size) {
  ByteSums chains[kChains];
  const std::size_t num_whole = size / kGroupBytes, rest = size % kGroupBytes;
  for (std::size_t group = 0; group < num_whole; ++group) {
#pragma GCC unroll 4
    for (ByteSums& chain : chains) chain.begin_group();
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kMostVectors; ++i) {
      const Byte* from = source + group * kGroupBytes + i * kVectorBytes;
      chains[i % kChains].take(_mm512_loadu_si512(from), i);
    }
  }
  if (rest != 0) {
#pragma GCC unroll 4
    for (ByteSums& chain : chains) chain.begin_group();
    const Byte* from = source + num_whole * kGroupBytes;
    const std::size_t num_vectors = rest / kVectorBytes;
    for (std::size_t i = 0; i < num_vectors; ++i) {
      chains[0].take(_mm512_loadu_si512(from + i * kVectorBytes), i);
    }
    const auto words = static_cast<__mmask16>((1u << (rest % kVectorBytes / 4)) - 1);
    if (words != 0) {
      from += num_vectors * kVectorBytes;
      chains[0].take(_mm512_maskz_loadu_epi32(words, from), num_vectors);
    }
  }
  for (std::size_t c = 1; c < kChains; ++c) chains[0].add(chains[c]);
  return chains[0].finish(num_whole + (rest != 0), kGroupWords);
}

}  // namespace

WordSums checksum_words(const void* data, std::size_t size) {
  const Byte* bytes = static_cast<const Byte*>(data);
  WordSums sums{0, 0};
  for (std::size_t done = 0; done < size; done += kMostBytes) {
    append_sums(sum_groups(bytes + done, std::min(size - done, kMostBytes)), done / 4, sums);
  }
  return sums;
}

}  // namespace kvkernels::avx512_vnni
