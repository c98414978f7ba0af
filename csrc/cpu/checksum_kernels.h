// All forms of the functions of checksum.h, so that a test can run each of them on one machine.
#pragma once

#include "kvkernels/checksum.h"

namespace kvkernels::portable {

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc);
WordSums checksum_words(const void* data, std::size_t size);
WordSums copy_with_checksum(const void* source, void* target, std::size_t size);

}  // namespace kvkernels::portable

// Needs best_isa() >= kAvx512.
namespace kvkernels::avx512 {

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc);
WordSums checksum_words(const void* data, std::size_t size);
WordSums copy_with_checksum(const void* source, void* target, std::size_t size);

}  // namespace kvkernels::avx512

// Needs AVX512-VNNI besides. There is no copy: that waits for memory however it sums.
namespace kvkernels::avx512_vnni {

WordSums checksum_words(const void* data, std::size_t size);

}  // namespace kvkernels::avx512_vnni
