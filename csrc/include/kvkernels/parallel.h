// Runs a piece of work on several threads at once.
#pragma once

#include <cstdint>
#include <functional>

namespace kvkernels {

// Calls body() on up to num_threads threads at once, the caller's among them, and returns when
// every call has returned. Fewer threads may come than asked for, so the bodies must share out the
// work among themselves (an atomic counter). Rethrows the first exception that a body throws.
void run_parallel(int num_threads, const std::function<void()>& body);

// Sets, for calls from this thread, whether run_parallel uses threads of our own even where the
// host program has loaded an OpenMP runtime. Returns the setting before. Our threads share the
// processors worse with OpenMP's, which spin for some milliseconds after each region, and far
// better with all other threads: so this is for callers that leave OpenMP alone.
bool prefer_own_threads(bool is_wanted);

// Sets how many threads the OpenMP regions get that this thread begins (`omp_set_num_threads`).
// Does nothing where there is no OpenMP.
void set_host_threads(int num_threads);

// Sets how many threads MKL uses in PyTorch's calls that this thread makes; 0: as many as the
// process has set. Returns the setting before. Does nothing, and returns 0, where there is no MKL.
int set_mkl_threads(int num_threads);

// Calls body(begin, end) for consecutive ranges of at most `grain` items (at least 1) that cover
// [0, num_items), on up to num_threads threads. Exceptions as in run_parallel.
void parallel_ranges(int64_t num_items, int64_t grain, int num_threads,
                     const std::function<void(int64_t, int64_t)>& body);

}  // namespace kvkernels
