// Stores past the cache (streaming stores), for memory that is not read soon.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvkernels {

// To be called after streaming stores, before ordinary stores to the same memory and before other
// threads look at it.
static inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Copies memory that is in the cache. Streaming stores do not read the target's lines first. They
// need whole lines; small copies are likely to be read again soon and stay in the cache.
static inline void copy_streaming(const std::byte* source, std::byte* target, int64_t num_bytes) {
#if defined(__x86_64__)
  constexpr int64_t kLineBytes = 64, kStreamFrom = 16 * 1024;
  if (num_bytes >= kStreamFrom && reinterpret_cast<std::uintptr_t>(target) % kLineBytes == 0) {
    const int64_t whole = num_bytes / kLineBytes * kLineBytes;
    for (int64_t line = 0; line < whole; line += kLineBytes) {
      for (int64_t at = line; at < line + kLineBytes; at += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + at),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at)));
      }
    }
    finish_streaming();
    std::memcpy(target + whole, source + whole, num_bytes - whole);
    return;
  }
#endif
  std::memcpy(target, source, num_bytes);
}

}  // namespace kvkernels
