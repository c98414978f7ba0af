// The Python extension: turns addresses and sizes into calls of the C++ core. The only file that
// includes pybind11; no file includes PyTorch, so one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "kvkernels/attention.h"
#include "kvkernels/kv_cache.h"

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

void paged_attention(const std::array<uintptr_t, 8>& pointers, const std::array<int64_t, 8>& sizes,
                     const std::array<int64_t, 9>& strides, float sm_scale, bool causal,
                     int64_t window, int dtype, int path, int num_threads) {
  kvkernels::PagedAttentionArgs args;
  args.query = pointer<const void>(pointers[0]);
  args.key_cache = pointer<const void>(pointers[1]);
  args.value_cache = pointer<const void>(pointers[2]);
  args.block_table = pointer<const int32_t>(pointers[3]);
  args.seq_lens = pointer<const int32_t>(pointers[4]);
  args.cu_seqlens_q = pointer<const int32_t>(pointers[5]);
  args.out = pointer<void>(pointers[6]);
  args.lse = pointer<float>(pointers[7]);
  args.num_tokens = sizes[0];
  args.num_heads = sizes[1];
  args.num_kv_heads = sizes[2];
  args.head_dim = sizes[3];
  args.num_seqs = sizes[4];
  args.max_blocks_per_seq = sizes[5];
  args.num_blocks = sizes[6];
  args.block_size = sizes[7];
  args.query_token_stride = strides[0];
  args.query_head_stride = strides[1];
  args.key_block_stride = strides[2];
  args.key_head_stride = strides[3];
  args.key_slot_stride = strides[4];
  args.value_block_stride = strides[5];
  args.value_head_stride = strides[6];
  args.value_slot_stride = strides[7];
  args.table_stride = strides[8];
  args.sm_scale = sm_scale;
  args.causal = causal;
  args.window = window;
  args.dtype = static_cast<DType>(dtype);
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
  const std::pair<const char*, AttentionPath> all[] = {
      {"amx", AttentionPath::kAmx},
      {"avx512", AttentionPath::kAvx512},
      {"portable", AttentionPath::kPortable},
      {"amx_emulated", AttentionPath::kAmxEmulated},
  };
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
}

// ---- checksums and block copies ------------------------------------------------------------

void bind_checksums([[maybe_unused]] py::module_& module) {}

// ---- the prefix index ----------------------------------------------------------------------

void bind_index([[maybe_unused]] py::module_& module) {}

}  // namespace

PYBIND11_MODULE(_kvkernels, module) {
  module.doc() = "C++ core of kvkernels and prefixstore; use it through those packages.";
  bind_kernels(module);
  bind_checksums(module);
  bind_index(module);
}
