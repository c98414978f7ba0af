// Python bindings of the codecs. Addresses and sizes have been checked in Python.
#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"
#include "kvkernels/codecs.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

template <void (*kRun)(const CodecArgs&, AttentionPath, int)>
void run(const std::array<uintptr_t, 6>& pointers, const std::array<int64_t, 8>& sizes, int dtype,
         int path, int num_threads) {
  CodecArgs args;
  args.pool = pointer<std::byte>(pointers[0]);
  args.block_ids = pointer<const int64_t>(pointers[1]);
  args.layers = pointer<const LayerFormat>(pointers[2]);
  args.payloads = pointer<std::byte>(pointers[3]);
  args.sums = pointer<WordSums>(pointers[4]);
  args.is_good = pointer<uint8_t>(pointers[5]);
  args.block_stride = sizes[0];
  args.num_layers = sizes[1];
  args.num_planes = sizes[2];
  args.num_heads = sizes[3];
  args.block_size = sizes[4];
  args.head_dim = sizes[5];
  args.num_blocks = sizes[6];
  args.payload_stride = sizes[7];
  args.dtype = static_cast<DType>(dtype);
  const py::gil_scoped_release unlocked;
  kRun(args, static_cast<AttentionPath>(path), num_threads);
}

}  // namespace

void bind_codecs(py::module_& module) {
  module.def("encode_blocks", &run<kvkernels::encode_blocks>);
  module.def("decode_blocks", &run<kvkernels::decode_blocks>);
}

}  // namespace kvkernels::bindings
