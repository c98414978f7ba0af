// Attention and its cache's writes on PyTorch's tensors themselves: one call that checks and does
// it all, for what models do thousands of times a second. Whatever is not as it should be, or is
// out of the ordinary, is left to the caller, who goes the long way and says what is wrong by name.
#include <algorithm>
#include <cmath>
#include <limits>

#include "bindings/bindings.h"
#include "bindings/tensors.h"
#include "kvkernels/kv_cache.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

// QuantizedCache of the package, a tuple of four; null until it is imported.
py::handle class_of_caches;

void set_class_of_caches(const py::type& type) { class_of_caches = type.inc_ref(); }

// A Python number that float32 holds, at least `least`.
float view_float(py::handle number, float least) {
  require(PyFloat_CheckExact(number.ptr()));
  const double value = PyFloat_AS_DOUBLE(number.ptr());
  require(value >= least && value <= std::numeric_limits<float>::max());
  return static_cast<float>(value);
}

bool view_bool(py::handle value) {
  require(PyBool_Check(value.ptr()));
  return value.ptr() == Py_True;
}

// 0 for None; what is wider than any sequence is cut.
int64_t view_window(py::handle window) {
  constexpr int64_t kWidest = int64_t{1} << 30;  // as the package's WIDEST_WINDOW
  if (window.is_none()) return 0;
  require(PyLong_CheckExact(window.ptr()));
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(window.ptr(), &overflow);
  require(overflow == 0 && value >= 1);
  return std::min(value, kWidest);
}

template <typename T>
CachePart<T> view_part(const TensorView& part) {
  // A head is dense. (A tensor without elements has no head.)
  require(part.is_contiguous_from(2));
  return {part.as<const T>(), part.strides[0], part.strides[1]};
}

// `cache`: None or the four tensors of a QuantizedCache. `args` has its sizes already.
QuantizedCache view_quantized(py::handle cache, const PagedAttentionArgs& args,
                              int64_t codes_per_byte) {
  QuantizedCache all = {};
  if (cache.is_none()) return all;
  require(py::type::handle_of(cache).is(class_of_caches) && PyTuple_GET_SIZE(cache.ptr()) == 4);
  TensorView parts[4];
  for (int i = 0; i < 4; ++i) parts[i] = view(PyTuple_GET_ITEM(cache.ptr(), i));
  const auto& [key_codes, key_scales, value_codes, value_scales] = parts;
  require(args.head_dim % codes_per_byte == 0 && args.value_dim % codes_per_byte == 0);
  require(key_codes.dim == 4 && key_scales.dim == 5 && value_scales.dim == 5);
  const int64_t num_blocks = key_codes.shape[0], heads = args.num_kv_heads, block = args.block_size;
  all.num_blocks = num_blocks;
  all.key_groups = key_scales.shape[2];
  all.value_groups = value_scales.shape[3];
  require(all.key_groups > 0 && block % all.key_groups == 0);
  require(all.value_groups > 0 && args.value_dim % all.value_groups == 0);
  require(key_codes.has(kUInt8Type, {num_blocks, heads, block, args.head_dim / codes_per_byte}));
  require(key_scales.has(kFloat16Type, {num_blocks, heads, all.key_groups, args.head_dim, 2}));
  require(value_codes.has(kUInt8Type, {num_blocks, heads, block, args.value_dim / codes_per_byte}));
  require(value_scales.has(kFloat16Type, {num_blocks, heads, block, all.value_groups, 2}));
  all.key_codes = view_part<uint8_t>(key_codes);
  all.key_scales = view_part<uint16_t>(key_scales);
  all.value_codes = view_part<uint8_t>(value_codes);
  all.value_scales = view_part<uint16_t>(value_scales);
  return all;
}

void view_caches(py::handle key_cache, py::handle value_cache, PagedAttentionArgs& args) {
  const TensorView keys = view(key_cache), values = view(value_cache);
  require(keys.dim == 4);
  require(values.has(keys.type, {keys.shape[0], keys.shape[1], keys.shape[2], kAnySize}));
  require(keys.has_dense_rows() && values.has_dense_rows());
  args.key_cache = keys.data;
  args.value_cache = values.data;
  args.num_blocks = keys.shape[0];
  args.num_kv_heads = keys.shape[1];
  args.block_size = keys.shape[2];
  args.head_dim = keys.shape[3];
  args.value_dim = values.shape[3];
  require(args.num_kv_heads > 0 && args.block_size > 0 && args.head_dim > 0 && args.value_dim > 0);
  args.key_block_stride = keys.strides[0];
  args.key_head_stride = keys.strides[1];
  args.key_slot_stride = keys.strides[2];
  args.value_block_stride = values.strides[0];
  args.value_head_stride = values.strides[1];
  args.value_slot_stride = values.strides[2];
  const std::optional<DType> dtype = dtype_of(keys.type);
  require(dtype.has_value());
  args.cache_dtype = *dtype;
}

