// Asking for memory that will be read soon.
#pragma once

#include <cstdint>

#include "kvkernels/cpu_features.h"

namespace kvkernels {

// Into the L1 cache on processors that have room there for many requests, else into the L2 cache.
enum class CacheLevel { kL1, kL2 };

template <CacheLevel kLevel>
[[gnu::always_inline]] static inline void prefetch_line(const void* line) {
  __builtin_prefetch(line, 0, kLevel == CacheLevel::kL1 ? 3 : 2);
}

// All lines that begin in these bytes, from the first on.
template <CacheLevel kLevel>
static inline void prefetch_lines_into(const char* lines, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 64) prefetch_line<kLevel>(lines + i);
}

static inline void prefetch_lines(const void* lines, int64_t num_bytes) {
  const auto* first = static_cast<const char*>(lines);
  if (kPrefetchesToL1) {
    prefetch_lines_into<CacheLevel::kL1>(first, num_bytes);
  } else {
    prefetch_lines_into<CacheLevel::kL2>(first, num_bytes);
  }
}

}  // namespace kvkernels
