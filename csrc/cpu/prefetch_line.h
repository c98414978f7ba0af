// Asking for memory that will be read soon.
#pragma once

#include "kvkernels/cpu_features.h"

namespace kvkernels {

// Asks for a line, into the L1 cache on processors that have room there for many requests, else
// into the L2 cache.
static inline void prefetch_line(const void* line) {
  if (kPrefetchesToL1) {
    __builtin_prefetch(line, 0, 3);
  } else {
    __builtin_prefetch(line, 0, 2);
  }
}

}  // namespace kvkernels
