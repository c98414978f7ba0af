// Python bindings of the checksums.
#include <pybind11/numpy.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "bindings/bytes.h"
#include "kvkernels/checksum.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

std::uint32_t crc32c(const py::object& data, std::uint32_t crc) {
  const Bytes bytes(data);
  py::gil_scoped_release unlocked;
  return kvkernels::crc32c(bytes.data(), bytes.size(), crc);
}

py::array_t<std::uint32_t> crc32c_rows(const py::array& rows) {
  if (rows.ndim() != 2 || !rows.dtype().is(py::dtype::of<std::uint8_t>()) ||
      (rows.flags() & py::array::c_style) == 0) {
    throw py::value_error("rows: expected contiguous rows of uint8, got " +
                          py::str(rows.dtype()).cast<std::string>() + " " +
                          py::str(py::list(rows.attr("shape"))).cast<std::string>());
  }
  const auto num_rows = static_cast<std::size_t>(rows.shape(0));
  const auto num_bytes = static_cast<std::size_t>(rows.shape(1));
  py::array_t<std::uint32_t> sums(rows.shape(0));
  const auto* first = static_cast<const std::uint8_t*>(rows.data());
  std::uint32_t* out = sums.mutable_data();
  py::gil_scoped_release unlocked;
  for (std::size_t row = 0; row < num_rows; ++row) {
    out[row] = kvkernels::crc32c(first + row * num_bytes, num_bytes, 0);
  }
  return sums;
}

py::tuple checksum_words(const py::object& data) {
  const Bytes bytes(data);
  if (bytes.size() % 4 != 0) {
    throw py::value_error("data: expected a multiple of 4 bytes, got " +
                          std::to_string(bytes.size()));
  }
  kvkernels::WordSums sums;
  {
    py::gil_scoped_release unlocked;
    sums = kvkernels::checksum_words(bytes.data(), bytes.size());
  }
  return py::make_tuple(sums.sum, sums.weighted);
}

}  // namespace

void bind_checksums(py::module_& module) {
  module.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0);
  module.def("crc32c_rows", &crc32c_rows, py::arg("rows"));
  module.def("checksum_words", &checksum_words, py::arg("data"));
}

}  // namespace kvkernels::bindings
