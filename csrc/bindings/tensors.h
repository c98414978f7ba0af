// Reads PyTorch's tensors from C++ without its headers, through the table of C functions that
// DLPack 1.x defines for the exchange of tensors and PyTorch offers from 2.10 on. Each of a
// tensor's attributes, asked for from Python, takes 0.1 us, and 1 to 3 us after weights and a cache
// were read, which drive the interpreter's and PyTorch's code out of the processor's caches.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "bindings/dispatcher.h"
#include "kvkernels/attention.h"

namespace kvkernels::bindings {

// As DLPack numbers them: https://dmlc.github.io/dlpack/latest/c_api.html
struct ElementType {
  uint8_t code, bits;
  uint16_t lanes;

  bool operator==(const ElementType&) const = default;
};

constexpr ElementType kInt32Type = {0, 32, 1}, kInt64Type = {0, 64, 1}, kUInt8Type = {1, 8, 1},
                      kFloat16Type = {2, 16, 1}, kFloat32Type = {2, 32, 1},
                      kBFloat16Type = {4, 16, 1}, kFloat8Type = {10, 8, 1};  // e4m3fn

// A tensor in the memory of the CPU. Valid while nobody changes or frees the tensor.
struct TensorView {
  char* data;
  int dim;
  ElementType type;
  const int64_t *shape, *strides;  // strides in elements

  bool has(ElementType wanted, std::initializer_list<int64_t> wanted_shape) const;

  // Whether neighbours along the last dimension, of at least one, are neighbours in memory.
  bool has_dense_rows() const { return shape[dim - 1] <= 1 || strides[dim - 1] == 1; }

  bool is_contiguous_from(int first) const;

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

// Accepts any size, in a wanted shape.
constexpr int64_t kAnySize = -1;

// The dtype of a cache or a query; none: attention does not serve it.
std::optional<DType> dtype_of(ElementType type);

// The tensor's view; none unless it is of one of PyTorch's own two classes, lies in the CPU's
// memory and has memory.
std::optional<TensorView> view_tensor(pybind11::handle tensor);

// Thrown where a call has to go the long way, which says what is wrong by name.
struct NotServed {};

inline void require(bool is_met) {
  if (!is_met) throw NotServed();
}

// What `work` returns, or None for such a call.
template <typename Work>
pybind11::object or_none(const Work& work) {
  try {
    return work();
  } catch (const NotServed&) {
    return pybind11::none();
  }
}

// The same for an op's call, which also goes the long way where PyTorch's dispatcher has to see it,
// or its first tensor is none of view_tensor's; `work` gets that one's view.
template <typename Work>
pybind11::object past_dispatcher(pybind11::handle first, const Work& work) {
  if (needs_dispatcher()) return pybind11::none();
  const std::optional<TensorView> found = view_tensor(first);
  if (!found.has_value()) return pybind11::none();
  return or_none([&]() -> pybind11::object { return work(*found); });
}

// The same as view_tensor, and as dtype_of for what is computed with; require that there is one.
TensorView view(pybind11::handle tensor);
DType float_dtype(const TensorView& tensor);  // not float8

// A dense row of numbers, or null for None.
template <typename T>
const T* view_row(pybind11::handle tensor, ElementType type, int64_t size) {
  if (tensor.is_none()) return nullptr;
  const TensorView row = view(tensor);
  require(row.has(type, {size}) && row.has_dense_rows());
  return row.as<const T>();
}

// tensor.new_empty(shape)
pybind11::object new_empty(pybind11::handle tensor, const pybind11::tuple& shape);

}  // namespace kvkernels::bindings
