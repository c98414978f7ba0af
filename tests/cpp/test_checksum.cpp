// Checksums against the definitions, at every length and alignment that takes another path.
#include "kvkernels/checksum.h"

#include "../../csrc/cpu/checksum_kernels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

using kvkernels::WordSums;

namespace {

void require(bool condition, const char* what, std::size_t size, std::size_t shift) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s, size %zu, shift %zu\n", what, size, shift);
  std::exit(1);
}

std::uint32_t slow_crc32c(const unsigned char* data, std::size_t size) {
  std::uint32_t crc = ~0u;
  for (std::size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0u);
  }
  return ~crc;
}

WordSums slow_sums(const unsigned char* data, std::size_t size) {
  WordSums sums{0, 0};
  for (std::size_t i = 0; i < size / 4; ++i) {
    std::uint32_t word;
    std::memcpy(&word, data + 4 * i, 4);
    sums.sum += word;
    sums.weighted += (i + 1) * word;
  }
  return sums;
}

bool equal(const WordSums& a, const WordSums& b) {
  return a.sum == b.sum && a.weighted == b.weighted;
}

// Exact allocations, so that AddressSanitizer sees a read or write one byte outside.
void check_one(std::size_t size, std::size_t shift, std::mt19937_64& random) {
  const std::unique_ptr<unsigned char[]> source(new unsigned char[size + shift]);
  const std::unique_ptr<unsigned char[]> target(new unsigned char[size + shift]);
  for (std::size_t i = 0; i < size + shift; ++i) source[i] = static_cast<unsigned char>(random());
  const unsigned char* from = source.get() + shift;
  unsigned char* to = target.get() + shift;
  require(kvkernels::crc32c(from, size) == slow_crc32c(from, size), "crc32c", size, shift);
  const std::size_t cut = size / 3;
  const std::uint32_t head = kvkernels::crc32c(from, cut);
  require(kvkernels::crc32c(from + cut, size - cut, head) == slow_crc32c(from, size),
          "crc32c in two steps", size, shift);
  require(kvkernels::portable::crc32c(from, size, 0) == slow_crc32c(from, size), "portable crc32c",
          size, shift);
  if (size % 4 != 0) return;
  const WordSums expected = slow_sums(from, size);
  require(equal(kvkernels::checksum_words(from, size), expected), "words", size, shift);
  require(equal(kvkernels::copy_with_checksum(from, to, size), expected), "copy", size, shift);
  require(size == 0 || std::memcmp(from, to, size) == 0, "copied bytes", size, shift);
  std::memset(to, 0, size);
  require(equal(kvkernels::portable::checksum_words(from, size), expected), "portable words", size,
          shift);
  require(equal(kvkernels::portable::copy_with_checksum(from, to, size), expected), "portable copy",
          size, shift);
  require(size == 0 || std::memcmp(from, to, size) == 0, "portable copied bytes", size, shift);
}

// Sums of the largest words wrap modulo 2^64 many times over in `weighted`.
void check_wrapping() {
  const std::vector<unsigned char> ones(1 << 20, 0xFF);
  require(equal(kvkernels::checksum_words(ones.data(), ones.size()),
                slow_sums(ones.data(), ones.size())),
          "wrapping", ones.size(), 0);
}

}  // namespace

int main() {
  std::mt19937_64 random(7);
  require(kvkernels::crc32c("123456789", 9) == 0xE3069283u, "check value of CRC-32C", 9, 0);
  for (std::size_t size = 0; size <= 700; ++size) check_one(size, size % 9, random);
  // either side of the size where stores begin to stream, aligned and not
  for (std::size_t size : {16380, 16384, 16388, 65536, 65540, 100000}) {
    for (std::size_t shift : {0, 1, 4, 16, 63}) check_one(size, shift, random);
  }
  alignas(64) static unsigned char source[65536], target[65536];
  for (unsigned char& byte : source) byte = static_cast<unsigned char>(random());
  require(equal(kvkernels::copy_with_checksum(source, target, sizeof(source)),
                slow_sums(source, sizeof(source))) &&
              std::memcmp(source, target, sizeof(source)) == 0,
          "streaming copy", sizeof(source), 0);
  check_wrapping();
  std::puts("ok");
}
