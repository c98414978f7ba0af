// The codecs' part of the Python extension: addresses and sizes that Python has checked.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/bindings.h"
#include "kvkernels/codecs.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

// Bits, groups and offsets of the parts; then the next side's.
using FormatFields = std::array<int64_t, 14>;

LayerFormat layer_format(const FormatFields& fields) {
  const auto side = [&](int first) {
    return SideFormat{fields[first],
                      fields[first + 1],
                      {fields[first + 2], fields[first + 3], fields[first + 4], fields[first + 5]}};
  };
  return {fields[0], fields[1], side(2), side(8)};
}

template <void (*kRun)(const CodecArgs&, AttentionPath, int)>
void run(const std::array<uintptr_t, 5>& pointers, const std::array<int64_t, 7>& sizes, int dtype,
         const std::vector<FormatFields>& layers, int path, int num_threads) {
  std::vector<LayerFormat> formats;
  for (const FormatFields& fields : layers) formats.push_back(layer_format(fields));
  CodecArgs args;
  args.pool = pointer<std::byte>(pointers[0]);
  args.block_ids = pointer<const int64_t>(pointers[1]);
  args.payloads = pointer<std::byte>(pointers[2]);
  args.sums = pointer<WordSums>(pointers[3]);
  args.is_good = pointer<uint8_t>(pointers[4]);
  args.block_bytes = sizes[0];
  args.num_layers = sizes[1];
  args.num_heads = sizes[2];
  args.block_size = sizes[3];
  args.head_dim = sizes[4];
  args.num_blocks = sizes[5];
  args.payload_stride = sizes[6];
  args.dtype = static_cast<DType>(dtype);
  args.layers = formats.data();
  const py::gil_scoped_release unlocked;
  kRun(args, static_cast<AttentionPath>(path), num_threads);
}

}  // namespace

void bind_codecs(py::module_& module) {
  module.def("encode_blocks", &run<kvkernels::encode_blocks>);
  module.def("decode_blocks", &run<kvkernels::decode_blocks>);
}

}  // namespace kvkernels::bindings
