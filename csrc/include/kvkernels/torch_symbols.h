// Functions of PyTorch's, in the version that the process has loaded.
#pragma once

namespace kvkernels {

// Where the function of this mangled name begins, if PyTorch's library for CPUs, or one that it
// needs, exports it; else null.
void* find_torch_symbol(const char* name);

}  // namespace kvkernels
