// The prefix index's part of the Python extension.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "kvkernels/radix_tree.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// The token ids of a call as uint32, and whatever keeps them alive. Numpy arrays and buffers of
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
    for (std::size_t i = 0; i < size_; ++i) {
      if (!read_small(items[i], copy_[i])) copy_[i] = read_item(items[i]);
    }
  }

  // Reads small ints directly, which is to say all tokens in practice: a list that lies in a near
  // cache is matched 2.3 times as fast as with Python's own conversion.
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

  // Numpy takes 0.5 us to wrap an array.array; this takes 0.05.
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

  // All items or-ed together. Several sums side by side are four times as fast as one: a range
  // check of a prompt costs less than comparing it.
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

  struct Buffer : Py_buffer {  // a member, so that it is released when the constructor throws
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
    // Numpy converts where the array is of another type or not contiguous.
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

// The tree behind a mutex. A call that takes microseconds keeps the GIL: giving it up can cost a
// thread switch of milliseconds to get it back. Nobody waits for the mutex with the GIL in hand,
// and no Python code runs under the mutex, so the two cannot deadlock.
class LockedTree {
 public:
  LockedTree(std::uint32_t block_size, std::uint32_t num_groups,
             std::vector<std::uint32_t> window_blocks)
      : tree_(block_size, num_groups, std::move(window_blocks)) {}

  // These never change, so they need no lock.
  std::uint32_t block_size() const { return tree_.block_size(); }
  std::uint32_t num_groups() const { return tree_.num_groups(); }
  std::uint64_t id() const { return id_; }

  template <class Call>
  auto with_gil(Call call) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      py::gil_scoped_release no_gil;
      lock.lock();
    }
    return call(tree_);
  }

  template <class Call>
  auto without_gil(Call call) {
    py::gil_scoped_release no_gil;
    std::lock_guard lock(mutex_);
    return call(tree_);
  }

 private:
  static std::uint64_t next_id() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
  }

  const std::uint64_t id_ = next_id();
  RadixTree tree_;
  std::mutex mutex_;
};

std::string_view view_salt(py::handle salt) {
  if (!PyBytes_Check(salt.ptr())) refuse("salt", "bytes", type_name(salt));
  return {PyBytes_AS_STRING(salt.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(salt.ptr()))};
}

py::array to_rows(const std::vector<std::int32_t>& ids, std::uint32_t num_groups) {
  const py::ssize_t num_rows = static_cast<py::ssize_t>(ids.size() / num_groups);
  py::array_t<std::int32_t> rows({num_rows, static_cast<py::ssize_t>(num_groups)});
  std::copy(ids.begin(), ids.end(), rows.mutable_data());
  return rows;
}

// A match as Python sees it. A bound class because a Python one costs half a microsecond to make.
struct RadixMatch {
  std::uint64_t tree_id;
  std::size_t num_tokens;
  RadixTree::Match match;
  std::uint32_t num_groups;
};

// A handle as one Python integer.
std::uint64_t pack(RadixTree::Handle handle) {
  return std::uint64_t{handle.generation} << 32 | handle.node;
}

RadixTree::Handle unpack(std::uint64_t packed) {
  return {static_cast<std::uint32_t>(packed), static_cast<std::uint32_t>(packed >> 32)};
}

// By RadixTree::match or RadixTree::peek.
template <auto find>
RadixMatch find_run(LockedTree& locked, py::handle tokens, py::handle salt) {
  const TokenView view(tokens);
  const std::string_view salt_view = view_salt(salt);
  RadixTree::Match match =
      locked.with_gil([&](RadixTree& tree) { return (tree.*find)(view.tokens(), salt_view); });
  return {locked.id(), match.num_blocks * locked.block_size(), std::move(match),
          locked.num_groups()};
}

RadixTree::Handle handle_of(const LockedTree& locked, py::handle object) {
  if (!py::isinstance<RadixMatch>(object)) refuse("match", "a Match", type_name(object));
  const RadixMatch& match = object.cast<const RadixMatch&>();
  if (match.tree_id != locked.id()) {
    refuse("match", "one made by this index", "one made by another");
  }
  return match.match.handle;
}

py::array insert(LockedTree& locked, py::handle tokens, py::handle block_ids, py::handle salt) {
  const TokenView view(tokens);
  const BlockIdView ids(block_ids, locked.num_groups());
  const std::string_view salt_view = view_salt(salt);
  return to_rows(locked.with_gil([&](RadixTree& tree) {
    return tree.insert(view.tokens(), ids.ids(), salt_view);
  }),
                 locked.num_groups());
}

py::array evict(LockedTree& locked, std::size_t num_blocks) {
  constexpr std::size_t kLong = 10000;  // about a millisecond
  const auto call = [&](RadixTree& tree) { return tree.evict(num_blocks); };
  return to_rows(num_blocks > kLong ? locked.without_gil(call) : locked.with_gil(call),
                 locked.num_groups());
}

py::array strip(LockedTree& locked, std::uint32_t group, std::size_t num_blocks) {
  return to_rows(locked.with_gil([&](RadixTree& tree) { return tree.strip(group, num_blocks); }),
                 1);
}

