// Checksums against the definitions, at every length and alignment that takes another path.
#include "kvkernels/checksum.h"

#include "../../csrc/cpu/checksum_kernels.h"
#include "kvkernels/cpu_features.h"

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

// One implementation of the sums.
struct Form {
  const char* name;
  WordSums (*sum)(const void*, std::size_t);
  WordSums (*copy)(const void*, void*, std::size_t);
};

// The one that callers get, and all that this processor can run.
std::vector<Form> find_forms() {
  std::vector<Form> forms = {
      {"chosen", kvkernels::checksum_words, kvkernels::copy_with_checksum},
      {"portable", kvkernels::portable::checksum_words, kvkernels::portable::copy_with_checksum}};
#if defined(__x86_64__)
  if (kvkernels::best_isa() >= kvkernels::Isa::kAvx512) {
    forms.push_back(
        {"AVX-512", kvkernels::avx512::checksum_words, kvkernels::avx512::copy_with_checksum});
    if (__builtin_cpu_supports("avx512vnni")) {
      forms.push_back(
          {"AVX512-VNNI", kvkernels::avx512_vnni::checksum_words, kvkernels::copy_with_checksum});
    }
  }
#endif
  return forms;
}

const std::vector<Form> forms = find_forms();

// `target` is as large as `source`, and `shift` tells where they lie.
void check_sums(const unsigned char* source, unsigned char* target, std::size_t size,
                std::size_t shift) {
  const WordSums expected = slow_sums(source, size);
  for (const Form& form : forms) {
    require(equal(form.sum(source, size), expected), form.name, size, shift);
    if (size > 0) std::memset(target, ~source[0], size);
    require(equal(form.copy(source, target, size), expected), form.name, size, shift);
    require(size == 0 || std::memcmp(source, target, size) == 0, form.name, size, shift);
  }
}

// Exact allocations, so that AddressSanitizer sees a read or write one byte outside.
void check_one(std::size_t size, std::size_t shift, std::mt19937_64& random) {
  const std::unique_ptr<unsigned char[]> source(new unsigned char[size + shift]);
  const std::unique_ptr<unsigned char[]> target(new unsigned char[size + shift]);
  for (std::size_t i = 0; i < size + shift; ++i) source[i] = static_cast<unsigned char>(random());
  const unsigned char* from = source.get() + shift;
  require(kvkernels::crc32c(from, size) == slow_crc32c(from, size), "crc32c", size, shift);
  const std::size_t cut = size / 3;
  const std::uint32_t head = kvkernels::crc32c(from, cut);
  require(kvkernels::crc32c(from + cut, size - cut, head) == slow_crc32c(from, size),
          "crc32c in two steps", size, shift);
  require(kvkernels::portable::crc32c(from, size, 0) == slow_crc32c(from, size), "portable crc32c",
          size, shift);
  if (size % 4 == 0) check_sums(from, target.get() + shift, size, shift);
}

// Sums of the largest words: those of 32 bits inside overflow here if anywhere, and `weighted`
// wraps modulo 2^64 many times over.
void check_largest() {
  const std::vector<unsigned char> ones((3 << 20) + 4, 0xFF);
  std::vector<unsigned char> target(ones.size());
  check_sums(ones.data(), target.data(), ones.size(), 0);
}

}  // namespace

int main() {
  std::mt19937_64 random(7);
  require(kvkernels::crc32c("123456789", 9) == 0xE3069283u, "check value of CRC-32C", 9, 0);
  for (std::size_t size = 0; size <= 700; ++size) check_one(size, size % 9, random);
  // either side of a group of vectors, and of the size where stores begin to stream; aligned or not
  for (std::size_t size : {1020, 1024, 1028, 2044, 3072, 16380, 16384, 16388, 65536, 65540, 100000,
                           (512 << 10) - 4, 512 << 10, (512 << 10) + 4}) {
    for (std::size_t shift : {0, 1, 4, 16, 63}) check_one(size, shift, random);
  }
  alignas(64) static unsigned char source[65536], target[65536];
  for (unsigned char& byte : source) byte = static_cast<unsigned char>(random());
  check_sums(source, target, sizeof(source), 0);  // streaming
  check_largest();
  std::puts("ok");
}
