// The Python extension: turns addresses and sizes into calls of the C++ core. The only file that
// includes pybind11; no file includes PyTorch, so one build serves every version of it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
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

#include "kvkernels/attention.h"
#include "kvkernels/checksum.h"
#include "kvkernels/cpu_features.h"
#include "kvkernels/kv_cache.h"
#include "kvkernels/memory.h"
#include "kvkernels/radix_tree.h"

namespace py = pybind11;

namespace {

// ---- attention and cache kernels -----------------------------------------------------------

using kvkernels::AttentionPath;
using kvkernels::DType;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Addresses, sizes and strides come in groups, in the order in which the structures hold them: one
// Python argument each would double the time of a call.
void store_kv(const std::array<uintptr_t, 5>& pointers, const std::array<int64_t, 5>& sizes,
              const std::array<int64_t, 5>& key_strides,
              const std::array<int64_t, 5>& value_strides, int64_t slot_mapping_stride,
              int num_threads) {
  const auto side = [](uintptr_t source, uintptr_t cache, const std::array<int64_t, 5>& strides) {
    return kvkernels::StoreSide{pointer<const std::byte>(source),
                                pointer<std::byte>(cache),
                                strides[0],
                                strides[1],
                                strides[2],
                                strides[3],
                                strides[4]};
  };
  const auto [num_tokens, num_kv_heads, num_blocks, block_size, head_bytes] = sizes;
  const kvkernels::StoreKVArgs args = {side(pointers[0], pointers[2], key_strides),
                                       side(pointers[1], pointers[3], value_strides),
                                       pointer<const int64_t>(pointers[4]),
                                       slot_mapping_stride,
                                       num_tokens,
                                       num_kv_heads,
                                       num_blocks,
                                       block_size,
                                       head_bytes};
  const py::gil_scoped_release unlocked;
  kvkernels::store_kv(args, num_threads);
}

// What `_describe` of native.py gives; an absent cache has no entries.
kvkernels::QuantizedCache quantized_cache(const std::vector<int64_t>& fields) {
  kvkernels::QuantizedCache cache = {};
  if (fields.empty()) return cache;
  cache.key_codes = {pointer<const uint8_t>(fields.at(0)), fields.at(7), fields.at(8)};
  cache.key_scales = {pointer<const uint16_t>(fields.at(1)), fields.at(9), fields.at(10)};
  cache.value_codes = {pointer<const uint8_t>(fields.at(2)), fields.at(11), fields.at(12)};
  cache.value_scales = {pointer<const uint16_t>(fields.at(3)), fields.at(13), fields.at(14)};
  cache.num_blocks = fields.at(4);
  cache.key_groups = fields.at(5);
  cache.value_groups = fields.at(6);
  return cache;
}

void paged_attention(const std::array<uintptr_t, 11>& pointers, const std::array<int64_t, 9>& sizes,
                     const std::array<int64_t, 9>& strides, const std::array<float, 2>& scales,
                     bool causal, int64_t window,
                     const std::array<std::vector<int64_t>, 2>& quantized, int dtype,
                     int cache_dtype, int path, int num_threads) {
  kvkernels::PagedAttentionArgs args;
  args.query = pointer<const void>(pointers[0]);
  args.key_cache = pointer<const void>(pointers[1]);
  args.value_cache = pointer<const void>(pointers[2]);
  args.block_table = pointer<const int32_t>(pointers[3]);
  args.seq_lens = pointer<const int32_t>(pointers[4]);
  args.cu_seqlens_q = pointer<const int32_t>(pointers[5]);
  args.out = pointer<void>(pointers[6]);
  args.lse = pointer<float>(pointers[7]);
  args.sinks = pointer<const float>(pointers[8]);
  args.alibi_slopes = pointer<const float>(pointers[9]);
  args.tree_mask = pointer<const int32_t>(pointers[10]);
  args.num_tokens = sizes[0];
  args.num_heads = sizes[1];
  args.num_kv_heads = sizes[2];
  args.head_dim = sizes[3];
  args.value_dim = sizes[4];
  args.num_seqs = sizes[5];
  args.max_blocks_per_seq = sizes[6];
  args.num_blocks = sizes[7];
  args.block_size = sizes[8];
  args.query_token_stride = strides[0];
  args.query_head_stride = strides[1];
  args.key_block_stride = strides[2];
  args.key_head_stride = strides[3];
  args.key_slot_stride = strides[4];
  args.value_block_stride = strides[5];
  args.value_head_stride = strides[6];
  args.value_slot_stride = strides[7];
  args.table_stride = strides[8];
  args.sm_scale = scales[0];
  args.soft_cap = scales[1];
  args.causal = causal;
  args.window = window;
  args.int8 = quantized_cache(quantized[0]);
  args.int4 = quantized_cache(quantized[1]);
  args.dtype = static_cast<DType>(dtype);
  args.cache_dtype = static_cast<DType>(cache_dtype);
  const py::gil_scoped_release unlocked;
  kvkernels::paged_attention(args, static_cast<AttentionPath>(path), num_threads);
}

void merge_attention(const std::array<uintptr_t, 6>& pointers, int64_t num_rows, int64_t head_dim,
                     int dtype, int path, int num_threads) {
  const kvkernels::MergeAttentionArgs args = {pointer<const void>(pointers[0]),
                                              pointer<const void>(pointers[2]),
                                              pointer<const float>(pointers[1]),
                                              pointer<const float>(pointers[3]),
                                              pointer<void>(pointers[4]),
                                              pointer<float>(pointers[5]),
                                              num_rows,
                                              head_dim,
                                              static_cast<DType>(dtype)};
  const py::gil_scoped_release unlocked;
  kvkernels::merge_attention(args, static_cast<AttentionPath>(path), num_threads);
}

// The paths this processor has, by name, the best one first.
std::vector<std::pair<std::string, int>> attention_paths() {
  std::pair<const char*, AttentionPath> all[] = {
      {"amx", AttentionPath::kAmx},           {"avx512_bf16", AttentionPath::kAvx512Bf16},
      {"avx512", AttentionPath::kAvx512},     {"avx2", AttentionPath::kAvx2},
      {"portable", AttentionPath::kPortable}, {"amx_emulated", AttentionPath::kAmxEmulated},
  };
  if (!kvkernels::has_fast_bf16_products()) std::swap(all[1], all[2]);
  std::vector<std::pair<std::string, int>> paths;
  for (const auto& [name, path] : all) {
    if (kvkernels::has_attention_path(path)) paths.emplace_back(name, static_cast<int>(path));
  }
  return paths;
}

void bind_kernels(py::module_& module) {
  module.def("store_kv", &store_kv);
  module.def("paged_attention", &paged_attention);
  module.def("merge_attention", &merge_attention);
  module.def("attention_paths", &attention_paths);
  module.def("advise_huge_pages", [](uintptr_t data, int64_t num_bytes) {
    kvkernels::advise_huge_pages(pointer<void>(data), num_bytes);
  });
}

// ---- checksums and block copies ------------------------------------------------------------

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

void bind_checksums(py::module_& module) {
  module.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0);
  module.def("checksum_words", &checksum_words, py::arg("data"));
  module.def("copy_with_checksum", &copy_with_checksum, py::arg("source"), py::arg("target"));
  module.def("copy_parts_with_checksums", &copy_parts_with_checksums, py::arg("source"),
             py::arg("target"), py::arg("num_parts"), py::arg("sums"));
}

