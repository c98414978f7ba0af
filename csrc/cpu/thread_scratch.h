// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>

namespace kvkernels {

// Of the calling thread, 64-byte aligned, uninitialised, valid until the next call with the same
// slot. Slot 1 is the kernels', the others are their schedulers'.
float* thread_scratch(int slot, int64_t num_floats);

}  // namespace kvkernels
