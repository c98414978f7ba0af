// Asking for weights before they are read. In an anonymous namespace, like the products.
#pragma once

#include <cstdint>

namespace kvkernels {
namespace {

// The next weights in memory, asked for ahead of the reader: the processor's own prefetch stops at
// every page, and 16 rows are more streams than it follows. All blocks of rows that go over the
// same weights ask for a part of them, so that memory is busy all the time.
struct Ahead {
  const char* line;

  [[gnu::always_inline]] void advance(int64_t num_lines) {
    for (int64_t i = 0; i < num_lines; ++i, line += 64) __builtin_prefetch(line, 0, 2);
  }
};

}  // namespace
}  // namespace kvkernels