void view_query(const TensorView& query, PagedAttentionArgs& args) {
  require(query.has(query.type, {kAnySize, kAnySize, args.head_dim}) && query.has_dense_rows());
  args.dtype = float_dtype(query);
  require(args.cache_dtype == args.dtype || args.cache_dtype == DType::kFloat8);
  args.query = query.data;
  args.num_tokens = query.shape[0];
  args.num_heads = query.shape[1];
  require(args.num_heads > 0 && args.num_heads % args.num_kv_heads == 0);
  args.query_token_stride = query.strides[0];
  args.query_head_stride = query.strides[1];
}

void view_sequences(py::handle block_table, py::handle seq_lens, py::handle cu_seqlens_q,
                    PagedAttentionArgs& args) {
  const TensorView lengths = view(seq_lens), table = view(block_table);
  require(lengths.has(kInt32Type, {kAnySize}) && lengths.has_dense_rows());
  args.num_seqs = lengths.shape[0];
  args.seq_lens = lengths.as<const int32_t>();
  require(table.has(kInt32Type, {args.num_seqs, kAnySize}) && table.has_dense_rows());
  args.block_table = table.as<const int32_t>();
  args.max_blocks_per_seq = table.shape[1];
  args.table_stride = table.strides[0];
  args.cu_seqlens_q = view_row<int32_t>(cu_seqlens_q, kInt32Type, args.num_seqs + 1);
  if (args.cu_seqlens_q == nullptr) {
    require(args.num_tokens == args.num_seqs);
  } else {
    require(args.num_seqs > 0 || args.num_tokens == 0);
  }
}

py::object new_lse(py::handle query, const PagedAttentionArgs& args) {
  return query.attr("new_empty")(py::make_tuple(args.num_tokens, args.num_heads),
                                 py::arg("dtype") = py::module_::import("torch").attr("float32"));
}

// Everything but `out` and `lse`.
PagedAttentionArgs view_call(const TensorView& query, py::handle key_cache, py::handle value_cache,
                             py::handle block_table, py::handle seq_lens, py::handle cu_seqlens_q,
                             py::handle sm_scale, py::handle causal, py::handle window,
                             py::handle soft_cap, py::handle sinks, py::handle alibi_slopes,
                             py::handle tree_mask, py::handle int8_cache, py::handle int4_cache,
                             py::handle batch_invariant) {
  using Float = std::numeric_limits<float>;
  PagedAttentionArgs args = {};
  view_caches(key_cache, value_cache, args);
  view_query(query, args);
  view_sequences(block_table, seq_lens, cu_seqlens_q, args);
  args.sinks = view_row<float>(sinks, kFloat32Type, args.num_heads);
  args.alibi_slopes = view_row<float>(alibi_slopes, kFloat32Type, args.num_heads);
  args.tree_mask = view_row<int32_t>(tree_mask, kInt32Type, args.num_tokens);
  args.causal = view_bool(causal);
  require(args.causal || args.tree_mask == nullptr);
  args.window = view_window(window);
  args.batch_invariant = view_bool(batch_invariant);
  args.sm_scale = sm_scale.is_none()
                      ? static_cast<float>(std::pow(static_cast<double>(args.head_dim), -0.5))
                      : view_float(sm_scale, Float::lowest());
  args.soft_cap = soft_cap.is_none() ? 0.0f : view_float(soft_cap, Float::min());
  args.int8 = view_quantized(int8_cache, args, 1);
  args.int4 = view_quantized(int4_cache, args, 2);
  return args;
}

// What kvkernels.paged_attention returns, or None: the long way.
py::object attend_tensors(py::handle query, py::handle key_cache, py::handle value_cache,
                          py::handle block_table, py::handle seq_lens, py::handle cu_seqlens_q,
                          py::handle sm_scale, py::handle causal, py::handle window,
                          py::handle soft_cap, py::handle sinks, py::handle alibi_slopes,
                          py::handle tree_mask, py::handle int8_cache, py::handle int4_cache,
                          py::handle return_lse, py::handle batch_invariant, int path,
                          int num_threads) {
  return past_dispatcher(query, [&](const TensorView& queries) -> py::object {
    PagedAttentionArgs args = view_call(
        queries, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, sm_scale, causal,
        window, soft_cap, sinks, alibi_slopes, tree_mask, int8_cache, int4_cache, batch_invariant);
    const bool wants_lse = view_bool(return_lse);
    py::object out =
        new_empty(query, py::make_tuple(args.num_tokens, args.num_heads, args.value_dim));
    args.out = view(out).data;
    py::object lse;
    if (wants_lse) {
      lse = new_lse(query, args);
      args.lse = view(lse).as<float>();
    }
    {
      const py::gil_scoped_release unlocked;
      kvkernels::paged_attention(args, static_cast<AttentionPath>(path), num_threads);
    }
    if (!wants_lse) return out;
    return py::make_tuple(out, lse);
  });
}

