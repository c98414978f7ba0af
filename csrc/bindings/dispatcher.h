// Which calls PyTorch's dispatcher has to see. PyTorch's own functions for C++ are asked, where the
// process has them: that takes 4 us after weights and a cache were read, which drive code out of
// the processor's caches, and through Python 15 to 25.
#pragma once

namespace kvkernels::bindings {

// Whether autograd, a mode, a transform (`vmap`, tangents), a graph that is being recorded or the
// profiler is to see what this thread calls now.
bool needs_dispatcher();

}  // namespace kvkernels::bindings
