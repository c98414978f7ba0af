// Checksums with 512-bit vectors and the CRC-32C instruction (SSE4.2, part of every AVX-512 CPU).
#include "cpu/checksum_kernels.h"

#include <immintrin.h>

#include <cstring>

namespace kvkernels::avx512 {
namespace {

using Byte = unsigned char;

constexpr std::size_t kVectorBytes = 64;
constexpr std::size_t kUnroll = 4;  // hides the latency of the two dependent additions
constexpr std::size_t kStepBytes = kUnroll * kVectorBytes;
constexpr std::size_t kStepWords = kStepBytes / 4;

// Running sums of one vector of each step: of its 8 pairs of words taken as 64-bit numbers, or of
// its 8 odd words; `first` and `second` as in checksum.cpp. All are modulo 2^64, so a pair minus
// its shifted odd word is its even word.
struct Lanes {
  __m512i first = _mm512_setzero_si512();
  __m512i second = _mm512_setzero_si512();

  void add(__m512i words) {
    first = _mm512_add_epi64(first, words);
    second = _mm512_add_epi64(second, first);
  }

  // The sums of the even words, if these are the sums of the pairs.
  Lanes without(const Lanes& odd) const {
    // Shifts in the masked form with all lanes on: GCC 12 warns about the plain one's undefined
    // source.
    return {_mm512_sub_epi64(first, _mm512_maskz_slli_epi64(0xFF, odd.first, 32)),
            _mm512_sub_epi64(second, _mm512_maskz_slli_epi64(0xFF, odd.second, 32))};
  }

  // Adds these to `sums`. `position` is the place of lane 0's word within a step; lanes are two
  // words apart.
  void finish(std::uint64_t steps, std::uint64_t position, WordSums& sums) const {
    std::uint64_t plain[8], running[8];
    _mm512_storeu_si512(plain, first);
    _mm512_storeu_si512(running, second);
    for (std::uint64_t lane = 0; lane < 8; ++lane) {
      sums.sum += plain[lane];
      sums.weighted += kStepWords * (steps * plain[lane] - running[lane]) +
                       (position + 2 * lane + 1) * plain[lane];
    }
  }
};

enum class Store { kNone, kCached, kStreaming };

template <Store kStore>
void store([[maybe_unused]] Byte* target, [[maybe_unused]] __m512i words) {
  if constexpr (kStore == Store::kCached) _mm512_storeu_si512(target, words);
  if constexpr (kStore == Store::kStreaming) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), words);
  }
}

template <Store kStore>
WordSums vector_sums(const Byte* source, Byte* target, std::size_t size) {
  Lanes pairs[kUnroll], odd[kUnroll];
  const std::size_t steps = size / kStepBytes, num_words = size / 4;
  for (std::size_t step = 0; step < steps; ++step) {
    for (std::size_t i = 0; i < kUnroll; ++i) {
      const std::size_t offset = step * kStepBytes + i * kVectorBytes;
      const __m512i words = _mm512_loadu_si512(source + offset);
      store<kStore>(target + offset, words);
      pairs[i].add(words);
      odd[i].add(_mm512_maskz_srli_epi64(0xFF, words, 32));
    }
  }
  if constexpr (kStore == Store::kStreaming) _mm_sfence();
  WordSums sums{0, 0};
  for (std::size_t i = 0; i < kUnroll; ++i) {
    pairs[i].without(odd[i]).finish(steps, 16 * i, sums);
    odd[i].finish(steps, 16 * i + 1, sums);
  }
  for (std::size_t i = steps * kStepWords; i < num_words; ++i) {
    std::uint32_t word;
    std::memcpy(&word, source + i * 4, 4);
    if constexpr (kStore != Store::kNone) std::memcpy(target + i * 4, &word, 4);
    sums.sum += word;
    sums.weighted += (i + 1) * word;
  }
  return sums;
}

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc) {
  const Byte* bytes = static_cast<const Byte*>(data);
  std::uint64_t state = static_cast<std::uint32_t>(~crc);
  for (; size >= 8; bytes += 8, size -= 8) {
    std::uint64_t word;
    std::memcpy(&word, bytes, 8);
    state = _mm_crc32_u64(state, word);
  }
  std::uint32_t tail = static_cast<std::uint32_t>(state);
  for (; size > 0; ++bytes, --size) tail = _mm_crc32_u8(tail, *bytes);
  return ~tail;
}

WordSums checksum_words(const void* data, std::size_t size) {
  return vector_sums<Store::kNone>(static_cast<const Byte*>(data), nullptr, size);
}

WordSums copy_with_checksum(const void* source, void* target, std::size_t size) {
  // Streaming stores do not read the target's lines first: records of 1.4 MB were copied from a
  // warm buffer into a cold pool at 18 GB/s, with plain stores at 5.8, by memcpy at 8.2. They need
  // whole lines; small copies are likely to be read again soon and stay in the cache.
  constexpr std::size_t kStreamFrom = 16 * 1024;
  const Byte* from = static_cast<const Byte*>(source);
  Byte* to = static_cast<Byte*>(target);
  const bool is_aligned = reinterpret_cast<std::uintptr_t>(to) % kVectorBytes == 0;
  return is_aligned && size >= kStreamFrom ? vector_sums<Store::kStreaming>(from, to, size)
                                           : vector_sums<Store::kCached>(from, to, size);
}

}  // namespace kvkernels::avx512