py::array detach(LockedTree& locked, py::handle tokens, std::size_t num_kept, py::handle salt) {
  const TokenView view(tokens);
  const std::string_view salt_view = view_salt(salt);
  return to_rows(locked.with_gil([&](RadixTree& tree) {
    return tree.detach(view.tokens(), num_kept, salt_view);
  }),
                 locked.num_groups());
}

// (salt, first_block, tokens, block_ids, tick, num_pins), or None for a stale handle
py::object describe(LockedTree& locked, std::uint64_t handle) {
  const auto run = locked.with_gil([&](RadixTree& tree) { return tree.describe(unpack(handle)); });
  if (!run) return py::none();
  return py::make_tuple(py::bytes(run->salt), run->first_block,
                        py::array_t<std::uint32_t>(run->tokens.size(), run->tokens.data()),
                        to_rows(run->block_ids, locked.num_groups()), run->tick, run->num_pins);
}

std::vector<std::uint64_t> list_runs(LockedTree& locked) {
  const auto handles = locked.without_gil([](RadixTree& tree) { return tree.runs(); });
  std::vector<std::uint64_t> packed;
  packed.reserve(handles.size());
  for (const RadixTree::Handle handle : handles) packed.push_back(pack(handle));
  return packed;
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::dict outline(LockedTree& locked) {
  const auto found = locked.without_gil([](RadixTree& tree) { return tree.outline(); });
  std::vector<std::uint64_t> handles;
  handles.reserve(found.handles.size());
  for (const RadixTree::Handle handle : found.handles) handles.push_back(pack(handle));
  py::list salts;
  for (const std::string& salt : found.salts) salts.append(py::bytes(salt));
  using py::literals::operator""_a;
  return py::dict("handles"_a = to_array(handles), "parents"_a = to_array(found.parents),
                  "salt_numbers"_a = to_array(found.salt_numbers),
                  "first_blocks"_a = to_array(found.first_blocks),
                  "num_blocks"_a = to_array(found.num_blocks),
                  "num_pins"_a = to_array(found.num_pins), "ticks"_a = to_array(found.ticks),
                  "salts"_a = salts, "clock"_a = found.clock);
}

py::dict count(LockedTree& locked) {
  const auto stats = locked.with_gil([](RadixTree& tree) { return tree.stats(); });
  using py::literals::operator""_a;
  return py::dict("num_blocks"_a = stats.num_blocks, "num_runs"_a = stats.num_runs,
                  "num_salts"_a = stats.num_salts, "num_pinned_runs"_a = stats.num_pinned_runs,
                  "num_matches"_a = stats.num_matches, "lookup_blocks"_a = stats.lookup_blocks,
                  "hit_blocks"_a = stats.hit_blocks, "inserted_blocks"_a = stats.inserted_blocks,
                  "evicted_blocks"_a = stats.evicted_blocks,
                  "stripped_blocks"_a = stats.stripped_blocks, "token_bytes"_a = stats.token_bytes,
                  "overhead_bytes"_a = stats.overhead_bytes);
}

}  // namespace

void bind_index(py::module_& module) {
  py::class_<RadixMatch>(module, "RadixMatch",
                         "A cached run of whole blocks at the front of a prompt.")
      .def_readonly("num_tokens", &RadixMatch::num_tokens,
                    "Tokens in the run, a multiple of the block size.")
      .def_property_readonly(
          "block_ids",
          [](const RadixMatch& self) { return to_rows(self.match.block_ids, self.num_groups); },
          "Ids as they were when matched, [num_blocks, num_groups], int32; -1: not resident. "
          "A new array each time.")
      .def_property_readonly(
          "node", [](const RadixMatch& self) { return pack(self.match.handle); },
          "Opaque: equal for matches of the same run. Good until its last block is evicted.")
      .def("__repr__", [](const RadixMatch& self) {
        return "Match(num_tokens=" + std::to_string(self.num_tokens) + ")";
      });
  py::class_<LockedTree>(module, "RadixTree")
      .def(py::init<std::uint32_t, std::uint32_t, std::vector<std::uint32_t>>(),
           py::arg("block_size"), py::arg("num_groups"), py::arg("window_blocks"))
      .def_property_readonly_static("NO_WINDOW", [](py::object) { return RadixTree::kNoWindow; })
      .def("match", &find_run<&RadixTree::match>)
      .def("peek", &find_run<&RadixTree::peek>)
      .def("insert", &insert)
      .def("detach", &detach)
      .def("evict", &evict)
      .def("strip", &strip)
      .def("pin",
           [](LockedTree& locked, py::handle match) {
             const auto handle = handle_of(locked, match);
             locked.with_gil([&](RadixTree& tree) { tree.pin(handle); });
           })
      .def("unpin",
           [](LockedTree& locked, py::handle match) {
             const auto handle = handle_of(locked, match);
             locked.with_gil([&](RadixTree& tree) { tree.unpin(handle); });
           })
      .def("num_blocks",
           [](LockedTree& locked) {
             return locked.with_gil([](RadixTree& tree) { return tree.num_blocks(); });
           })
      .def("stats", &count)
      .def("runs", &list_runs)
      .def("describe", &describe)
      .def("outline", &outline)
      .def("check", [](LockedTree& locked) {
        return locked.without_gil([](RadixTree& tree) { return tree.check(); });
      });
}

}  // namespace kvkernels::bindings
