// A model's layers on PyTorch's tensors themselves, as attention_tensors.cpp does attention: each
// function returns None where a call has to go the long way.
#include <algorithm>

#include "bindings/bindings.h"
#include "bindings/tensors.h"
#include "kvkernels/linear.h"
#include "kvkernels/pointwise.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

// Rows a constant stride apart, each dense.
struct Rows {
  const void* data;
  int64_t count, size, stride;
};

Rows view_rows(const TensorView& tensor) {
  require(tensor.dim >= 1);
  const int64_t size = tensor.shape[tensor.dim - 1];
  require(size > 0);
  int64_t count = 1;
  for (int i = 0; i + 1 < tensor.dim; ++i) count *= tensor.shape[i];
  if (tensor.is_contiguous_from(0)) return {tensor.data, count, size, size};
  require(tensor.dim == 2 && tensor.has_dense_rows());
  return {tensor.data, count, size, tensor.strides[0]};
}

py::tuple shape_of(const TensorView& tensor, int64_t last) {
  py::tuple shape(tensor.dim);
  for (int i = 0; i < tensor.dim; ++i) {
    shape[i] = py::int_(i + 1 < tensor.dim ? tensor.shape[i] : last);
  }
  return shape;
}

py::object linear_tensors(py::handle input, py::handle weight, py::handle bias, int path,
                          int num_threads) {
  return past_dispatcher(input, [&](const TensorView& in) {
    const TensorView weights = view(weight);
    const Rows rows = view_rows(in);
    require(weights.has(in.type, {kAnySize, rows.size}) && weights.has_dense_rows());
    const int64_t out_features = weights.shape[0];
    LinearLayer layer = {weights.data, view_row<void>(bias, in.type, out_features), nullptr,
                         out_features, weights.strides[0]};
    const DType dtype = float_dtype(in);
    py::object out = new_empty(input, shape_of(in, out_features));
    layer.out = view(out).data;
    const LinearArgs args = {rows.data, &layer, 1, rows.count, rows.size, rows.stride, dtype};
    const py::gil_scoped_release unlocked;
    kvkernels::linear(args, static_cast<AttentionPath>(path), num_threads);
    return out;
  });
}

py::object rms_norm_tensors(py::handle input, py::handle weight, float eps, bool is_offset,
                            int path, int num_threads) {
  return past_dispatcher(input, [&](const TensorView& in) {
    const Rows rows = view_rows(in);
    const void* const weights = view_row<void>(weight, in.type, rows.size);
    require(weights != nullptr);
    const DType dtype = float_dtype(in);
    py::object out = new_empty(input, shape_of(in, rows.size));
    const RmsNormArgs args = {rows.data,  weights,   view(out).data,
                              rows.count, rows.size, rows.stride,
                              dtype,      eps,       is_offset};
    const py::gil_scoped_release unlocked;
    kvkernels::rms_norm(args, static_cast<AttentionPath>(path), num_threads);
    return out;
  });
}

py::object gated_activation_tensors(py::handle gate, py::handle up, int activation, int path,
                                    int num_threads) {
  return past_dispatcher(gate, [&](const TensorView& gates) {
    const TensorView ups = view(up);
    const Rows rows = view_rows(gates), others = view_rows(ups);
    require(ups.type == gates.type && ups.dim == gates.dim &&
            std::equal(ups.shape, ups.shape + ups.dim, gates.shape));
    const DType dtype = float_dtype(gates);
    py::object out = new_empty(gate, shape_of(gates, rows.size));
    const GatedActivationArgs args = {
        rows.data,     others.data, view(out).data,
        rows.count,    rows.size,   rows.stride,
        others.stride, dtype,       static_cast<Activation>(activation)};
    const py::gil_scoped_release unlocked;
    kvkernels::gated_activation(args, static_cast<AttentionPath>(path), num_threads);
    return out;
  });
}

}  // namespace

void bind_layers_on_tensors(py::module_& module) {
  module.def("linear_tensors", &linear_tensors);
  module.def("rms_norm_tensors", &rms_norm_tensors);
  module.def("gated_activation_tensors", &gated_activation_tensors);
}

}  // namespace kvkernels::bindings
