// Checksums in portable C++, and the choice of the fastest form that this processor has.
#include "kvkernels/checksum.h"

#include <array>
#include <bit>
#include <cstring>

#include "cpu/checksum_kernels.h"
#include "kvkernels/cpu_features.h"

namespace kvkernels {
namespace portable {
namespace {

static_assert(std::endian::native == std::endian::little, "records are little endian");

using Byte = unsigned char;

// kCrcTables[k][b]: what byte b contributes after k further zero bytes (slicing by eight).
constexpr auto kCrcTables = [] {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0u);
    tables[0][b] = crc;
  }
  for (int k = 1; k < 8; ++k) {
    for (int b = 0; b < 256; ++b) {
      const std::uint32_t crc = tables[k - 1][b];
      tables[k][b] = (crc >> 8) ^ tables[0][crc & 0xFF];
    }
  }
  return tables;
}();

// Lane j sums the words j, j + kLanes, ...: `first` is their plain sum A, `second` the sum of A
// after every step. With T steps, the sum of t * w_t is T * A - second, so the loop needs no
// multiplication.
template <bool kCopy>
WordSums lane_sums(const Byte* source, Byte* target, std::size_t size) {
  constexpr std::size_t kLanes = 8;
  std::uint64_t first[kLanes] = {}, second[kLanes] = {};
  const std::size_t num_words = size / 4, steps = num_words / kLanes;
  for (std::size_t step = 0; step < steps; ++step) {
    std::uint32_t words[kLanes];
    std::memcpy(words, source + step * sizeof(words), sizeof(words));
    if constexpr (kCopy) std::memcpy(target + step * sizeof(words), words, sizeof(words));
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      first[lane] += words[lane];
      second[lane] += first[lane];
    }
  }
  WordSums sums{0, 0};
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    sums.sum += first[lane];
    sums.weighted += kLanes * (steps * first[lane] - second[lane]) + (lane + 1) * first[lane];
  }
  for (std::size_t i = steps * kLanes; i < num_words; ++i) {
    std::uint32_t word;
    std::memcpy(&word, source + i * 4, 4);
    if constexpr (kCopy) std::memcpy(target + i * 4, &word, 4);
    sums.sum += word;
    sums.weighted += (i + 1) * word;
  }
  return sums;
}

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc) {
  const Byte* bytes = static_cast<const Byte*>(data);
  crc = ~crc;
  for (; size >= 8; bytes += 8, size -= 8) {
    std::uint64_t word;
    std::memcpy(&word, bytes, 8);
    word ^= crc;
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= kCrcTables[7 - k][(word >> (8 * k)) & 0xFF];
  }
  for (; size > 0; ++bytes, --size) crc = (crc >> 8) ^ kCrcTables[0][(crc ^ *bytes) & 0xFF];
  return ~crc;
}

WordSums checksum_words(const void* data, std::size_t size) {
  return lane_sums<false>(static_cast<const Byte*>(data), nullptr, size);
}

WordSums copy_with_checksum(const void* source, void* target, std::size_t size) {
  return lane_sums<true>(static_cast<const Byte*>(source), static_cast<Byte*>(target), size);
}

}  // namespace portable

namespace {

using Byte = unsigned char;

#if defined(__x86_64__)
bool use_avx512() { return best_isa() >= Isa::kAvx512; }

bool use_avx512_vnni() {
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  return has_vnni && use_avx512();
}
#endif

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc) {
#if defined(__x86_64__)
  if (use_avx512()) return avx512::crc32c(data, size, crc);
#endif
  return portable::crc32c(data, size, crc);
}

WordSums checksum_words(const void* data, std::size_t size) {
#if defined(__x86_64__)
  if (use_avx512_vnni()) return avx512_vnni::checksum_words(data, size);
  if (use_avx512()) return avx512::checksum_words(data, size);
#endif
  return portable::checksum_words(data, size);
}

WordSums copy_with_checksum(const void* source, void* target, std::size_t size) {
#if defined(__x86_64__)
  if (use_avx512()) return avx512::copy_with_checksum(source, target, size);
#endif
  return portable::copy_with_checksum(source, target, size);
}

}  // namespace kvkernels
