// Python bindings of linear layers.
#include "kvkernels/linear.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"

namespace kvkernels::bindings {

// input: address, rows, features and stride. parts: for each layer the addresses of weight, bias
// and result, the weight's shape and its stride.
void bind_linear(pybind11::module_& module) {
  module.def("linear", [](const std::array<int64_t, 4>& input,
                          const std::vector<std::array<int64_t, 6>>& parts, int dtype, int path,
                          int num_threads) {
    std::vector<LinearLayer> layers;
    layers.reserve(parts.size());
    for (const auto& [weight, bias, out, out_features, in_features, weight_stride] : parts) {
      // Checked at every call: a module may be given another weight after Python has checked the
      // first one.
      if (in_features != input[2]) {
        throw std::invalid_argument("weight: expected " + std::to_string(input[2]) +
                                    " features (those of input), got " +
                                    std::to_string(in_features));
      }
      layers.push_back({pointer<const void>(weight), pointer<const void>(bias), pointer<void>(out),
                        out_features, weight_stride});
    }
    const LinearArgs args = {pointer<const void>(input[0]),
                             layers.data(),
                             static_cast<int64_t>(layers.size()),
                             input[1],
                             input[2],
                             input[3],
                             static_cast<DType>(dtype)};
    const pybind11::gil_scoped_release unlocked;
    kvkernels::linear(args, static_cast<AttentionPath>(path), num_threads);
  });
}

}  // namespace kvkernels::bindings
