// Splits a few query rows into batches that share registers. In an anonymous namespace: each file
// that includes this gets its own copy, compiled with that file's flags.
#pragma once

#include <cstdint>

namespace kvkernels {
namespace {

// Calls visit(first, count) for batches that cover all rows, of at most `most` rows and about equal
// size.
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
