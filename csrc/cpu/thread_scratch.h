// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>

namespace kvkernels {

// Returns memory of the calling thread: 64-byte aligned, uninitialised, valid until its next call
// with the same slot (0 to 4). Slot 1 is for kernels, 4 for those who call several of them, the
// others for the kernels' schedulers. Throws std::bad_alloc.
float* thread_scratch(int slot, int64_t num_floats);

}  // namespace kvkernels
