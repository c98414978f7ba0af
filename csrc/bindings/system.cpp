// Python bindings of what is asked of the operating system: memory and threads.
#include "bindings/bindings.h"
#include "bindings/bytes.h"
#include "kvkernels/memory.h"
#include "kvkernels/parallel.h"

namespace kvkernels::bindings {
namespace {

// Whether all buffers begin at a multiple of `num_bytes`.
bool all_begin_at_multiples(const pybind11::list& buffers, uintptr_t num_bytes) {
  for (const pybind11::handle buffer : buffers) {
    if (reinterpret_cast<uintptr_t>(Bytes(buffer).data()) % num_bytes != 0) return false;
  }
  return true;
}

}  // namespace

void bind_system(pybind11::module_& module) {
  module.def("advise_huge_pages", [](uintptr_t data, int64_t num_bytes) {
    advise_huge_pages(pointer<void>(data), num_bytes);
  });
  module.def("all_begin_at_multiples", &all_begin_at_multiples);
  module.def("prefer_own_threads", &prefer_own_threads);
  module.def("set_host_threads", &set_host_threads);
  module.def("set_mkl_threads", &set_mkl_threads);
}

}  // namespace kvkernels::bindings