// ---- the prefix index ----------------------------------------------------------------------

using kvkernels::RadixTree;

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
  LockedTree(std::uint32_t block_size, std::uint32_t num_groups) : tree_(block_size, num_groups) {}

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

RadixMatch match(LockedTree& locked, py::handle tokens, py::handle salt) {
  const TokenView view(tokens);
  const std::string_view salt_view = view_salt(salt);
  RadixTree::Match match =
      locked.with_gil([&](RadixTree& tree) { return tree.match(view.tokens(), salt_view); });
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

py::dict count(LockedTree& locked) {
  const auto stats = locked.with_gil([](RadixTree& tree) { return tree.stats(); });
  using py::literals::operator""_a;
  return py::dict("num_blocks"_a = stats.num_blocks, "num_runs"_a = stats.num_runs,
                  "num_salts"_a = stats.num_salts, "num_pinned_runs"_a = stats.num_pinned_runs,
                  "num_matches"_a = stats.num_matches, "lookup_blocks"_a = stats.lookup_blocks,
                  "hit_blocks"_a = stats.hit_blocks, "inserted_blocks"_a = stats.inserted_blocks,
                  "evicted_blocks"_a = stats.evicted_blocks, "token_bytes"_a = stats.token_bytes,
                  "overhead_bytes"_a = stats.overhead_bytes);
}

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
      .def(py::init<std::uint32_t, std::uint32_t>(), py::arg("block_size"), py::arg("num_groups"))
      .def("match", &match)
      .def("insert", &insert)
      .def("evict", &evict)
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
      .def("check", [](LockedTree& locked) {
        return locked.without_gil([](RadixTree& tree) { return tree.check(); });
      });
}

}  // namespace

PYBIND11_MODULE(_kvkernels, module) {
  module.doc() = "C++ core of kvkernels and prefixstore; use it through those packages.";
  bind_kernels(module);
  bind_checksums(module);
  bind_index(module);
}
