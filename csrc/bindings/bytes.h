// Access to Python's buffers for the files of the Python extension.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>
#include <vector>

namespace kvkernels::bindings {

// The bytes of any contiguous Python buffer; it cannot be freed or resized while this lives.
class Bytes {
 public:
  explicit Bytes(pybind11::handle data) {
    if (PyObject_GetBuffer(data.ptr(), &view_, PyBUF_SIMPLE) != 0) {
      PyErr_Clear();
      const std::string kind = Py_TYPE(data.ptr())->tp_name;
      throw pybind11::value_error("data: expected a contiguous buffer, got " + kind);
    }
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  const void* data() const { return view_.buf; }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_;
};

// Buffers that cannot be freed or resized while this holds them. To be released with the GIL held.
class HeldBuffers {
 public:
  HeldBuffers() = default;
  ~HeldBuffers() { release(); }
  HeldBuffers(HeldBuffers&& other) noexcept { buffers_.swap(other.buffers_); }
  HeldBuffers(const HeldBuffers&) = delete;
  HeldBuffers& operator=(const HeldBuffers&) = delete;

  const Py_buffer& add(pybind11::handle object, int flags) {
    Py_buffer buffer;
    if (PyObject_GetBuffer(object.ptr(), &buffer, flags) != 0) {
      throw pybind11::error_already_set();
    }
    return buffers_.emplace_back(buffer);
  }

  void release() {
    for (Py_buffer& buffer : buffers_) PyBuffer_Release(&buffer);
    buffers_.clear();
  }

  std::size_t size() const { return buffers_.size(); }
  const Py_buffer& operator[](std::size_t number) const { return buffers_[number]; }

 private:
  std::vector<Py_buffer> buffers_;
};

}  // namespace kvkernels::bindings