MergeAttentionArgs view_merge(const TensorView& a, py::handle lse_a, py::handle out_b,
                              py::handle lse_b) {
  const TensorView b = view(out_b), sums_a = view(lse_a), sums_b = view(lse_b);
  const DType dtype = float_dtype(a);
  require(a.dim == 3);
  const int64_t num_tokens = a.shape[0], num_heads = a.shape[1], head_dim = a.shape[2];
  require(b.has(a.type, {num_tokens, num_heads, head_dim}));
  require(sums_a.has(kFloat32Type, {num_tokens, num_heads}));
  require(sums_b.has(kFloat32Type, {num_tokens, num_heads}));
  for (const TensorView* tensor : {&a, &b, &sums_a, &sums_b}) {
    require(tensor->is_contiguous_from(0));
  }
  return {a.data,  b.data,  sums_a.as<const float>(), sums_b.as<const float>(),
          nullptr, nullptr, num_tokens * num_heads,   head_dim,
          dtype};
}

// What kvkernels.merge_attention returns, or None: the long way.
py::object merge_tensors(py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b,
                         int path, int num_threads) {
  return past_dispatcher(out_a, [&](const TensorView& a) -> py::object {
    MergeAttentionArgs args = view_merge(a, lse_a, out_b, lse_b);
    py::object out = new_empty(out_a, out_a.attr("shape"));
    py::object lse = new_empty(lse_a, lse_a.attr("shape"));
    args.out = view(out).data;
    args.lse = view(lse).as<float>();
    {
      const py::gil_scoped_release unlocked;
      kvkernels::merge_attention(args, static_cast<AttentionPath>(path), num_threads);
    }
    return py::make_tuple(out, lse);
  });
}

StoreSide view_side(const TensorView& source, const TensorView& cache, int64_t item) {
  return {source.as<const std::byte>(), cache.as<std::byte>(),   source.strides[0] * item,
          source.strides[1] * item,     cache.strides[0] * item, cache.strides[1] * item,
          cache.strides[2] * item};
}

StoreKVArgs view_store(const TensorView& keys, py::handle value, py::handle key_cache,
                       py::handle value_cache, py::handle slot_mapping) {
  const TensorView values = view(value), slots = view(slot_mapping);
  const TensorView to_keys = view(key_cache), to_values = view(value_cache);
  const DType dtype = float_dtype(keys);
  require(to_keys.has(keys.type, {kAnySize, kAnySize, kAnySize, kAnySize}));
  const int64_t *shape = to_keys.shape, num_tokens = keys.dim == 3 ? keys.shape[0] : kAnySize;
  require(shape[2] > 0 && shape[3] > 0);
  require(to_values.has(keys.type, {shape[0], shape[1], shape[2], shape[3]}));
  require(keys.has(keys.type, {num_tokens, shape[1], shape[3]}));
  require(values.has(keys.type, {num_tokens, shape[1], shape[3]}));
  require(slots.has(kInt64Type, {num_tokens}));
  for (const TensorView* rows : {&keys, &values, &to_keys, &to_values}) {
    require(rows->has_dense_rows());
  }
  const int64_t item = item_bytes(dtype);
  return {view_side(keys, to_keys, item),
          view_side(values, to_values, item),
          slots.as<const int64_t>(),
          slots.strides[0],
          num_tokens,
          shape[1],
          shape[0],
          shape[2],
          shape[3] * item};
}

// kvkernels.store_kv; returns True, or None: nothing was done, the long way.
py::object store_tensors(py::handle key, py::handle value, py::handle key_cache,
                         py::handle value_cache, py::handle slot_mapping, int num_threads) {
  return past_dispatcher(key, [&](const TensorView& keys) -> py::object {
    const StoreKVArgs args = view_store(keys, value, key_cache, value_cache, slot_mapping);
    {
      const py::gil_scoped_release unlocked;
      kvkernels::store_kv(args, num_threads);
    }
    return py::bool_(true);
  });
}

}  // namespace

void bind_calls_on_tensors(py::module_& module) {
  module.def("set_class_of_caches", &set_class_of_caches);
  module.def("attend_tensors", &attend_tensors);
  module.def("merge_tensors", &merge_tensors);
  module.def("store_tensors", &store_tensors);
}

}  // namespace kvkernels::bindings
