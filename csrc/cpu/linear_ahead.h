// Prefetching of weights. In an anonymous namespace, like the products.
#pragma once

#include <cstdint>

#include "cpu/prefetch_line.h"

namespace kvkernels {
namespace {

// The next weights in memory, prefetched ahead of the reader: the processor's own prefetch stops at
// every page, and cannot follow as many streams as 16 rows. All blocks of rows that go over the
// same weights ask for a part of the next ones, so that memory is always busy. They go to the L1
// cache where attention's requests do (see prefetch_line.h): on Zen 5 a decode step's layers of 576
// features took 3 to 9 % less time that way, wider ones as long.
struct Ahead {
  const char* line;

  [[gnu::always_inline]] void advance(int64_t num_lines) {
    prefetch_lines(line, 64 * num_lines);
    line += 64 * num_lines;
  }
};

}  // namespace
}  // namespace kvkernels
