// Python bindings of the pointwise functions.
#include "kvkernels/pointwise.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "bindings/bindings.h"

namespace kvkernels::bindings {
namespace {

using pybind11::gil_scoped_release;

template <size_t kCount>
using Addresses = std::array<uintptr_t, kCount>;
template <size_t kCount>
using Sizes = std::array<int64_t, kCount>;

void bind_rms_norm(pybind11::module_& module) {
  module.def("rms_norm", [](const Addresses<3>& pointers, const Sizes<3>& sizes, float eps,
                            bool is_offset, int dtype, int path, int num_threads) {
    const RmsNormArgs args = {pointer<const void>(pointers[0]),
                              pointer<const void>(pointers[1]),
                              pointer<void>(pointers[2]),
                              sizes[0],
                              sizes[1],
                              sizes[2],
                              static_cast<DType>(dtype),
                              eps,
                              is_offset};
    const gil_scoped_release unlocked;
    rms_norm(args, static_cast<AttentionPath>(path), num_threads);
  });
}

void check_shape(const char* name, const Sizes<3>& shape, const Sizes<3>& expected) {
  if (shape == expected) return;
  const auto text = [](const Sizes<3>& sizes) {
    return "[" + std::to_string(sizes[0]) + ", " + std::to_string(sizes[1]) + ", " +
           std::to_string(sizes[2]) + "]";
  };
  throw std::invalid_argument(std::string(name) + ": expected shape " + text(expected) + ", got " +
                              text(shape));
}

void bind_rotary_embedding(pybind11::module_& module) {
  module.def("rotary_embedding",
             [](const Addresses<4>& pointers, const Sizes<4>& sizes,
                const std::array<Sizes<3>, 2>& angle_sizes, const Sizes<3>& input_strides,
                const Sizes<3>& out_strides, const Sizes<2>& angle_strides, int dtype, int path,
                int num_threads) {
               // Some models have angles for only a part of each head, past which the kernel would
               // read.
               const auto& [cos, sin] = angle_sizes;
               check_shape("cos", cos, {cos[0] == 1 ? 1 : sizes[0], sizes[2], sizes[3]});
               check_shape("sin", sin, cos);
               const RotaryArgs args = {pointer<const void>(pointers[0]),
                                        pointer<const void>(pointers[1]),
                                        pointer<const void>(pointers[2]),
                                        pointer<void>(pointers[3]),
                                        sizes[0],
                                        sizes[1],
                                        sizes[2],
                                        sizes[3],
                                        {input_strides[0], input_strides[1], input_strides[2]},
                                        {out_strides[0], out_strides[1], out_strides[2]},
                                        {angle_strides[0], angle_strides[1]},
                                        static_cast<DType>(dtype)};
               const gil_scoped_release unlocked;
               rotary_embedding(args, static_cast<AttentionPath>(path), num_threads);
             });
}

void bind_gated_activation(pybind11::module_& module) {
  module.def("gated_activation", [](const Addresses<3>& pointers, const Sizes<4>& sizes,
                                    int activation, int dtype, int path, int num_threads) {
    const GatedActivationArgs args = {pointer<const void>(pointers[0]),
                                      pointer<const void>(pointers[1]),
                                      pointer<void>(pointers[2]),
                                      sizes[0],
                                      sizes[1],
                                      sizes[2],
                                      sizes[3],
                                      static_cast<DType>(dtype),
                                      static_cast<Activation>(activation)};
    const gil_scoped_release unlocked;
    gated_activation(args, static_cast<AttentionPath>(path), num_threads);
  });
}

}  // namespace

// Addresses and sizes come in the order of the structures' fields.
void bind_pointwise(pybind11::module_& module) {
  bind_rms_norm(module);
  bind_rotary_embedding(module);
  bind_gated_activation(module);
}

}  // namespace kvkernels::bindings
