// The forms of checksum.h, beside each other so that a test can run all on one machine.
#pragma once

#include "kvkernels/checksum.h"

namespace kvkernels::portable {

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc);
WordSums checksum_words(const void* data, std::size_t size);
WordSums copy_with_checksum(const void* source, void* target, std::size_t size);

}  // namespace kvkernels::portable

// Only where best_isa() is kAvx512 or better.
namespace kvkernels::avx512 {

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc);
WordSums checksum_words(const void* data, std::size_t size);
WordSums copy_with_checksum(const void* source, void* target, std::size_t size);

}  // namespace kvkernels::avx512

// Only where there is AVX512-VNNI besides. A copy waits for memory however it sums.
namespace kvkernels::avx512_vnni {

WordSums checksum_words(const void* data, std::size_t size);

}  // namespace kvkernels::avx512_vnni
