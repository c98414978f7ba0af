// Python bindings of the prefix index.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/index_arguments.h"
#include "kvkernels/radix_tree.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

// The tree behind a mutex. A call that takes microseconds keeps the GIL: after giving it up,
// getting it back can cost a thread switch of milliseconds. Nobody waits for the mutex while
// holding the GIL, and no Python code runs under the mutex, so the two cannot deadlock.
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

// A match as Python sees it. A class bound here, because an instance of a Python class costs half a
// microsecond to make.
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

// Calls RadixTree::match or RadixTree::peek.
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

// Returns (salt, first_block, tokens, block_ids, tick, num_pins), or None for a stale handle.
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
      .def("num_evictable",
           [](LockedTree& locked) {
             return locked.with_gil([](RadixTree& tree) { return tree.num_evictable(); });
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
