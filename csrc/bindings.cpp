// The Python extension: turns addresses and sizes into calls of the C++ core. The only file that
// includes pybind11; no file includes PyTorch, so one build serves every version of it.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

// ---- attention and cache kernels -----------------------------------------------------------

void bind_kernels([[maybe_unused]] py::module_& module) {}

// ---- checksums and block copies ------------------------------------------------------------

void bind_checksums([[maybe_unused]] py::module_& module) {}

// ---- the prefix index ----------------------------------------------------------------------

void bind_index([[maybe_unused]] py::module_& module) {}

}  // namespace

PYBIND11_MODULE(_kvkernels, module) {
  module.doc() = "C++ core of kvkernels and prefixstore; use it through those packages.";
  bind_kernels(module);
  bind_checksums(module);
  bind_index(module);
}
