// Few query rows in batches that share registers. In an anonymous namespace: each file that
// includes this gets its own copy, compiled with that file's flags.
#pragma once

#include <cstdint>

namespace kvkernels {
namespace {

// Calls visit(first, count) for all rows: at most `most` at a time, and about as many each time.
template <typename Visit>
void for_each_batch(int64_t num_rows, int64_t most, const Visit& visit) {
  const int64_t num_batches = (num_rows + most - 1) / most;
  for (int64_t batch = 0, first = 0, count; batch < num_batches; ++batch, first += count) {
    count = (num_rows - first) / (num_batches - batch);
    visit(first, count);
  }
}

}  // namespace
}  // namespace kvkernels
