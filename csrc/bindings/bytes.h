// What the files of the Python extension read of Python's buffers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>

namespace kvkernels::bindings {

// Contiguous bytes of any Python buffer; it cannot be freed or resized while this lives.
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

}  // namespace kvkernels::bindings
