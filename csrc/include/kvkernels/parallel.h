// Runs a piece of work on several threads at once.
#pragma once

#include <cstdint>
#include <functional>

namespace kvkernels {

// Calls body() on up to num_threads threads at once, the caller's among them, and returns when all
// have returned. Fewer threads may come than asked for, so the bodies must share out the work among
// themselves (an atomic counter). Rethrows the first exception thrown by a body.
void run_parallel(int num_threads, const std::function<void()>& body);

// Calls body(begin, end) for consecutive ranges of at most `grain` items that cover [0, num_items).
void parallel_ranges(int64_t num_items, int64_t grain, int num_threads,
                     const std::function<void(int64_t, int64_t)>& body);

}  // namespace kvkernels
