// Checksums of stored blocks: CRC-32C for headers, two order-free word sums for payloads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvkernels {

// Two sums, both modulo 2^64, over the little-endian u32 words w_0, w_1, ... of a buffer. They do
// not depend on the order of addition, so any parallel schedule gives the same pair. Every change
// within one word and every two-bit error changes `sum` or `weighted`; swapped words change
// `weighted`.
struct WordSums {
  std::uint64_t sum;       // of w_i
  std::uint64_t weighted;  // of (i + 1) * w_i
};

// Adds to a buffer's `sums` those of a part of it, `part`, summed by itself, whose first word is
// word `first_word` of the buffer.
[[gnu::always_inline]] inline void append_sums(const WordSums& part, std::size_t first_word,
                                               WordSums& sums) {
  sums.sum += part.sum;
  sums.weighted += part.weighted + first_word * part.sum;
}

// CRC-32C (Castagnoli) of `size` bytes. `crc` is 0 for the first part of the data, the result so
// far for a later one.
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc = 0);

// Sums of `size` bytes, a multiple of 4. Needs no alignment.
WordSums checksum_words(const void* data, std::size_t size);

// Copies `size` bytes, a multiple of 4, and returns their sums. The ranges must not overlap.
WordSums copy_with_checksum(const void* source, void* target, std::size_t size);

}  // namespace kvkernels
