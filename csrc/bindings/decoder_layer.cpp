// Python bindings of the decoder layer.
#include "kvkernels/decoder_layer.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings/bindings.h"
#include "bindings/tensors.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

// Addresses, sizes and strides come in arrays, in the order of the structures' fields.
using LayerSizes = std::array<int64_t, 5>;
using CacheSizes = std::array<int64_t, 6>;
using NormFields = std::tuple<uintptr_t, float, bool>;
// Addresses of weight and bias, out_features, the weight's stride.
using LinearFields = std::array<int64_t, 4>;
using TokenPointers = std::array<uintptr_t, 9>;

LayerNorm layer_norm(const NormFields& norm) {
  const auto [weight, eps, is_offset] = norm;
  return {pointer<const void>(weight), eps, is_offset};
}

LinearLayer linear_layer(const LinearFields& linear) {
  const auto [weight, bias, out_features, weight_stride] = linear;
  return {pointer<const void>(weight), pointer<const void>(bias), nullptr, out_features,
          weight_stride};
}

DecoderLayer make_layer(const LayerSizes& sizes, const std::array<NormFields, 6>& norms,
                        const std::array<LinearFields, 7>& linears, int activation,
                        const std::array<float, 2>& scales, int dtype) {
  DecoderLayer layer;
  layer.dtype = static_cast<DType>(dtype);
  layer.hidden_size = sizes[0];
  layer.num_heads = sizes[1];
  layer.num_kv_heads = sizes[2];
  layer.head_dim = sizes[3];
  layer.intermediate_size = sizes[4];
  layer.input_norm = layer_norm(norms[0]);
  layer.query_norm = layer_norm(norms[1]);
  layer.key_norm = layer_norm(norms[2]);
  layer.attention_norm = layer_norm(norms[3]);
  layer.gate_norm = layer_norm(norms[4]);
  layer.mlp_norm = layer_norm(norms[5]);
  layer.query = linear_layer(linears[0]);
  layer.key = linear_layer(linears[1]);
  layer.value = linear_layer(linears[2]);
  layer.out = linear_layer(linears[3]);
  layer.gate = linear_layer(linears[4]);
  layer.up = linear_layer(linears[5]);
  layer.down = linear_layer(linears[6]);
  layer.activation = static_cast<Activation>(activation);
  layer.sm_scale = scales[0];
  layer.soft_cap = scales[1];
  return layer;
}

LayerTokens layer_tokens(const TokenPointers& pointers, int64_t num_tokens) {
  return {pointer<const void>(pointers[0]), pointer<void>(pointers[1]),
          pointer<const void>(pointers[2]), pointer<const void>(pointers[3]),
          pointer<void>(pointers[4]),       pointer<void>(pointers[5]),
          pointer<void>(pointers[6]),       pointer<void>(pointers[7]),
          pointer<void>(pointers[8]),       num_tokens};
}

LayerCache layer_cache(const std::array<uintptr_t, 6>& pointers, const CacheSizes& sizes,
                       const std::array<int64_t, 3>& key_strides,
                       const std::array<int64_t, 3>& value_strides, int64_t window) {
  return {pointer<void>(pointers[0]),
          pointer<void>(pointers[1]),
          pointer<const int32_t>(pointers[2]),
          pointer<const int32_t>(pointers[3]),
          pointer<const int32_t>(pointers[4]),
          pointer<const int64_t>(pointers[5]),
          sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          {key_strides[0], key_strides[1], key_strides[2]},
          {value_strides[0], value_strides[1], value_strides[2]},
          window};
}

// A tensor of the layer's dtype, [1, num_tokens, size], contiguous.
TensorView view_states(py::handle tensor, const DecoderLayer& layer, int64_t num_tokens,
                       int64_t size) {
  const TensorView states = view(tensor);
  require(states.has(states.type, {1, num_tokens, size}) && states.is_contiguous_from(0));
  require(float_dtype(states) == layer.dtype);
  return states;
}

// Keys or values in the cache, whose sizes `cache` has already.
void view_cache(const TensorView& rows, const DecoderLayer& layer, const LayerCache& cache,
                void*& data, int64_t (&strides)[3]) {
  require(rows.has(rows.type,
                   {cache.num_blocks, layer.num_kv_heads, cache.block_size, layer.head_dim}));
  require(float_dtype(rows) == layer.dtype && rows.has_dense_rows());
  data = rows.data;
  for (int i = 0; i < 3; ++i) strides[i] = rows.strides[i];
}

