// The part of the Python extension that sums bytes, and copies and sums them.
#include <cstddef>
#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "kvkernels/checksum.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

// Contiguous bytes of any Python buffer; it cannot be freed or resized while this lives.
class Bytes {
 public:
  Bytes(const py::object& object, const char* name, bool is_writable) {
    const int flags = is_writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
      PyErr_Clear();
      const std::string kind = Py_TYPE(object.ptr())->tp_name;
      throw py::value_error(std::string(name) + ": expected a contiguous " +
                            (is_writable ? "writable " : "") + "buffer, got " + kind);
    }
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  unsigned char* data() const { return static_cast<unsigned char*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_;
};

void check_bytes(const char* name, std::size_t size, std::size_t expected) {
  if (size == expected) return;
  throw py::value_error(std::string(name) + ": expected " + std::to_string(expected) +
                        " bytes, got " + std::to_string(size));
}

void check_whole_words(const char* name, const Bytes& bytes, std::size_t num_parts) {
  if (num_parts > 0 && bytes.size() % num_parts == 0 && bytes.size() / num_parts % 4 == 0) return;
  throw py::value_error(std::string(name) + ": expected a multiple of 4 bytes in each of " +
                        std::to_string(num_parts) + " parts, got " + std::to_string(bytes.size()) +
                        " bytes");
}

// Checks what both copies ask of their buffers.
void check_copy(const Bytes& source, const Bytes& target, std::size_t num_parts) {
  check_whole_words("source", source, num_parts);
  check_bytes("target", target.size(), source.size());
  const auto from = reinterpret_cast<std::uintptr_t>(source.data());
  const auto to = reinterpret_cast<std::uintptr_t>(target.data());
  if (from < to + target.size() && to < from + source.size()) {
    throw py::value_error("target: expected no overlap with source, got one");
  }
}

std::uint32_t crc32c(const py::object& data, std::uint32_t crc) {
  const Bytes bytes(data, "data", false);
  py::gil_scoped_release unlocked;
  return kvkernels::crc32c(bytes.data(), bytes.size(), crc);
}

py::tuple checksum_words(const py::object& data) {
  const Bytes bytes(data, "data", false);
  check_whole_words("data", bytes, 1);
  kvkernels::WordSums sums;
  {
    py::gil_scoped_release unlocked;
    sums = kvkernels::checksum_words(bytes.data(), bytes.size());
  }
  return py::make_tuple(sums.sum, sums.weighted);
}

py::tuple copy_with_checksum(const py::object& source, const py::object& target) {
  const Bytes from(source, "source", false), to(target, "target", true);
  check_copy(from, to, 1);
  kvkernels::WordSums sums;
  {
    py::gil_scoped_release unlocked;
    sums = kvkernels::copy_with_checksum(from.data(), to.data(), from.size());
  }
  return py::make_tuple(sums.sum, sums.weighted);
}

void copy_parts_with_checksums(const py::object& source, const py::object& target,
                               std::size_t num_parts, const py::object& sums) {
  const Bytes from(source, "source", false), to(target, "target", true), pairs(sums, "sums", true);
  check_copy(from, to, num_parts);
  check_bytes("sums", pairs.size(), num_parts * sizeof(kvkernels::WordSums));
  if (reinterpret_cast<std::uintptr_t>(pairs.data()) % alignof(kvkernels::WordSums) != 0) {
    throw py::value_error("sums: expected 8-byte alignment, got less");
  }
  py::gil_scoped_release unlocked;
  kvkernels::copy_parts_with_checksums(from.data(), to.data(), from.size() / num_parts, num_parts,
                                       reinterpret_cast<kvkernels::WordSums*>(pairs.data()));
}

}  // namespace

void bind_checksums(py::module_& module) {
  module.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0);
  module.def("checksum_words", &checksum_words, py::arg("data"));
  module.def("copy_with_checksum", &copy_with_checksum, py::arg("source"), py::arg("target"));
  module.def("copy_parts_with_checksums", &copy_parts_with_checksums, py::arg("source"),
             py::arg("target"), py::arg("num_parts"), py::arg("sums"));
}

}  // namespace kvkernels::bindings
