// The linear layer's part of the Python extension.
#include "kvkernels/linear.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"

namespace kvkernels::bindings {

// Addresses and sizes come in the order in which the structure holds them.
void bind_linear(pybind11::module_& module) {
  module.def("linear",
             [](const std::array<uintptr_t, 4>& pointers, const std::array<int64_t, 5>& sizes,
                int dtype, int path, int num_threads) {
               const kvkernels::LinearArgs args = {pointer<const void>(pointers[0]),
                                                   pointer<const void>(pointers[1]),
                                                   pointer<const void>(pointers[2]),
                                                   pointer<void>(pointers[3]),
                                                   sizes[0],
                                                   sizes[1],
                                                   sizes[2],
                                                   sizes[3],
                                                   sizes[4],
                                                   static_cast<DType>(dtype)};
               const pybind11::gil_scoped_release unlocked;
               kvkernels::linear(args, static_cast<AttentionPath>(path), num_threads);
             });
}

}  // namespace kvkernels::bindings
