// The AVX-512 forms of checksum.h; call them only where best_isa() is kAvx512 or better.
#pragma once

#include "kvkernels/checksum.h"

namespace kvkernels::avx512 {

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc);
WordSums checksum_words(const void* data, std::size_t size);
WordSums copy_with_checksum(const void* source, void* target, std::size_t size);

}  // namespace kvkernels::avx512
