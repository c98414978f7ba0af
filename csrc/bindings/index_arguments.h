// Checks the arguments of the prefix index: token ids and block ids, read where they lie.
#pragma once

#include <pybind11/numpy.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "kvkernels/radix_tree.h"

namespace kvkernels::bindings {

namespace py = pybind11;

[[noreturn]] inline void refuse(const char* name, const std::string& expected,
                                const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

inline std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// The token ids of a call as uint32, with whatever keeps them alive. Numpy arrays and buffers of
// int32 or uint32 are read where they lie; all else is copied. Every token is checked.
class TokenView {
 public:
  explicit TokenView(py::handle object) {
    if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) {
      read_sequence(object);
    } else if (py::isinstance<py::array>(object)) {
      read_array(py::reinterpret_borrow<py::array>(object));
    } else if (!read_buffer(object)) {
      py::array array = py::array::ensure(object);  // __array__: torch tensors, range, ...
      if (!array) refuse("tokens", kExpected, type_name(object));
      read_array(array);
    }
  }
  TokenView(const TokenView&) = delete;
  TokenView& operator=(const TokenView&) = delete;

  RadixTree::Tokens tokens() const { return {data_, size_}; }

 private:
  static constexpr const char* kExpected = "a 1-d array of integers";

  void read_sequence(py::handle object) {
    PyObject** items = PySequence_Fast_ITEMS(object.ptr());
    allocate(static_cast<std::size_t>(PySequence_Fast_GET_SIZE(object.ptr())));
    std::size_t i = 0;
    while (i < size_ && read_small(items[i], copy_[i])) ++i;
    if (i < size_) read_items(object);
  }

  // Reading an item that is no small int may run Python's code, and that or another thread may
  // change a list meanwhile: its items are read from a tuple.
  void read_items(py::handle object) {
    const auto items = py::reinterpret_steal<py::tuple>(
        PyList_Check(object.ptr()) ? PyList_AsTuple(object.ptr()) : object.inc_ref().ptr());
    if (!items) throw py::error_already_set();
    allocate(items.size());
    for (std::size_t i = 0; i < size_; ++i) {
      PyObject* const item = PyTuple_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i));
      if (!read_small(item, copy_[i])) copy_[i] = read_item(item);
    }
  }

  // Reads a small int directly, and in practice all tokens are small: a list that lies in a near
  // cache is matched 2.3 times as fast as with Python's own conversion. False for any other object.
  static bool read_small(PyObject* item, std::uint32_t& value) {
    if (!PyLong_CheckExact(item)) return false;
    const auto* number = reinterpret_cast<const PyLongObject*>(item);
#if PY_VERSION_HEX >= 0x030c0000
    if (!PyUnstable_Long_IsCompact(number)) return false;
    const Py_ssize_t small = PyUnstable_Long_CompactValue(number);
    if (small < 0) return false;
    value = static_cast<std::uint32_t>(small);
#else
    const Py_ssize_t num_digits = Py_SIZE(number);  // of 30 or 15 bits; negative with the sign
    if (num_digits != 0 && num_digits != 1) return false;
    value = num_digits == 0 ? 0 : number->ob_digit[0];
#endif
    return true;
  }

  static std::uint32_t read_item(PyObject* item) {
    int overflow = 0;
    long long value = 0;
    if (PyLong_CheckExact(item)) {
      value = PyLong_AsLongLongAndOverflow(item, &overflow);
    } else {  // numpy integers have __index__; floats have not, and True is not a token
      const py::object index =
          py::reinterpret_steal<py::object>(PyBool_Check(item) ? nullptr : PyNumber_Index(item));
      PyErr_Clear();
      if (!index) refuse("tokens", "integers", type_name(item));
      value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    }
    if (overflow != 0 || value < 0 || value > 0xffffffffll) refuse_value(py::str(item));
    return static_cast<std::uint32_t>(value);
  }

  [[noreturn]] static void refuse_value(const std::string& value) {
    refuse("tokens", "values from 0 to 4294967295", value);
  }

  void read_array(py::array array) {
    if (array.ndim() != 1)
      refuse("tokens", kExpected, std::to_string(array.ndim()) + " dimensions");
    const py::dtype dtype = array.dtype();
    const char kind = dtype.kind();
    if ((kind != 'i' && kind != 'u') || dtype.byteorder() == '>') {
      refuse("tokens", kExpected, "dtype " + std::string(py::str(dtype)));
    }
    read(static_cast<const char*>(array.data()), static_cast<std::size_t>(array.size()),
         array.strides(0), array.itemsize(), kind == 'i');
    if (data_ != copy_.get()) owner_ = std::move(array);
  }

  // For buffers such as array.array, which numpy takes 0.5 us to wrap, and this 0.05. False if the
  // object has no buffer.
  bool read_buffer(py::handle object) {
    if (!PyObject_CheckBuffer(object.ptr())) return false;
    if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
      PyErr_Clear();
      return false;
    }
    const std::string format = buffer_.format == nullptr ? "B" : buffer_.format;
    const bool is_signed =
        format == "b" || format == "h" || format == "i" || format == "l" || format == "q";
    const bool is_unsigned =
        format == "B" || format == "H" || format == "I" || format == "L" || format == "Q";
    if (buffer_.ndim != 1 || !(is_signed || is_unsigned)) {
      refuse("tokens", kExpected,
             std::to_string(buffer_.ndim) + " dimensions of format '" + format + "'");
    }
    read(static_cast<const char*>(buffer_.buf), static_cast<std::size_t>(buffer_.shape[0]),
         buffer_.strides[0], buffer_.itemsize, is_signed);
    return true;
  }

  void read(const char* data, std::size_t size, std::ptrdiff_t stride, std::ptrdiff_t item_bytes,
            bool is_signed) {
    size_ = size;
    switch (item_bytes) {
      case 1:
        return is_signed ? copy<std::int8_t>(data, stride) : copy<std::uint8_t>(data, stride);
      case 2:
        return is_signed ? copy<std::int16_t>(data, stride) : copy<std::uint16_t>(data, stride);
      case 4:
        return is_signed ? borrow<std::int32_t>(data, stride) : borrow<std::uint32_t>(data, stride);
      default:
        return is_signed ? copy<std::int64_t>(data, stride) : copy<std::uint64_t>(data, stride);
    }
  }

  template <class T>
  void borrow(const char* data, std::ptrdiff_t stride) {
    const bool is_aligned = reinterpret_cast<std::uintptr_t>(data) % alignof(T) == 0;
    if (!is_aligned || (size_ > 1 && stride != sizeof(T))) return copy<T>(data, stride);
    data_ = reinterpret_cast<const std::uint32_t*>(data);
    if constexpr (std::is_signed_v<T>) {
      const auto bits = or_all([&](std::size_t i) { return data_[i]; });
      if (bits >> 31 != 0) refuse_first_bad<T>(data, stride);
    }
  }

  template <class T>
  void copy(const char* data, std::ptrdiff_t stride) {
    allocate(size_);
    const auto read_with = [&](std::ptrdiff_t step) {
      return or_all([&](std::size_t i) {
        T value;
        std::memcpy(&value, data + static_cast<std::ptrdiff_t>(i) * step, sizeof value);
        copy_[i] = static_cast<std::uint32_t>(value);
        return static_cast<std::uint64_t>(static_cast<std::int64_t>(value));
      });
    };
    constexpr std::ptrdiff_t kDense = sizeof(T);  // known to the compiler, so that it vectorises
    const std::uint64_t bits = stride == kDense ? read_with(kDense) : read_with(stride);
    if (bits >> 32 != 0) refuse_first_bad<T>(data, stride);
  }

  // The bitwise or of all items, for a range check. Several accumulators are four times as fast as
  // one: checking a prompt then costs less than comparing it.
  template <class Item>
  auto or_all(Item item) const {
    constexpr std::size_t kLanes = 16;
    decltype(item(0)) lanes[kLanes] = {};
    std::size_t i = 0;
    for (; i + kLanes <= size_; i += kLanes) {
      for (std::size_t j = 0; j < kLanes; ++j) lanes[j] |= item(i + j);
    }
    for (; i < size_; ++i) lanes[0] |= item(i);
    for (std::size_t j = 1; j < kLanes; ++j) lanes[0] |= lanes[j];
    return lanes[0];
  }

  void allocate(std::size_t size) {
    copy_ = std::make_unique_for_overwrite<std::uint32_t[]>(size_ = size);
    data_ = copy_.get();
  }

  template <class T>
  [[noreturn]] void refuse_first_bad(const char* data, std::ptrdiff_t stride) const {
    T value;
    do {
      std::memcpy(&value, data, sizeof value);
      data += stride;
    } while (static_cast<std::uint64_t>(static_cast<std::int64_t>(value)) >> 32 == 0);
    refuse_value(std::to_string(value));
  }

  struct Buffer
      : Py_buffer {  // a member of its own, so that it is released if the constructor throws
    Buffer() : Py_buffer{} {}
    ~Buffer() { PyBuffer_Release(this); }  // does nothing unless it was filled
  };

  const std::uint32_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::unique_ptr<std::uint32_t[]> copy_;
  py::object owner_;
  Buffer buffer_;
};

