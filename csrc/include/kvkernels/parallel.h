// Runs a piece of work on several threads at once.
#pragma once

#include <cstdint>
#include <functional>

namespace kvkernels {

// Calls body() on up to num_threads threads at once, the caller's among them, and returns when all
// have returned. Fewer threads may come than asked for, so the bodies must share out the work among
// themselves (an atomic counter). Rethrows the first exception thrown by a body.
void run_parallel(int num_threads, const std::function<void()>& body);

// Whether run_parallel, when this thread calls it, is to use threads of our own where it would use
// the host program's OpenMP runtime. Returns what held before. They share the processors worse with
// OpenMP's threads, which keep looking for work for some milliseconds, and far better with all
// others: for callers that leave OpenMP alone.
bool prefer_own_threads(bool is_wanted);

// How many threads the host program's OpenMP regions get that this thread begins. Nothing happens
// where there is no OpenMP.
void set_host_threads(int num_threads);

// How many threads MKL gets in PyTorch's calls that this thread makes; 0: as many as the process's.
// Returns what held before. Nothing happens, and 0 is returned, where there is no MKL.
int set_mkl_threads(int num_threads);

// Calls body(begin, end) for consecutive ranges of at most `grain` items that cover [0, num_items).
void parallel_ranges(int64_t num_items, int64_t grain, int num_threads,
                     const std::function<void(int64_t, int64_t)>& body);

}  // namespace kvkernels
