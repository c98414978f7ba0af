// Python bindings of the attention and cache kernels.
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "kvkernels/attention.h"
#include "kvkernels/cpu_features.h"
#include "kvkernels/kv_cache.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

// Addresses, sizes and strides come in arrays, in the order of the structures' fields: a Python
// argument for each would double the time of a call.
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

// `fields` is what `_describe` of native.py returns; empty: there is no such cache.
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
                     bool causal, int64_t window, bool batch_invariant,
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
  args.batch_invariant = batch_invariant;
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

}  // namespace

void bind_kernels(py::module_& module) {
  module.def("store_kv", &store_kv);
  module.def("paged_attention", &paged_attention);
  module.def("merge_attention", &merge_attention);
  module.def("attention_paths", &attention_paths);
}

}  // namespace kvkernels::bindings