LayerCache view_layer_cache(const DecoderLayer& layer, int64_t num_tokens, py::handle key_cache,
                            py::handle value_cache, py::handle block_table, py::handle seq_lens,
                            py::handle cu_seqlens_q, py::handle slot_mapping, int64_t window) {
  LayerCache cache = {};
  const TensorView keys = view(key_cache), table = view(block_table), lengths = view(seq_lens);
  const TensorView slots = view(slot_mapping);
  require(keys.dim == 4);
  cache.num_blocks = keys.shape[0];
  cache.block_size = keys.shape[2];
  view_cache(keys, layer, cache, cache.key_cache, cache.key_strides);
  view_cache(view(value_cache), layer, cache, cache.value_cache, cache.value_strides);
  require(lengths.has(kInt32Type, {kAnySize}) && lengths.has_dense_rows());
  cache.num_seqs = lengths.shape[0];
  require(table.has(kInt32Type, {cache.num_seqs, kAnySize}) && table.has_dense_rows());
  require(slots.has(kInt64Type, {num_tokens}));
  cache.cu_seqlens_q = view_row<int32_t>(cu_seqlens_q, kInt32Type, cache.num_seqs + 1);
  require(cache.cu_seqlens_q != nullptr || cache.num_seqs == num_tokens);
  cache.block_table = table.as<const int32_t>();
  cache.seq_lens = lengths.as<const int32_t>();
  cache.slot_mapping = slots.as<const int64_t>();
  cache.max_blocks_per_seq = table.shape[1];
  cache.table_stride = table.strides[0];
  cache.slot_mapping_stride = slots.strides[0];
  cache.window = window;
  return cache;
}

// What the layer gives, or None: the tensors are not as they are to be.
py::object run_tensors(const DecoderLayer& layer, py::handle hidden_states, py::handle cos,
                       py::handle sin, py::handle key_cache, py::handle value_cache,
                       py::handle block_table, py::handle seq_lens, py::handle cu_seqlens_q,
                       py::handle slot_mapping, int64_t window, int path, int num_threads) {
  return or_none([&] {
    const TensorView hidden = view(hidden_states);
    require(hidden.dim == 3);
    const int64_t num_tokens = hidden.shape[1];
    LayerTokens tokens = {};
    tokens.num_tokens = num_tokens;
    tokens.hidden = view_states(hidden_states, layer, num_tokens, layer.hidden_size).data;
    tokens.cos = view_states(cos, layer, num_tokens, layer.head_dim).data;
    tokens.sin = view_states(sin, layer, num_tokens, layer.head_dim).data;
    const LayerCache cache =
        view_layer_cache(layer, num_tokens, key_cache, value_cache, block_table, seq_lens,
                         cu_seqlens_q, slot_mapping, window);
    py::object out = new_empty(hidden_states, py::make_tuple(1, num_tokens, layer.hidden_size));
    tokens.out = view(out).data;
    const py::gil_scoped_release unlocked;
    run_layer(layer, tokens, cache, static_cast<AttentionPath>(path), num_threads);
    return out;
  });
}

}  // namespace

void bind_decoder_layer(py::module_& module) {
  py::class_<DecoderLayer>(module, "DecoderLayer")
      .def(py::init(&make_layer))
      .def_property_readonly("workspace_size", &workspace_size)
      .def("project_heads",
           [](const DecoderLayer& layer, const TokenPointers& tokens, int64_t num_tokens, int path,
              int num_threads) {
             const py::gil_scoped_release unlocked;
             project_heads(layer, layer_tokens(tokens, num_tokens),
                           static_cast<AttentionPath>(path), num_threads);
           })
      .def("finish_layer",
           [](const DecoderLayer& layer, const TokenPointers& tokens, int64_t num_tokens, int path,
              int num_threads) {
             const py::gil_scoped_release unlocked;
             finish_layer(layer, layer_tokens(tokens, num_tokens), static_cast<AttentionPath>(path),
                          num_threads);
           })
      .def("run_tensors", &run_tensors)
      // Two steps in one call, since a call from Python takes as long as many a kernel.
      .def(
          "attend_and_finish",
          [](const DecoderLayer& layer, const TokenPointers& pointers, int64_t num_tokens,
             const std::array<uintptr_t, 6>& cache_pointers, const CacheSizes& sizes,
             const std::array<int64_t, 3>& key_strides, const std::array<int64_t, 3>& value_strides,
             int64_t window, int path, int num_threads) {
            const LayerCache cache =
                layer_cache(cache_pointers, sizes, key_strides, value_strides, window);
            const LayerTokens tokens = layer_tokens(pointers, num_tokens);
            const py::gil_scoped_release unlocked;
            attend_cache(layer, tokens, cache, static_cast<AttentionPath>(path), num_threads);
            finish_layer(layer, tokens, static_cast<AttentionPath>(path), num_threads);
          });
}

}  // namespace kvkernels::bindings