// Block ids [num_blocks, num_groups] of a call as int32, with what keeps them alive.
class BlockIdView {
 public:
  BlockIdView(py::handle object, std::uint32_t num_groups) {
    py::array array = py::array::ensure(object);
    if (!array) refuse("block_ids", "an int32 array", type_name(object));
    if (array.ndim() != 2 || array.shape(1) != num_groups) {
      const py::tuple shape = array.attr("shape");
      refuse("block_ids", "shape [num_blocks, " + std::to_string(num_groups) + "]",
             py::str(py::list(shape)));
    }
    const py::dtype dtype = array.dtype();
    if (dtype.kind() != 'i' && (dtype.kind() != 'u' || dtype.itemsize() == 8)) {
      refuse("block_ids", "dtype int32", "dtype " + std::string(py::str(dtype)));
    }
    // Numpy converts arrays of other types, or not contiguous ones.
    const auto wide = dtype.itemsize() > 4 || dtype.kind() == 'u';
    if (wide) check_range(py::array_t<std::int64_t, kPlain>::ensure(array));
    array_ = py::array_t<std::int32_t, kPlain>::ensure(array);
    check_range(array_);
  }

  std::span<const std::int32_t> ids() const {
    return {array_.data(), static_cast<std::size_t>(array_.size())};
  }

 private:
  static constexpr int kPlain = py::array::c_style | py::array::forcecast;

  template <class T>
  static void check_range(const py::array_t<T, kPlain>& ids) {
    for (const T* id = ids.data(); id != ids.data() + ids.size(); ++id) {
      if (*id < -1 || *id > 0x7fffffff) {
        refuse("block_ids", "-1 to 2147483647", std::to_string(*id));
      }
    }
  }

  py::array_t<std::int32_t, kPlain> array_;
};

}  // namespace kvkernels::bindings
