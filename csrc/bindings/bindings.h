// Declarations that the files of the Python extension share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace kvkernels::bindings {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_kernels(pybind11::module_& module);
void bind_dispatcher(pybind11::module_& module);
void bind_tensors(pybind11::module_& module);
void bind_calls_on_tensors(pybind11::module_& module);
void bind_layers_on_tensors(pybind11::module_& module);
void bind_system(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_decoder_layer(pybind11::module_& module);
void bind_pointwise(pybind11::module_& module);
void bind_codecs(pybind11::module_& module);
void bind_checksums(pybind11::module_& module);
void bind_file_reads(pybind11::module_& module);
void bind_index(pybind11::module_& module);
void bind_resp(pybind11::module_& module);

}  // namespace kvkernels::bindings
