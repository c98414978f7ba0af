// The Python extension: turns addresses and sizes into calls of the C++ core. Only the files of
// this folder include pybind11; no file includes PyTorch, so one build serves every version of it.
#include "bindings/bindings.h"

PYBIND11_MODULE(_kvkernels, module) {
  module.doc() = "C++ core of kvkernels and prefixstore; use it through those packages.";
  kvkernels::bindings::bind_kernels(module);
  kvkernels::bindings::bind_dispatcher(module);
  kvkernels::bindings::bind_tensors(module);
  kvkernels::bindings::bind_calls_on_tensors(module);
  kvkernels::bindings::bind_layers_on_tensors(module);
  kvkernels::bindings::bind_system(module);
  kvkernels::bindings::bind_linear(module);
  kvkernels::bindings::bind_decoder_layer(module);
  kvkernels::bindings::bind_pointwise(module);
  kvkernels::bindings::bind_codecs(module);
  kvkernels::bindings::bind_checksums(module);
  kvkernels::bindings::bind_file_reads(module);
  kvkernels::bindings::bind_index(module);
  kvkernels::bindings::bind_resp(module);
}
