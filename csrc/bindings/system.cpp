// What the Python extension asks of the operating system: memory and threads.
#include "bindings/bindings.h"
#include "kvkernels/memory.h"
#include "kvkernels/parallel.h"

namespace kvkernels::bindings {

void bind_system(pybind11::module_& module) {
  module.def("advise_huge_pages", [](uintptr_t data, int64_t num_bytes) {
    advise_huge_pages(pointer<void>(data), num_bytes);
  });
  module.def("prefer_own_threads", &prefer_own_threads);
  module.def("set_host_threads", &set_host_threads);
}

}  // namespace kvkernels::bindings
