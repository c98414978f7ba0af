// One decoder layer: calls the kernels one after another, each on the results of the ones before.
#include "kvkernels/decoder_layer.h"

#include "cpu/thread_scratch.h"
#include "kvkernels/kv_cache.h"

namespace kvkernels {
namespace {

// The kernels, with the arguments that all of a layer's calls share.
struct Kernels {
  const DecoderLayer& layer;
  AttentionPath path;
  int num_threads;

  void normalize(const LayerNorm& norm, const void* input, void* out, int64_t num_rows,
                 int64_t size) const {
    rms_norm({input, norm.weight, out, num_rows, size, size, layer.dtype, norm.eps, norm.is_offset},
             path, num_threads);
  }

  void normalize_in_place(const LayerNorm& norm, void* states, int64_t num_rows,
                          int64_t size) const {
    if (norm.weight != nullptr) normalize(norm, states, states, num_rows, size);
  }

  void rotate_in_place(const LayerTokens& tokens, void* states, int64_t num_heads) const {
    const int64_t dim = layer.head_dim, row = num_heads * dim, all = tokens.num_tokens * row;
    rotary_embedding({states,
                      tokens.cos,
                      tokens.sin,
                      states,
                      1,
                      num_heads,
                      tokens.num_tokens,
                      dim,
                      {all, dim, row},
                      {all, dim, row},
                      {0, dim},
                      layer.dtype},
                     path, num_threads);
  }

  template <size_t kCount>
  void multiply(const void* input, int64_t in_features, int64_t num_rows,
                const LinearLayer (&layers)[kCount]) const {
    linear({input, layers, kCount, num_rows, in_features, in_features, layer.dtype}, path,
           num_threads);
  }

  void add_rows(const void* a, const void* b, void* out, int64_t num_rows) const {
    add({a, b, out, num_rows, layer.hidden_size, layer.dtype}, path, num_threads);
  }
};

LinearLayer into(void* out, LinearLayer layer) {
  layer.out = out;
  return layer;
}

StoreSide store_side(const DecoderLayer& layer, const void* source, void* cache,
                     const int64_t (&strides)[3]) {
  const int64_t item = item_bytes(layer.dtype), head = layer.head_dim * item;
  return {static_cast<const std::byte*>(source),
          static_cast<std::byte*>(cache),
          layer.num_kv_heads * head,
          head,
          strides[0] * item,
          strides[1] * item,
          strides[2] * item};
}

void store(const DecoderLayer& layer, const LayerTokens& tokens, const LayerCache& cache,
           int num_threads) {
  store_kv({store_side(layer, tokens.key, cache.key_cache, cache.key_strides),
            store_side(layer, tokens.value, cache.value_cache, cache.value_strides),
            cache.slot_mapping, cache.slot_mapping_stride, tokens.num_tokens, layer.num_kv_heads,
            cache.num_blocks, cache.block_size, layer.head_dim * item_bytes(layer.dtype)},
           num_threads);
}

PagedAttentionArgs attention_args(const DecoderLayer& layer, const LayerTokens& tokens,
                                  const LayerCache& cache) {
  PagedAttentionArgs args = {};
  args.query = tokens.query;
  args.key_cache = cache.key_cache;
  args.value_cache = cache.value_cache;
  args.block_table = cache.block_table;
  args.seq_lens = cache.seq_lens;
  args.cu_seqlens_q = cache.cu_seqlens_q;
  args.out = tokens.attended;
  args.num_tokens = tokens.num_tokens;
  args.num_heads = layer.num_heads;
  args.num_kv_heads = layer.num_kv_heads;
  args.head_dim = args.value_dim = layer.head_dim;
  args.num_seqs = cache.num_seqs;
  args.max_blocks_per_seq = cache.max_blocks_per_seq;
  args.num_blocks = cache.num_blocks;
  args.block_size = cache.block_size;
  args.query_token_stride = layer.num_heads * layer.head_dim;
  args.query_head_stride = layer.head_dim;
  args.key_block_stride = cache.key_strides[0];
  args.key_head_stride = cache.key_strides[1];
  args.key_slot_stride = cache.key_strides[2];
  args.value_block_stride = cache.value_strides[0];
  args.value_head_stride = cache.value_strides[1];
  args.value_slot_stride = cache.value_strides[2];
  args.table_stride = cache.table_stride;
  args.sm_scale = layer.sm_scale;
  args.soft_cap = layer.soft_cap;
  args.causal = true;
  args.window = cache.window;
  args.batch_invariant = true;
  args.dtype = args.cache_dtype = layer.dtype;
  return args;
}

}  // namespace

int64_t workspace_size(const DecoderLayer& layer) {
  return layer.hidden_size + 2 * layer.intermediate_size;
}

void project_heads(const DecoderLayer& layer, const LayerTokens& tokens, AttentionPath path,
                   int num_threads) {
  const Kernels kernels = {layer, path, num_threads};
  const int64_t num_tokens = tokens.num_tokens;
  kernels.normalize(layer.input_norm, tokens.hidden, tokens.workspace, num_tokens,
                    layer.hidden_size);
  kernels.multiply(tokens.workspace, layer.hidden_size, num_tokens,
                   {into(tokens.query, layer.query), into(tokens.key, layer.key),
                    into(tokens.value, layer.value)});
  kernels.normalize_in_place(layer.query_norm, tokens.query, num_tokens * layer.num_heads,
                             layer.head_dim);
  kernels.normalize_in_place(layer.key_norm, tokens.key, num_tokens * layer.num_kv_heads,
                             layer.head_dim);
  kernels.rotate_in_place(tokens, tokens.query, layer.num_heads);
  kernels.rotate_in_place(tokens, tokens.key, layer.num_kv_heads);
}

void attend_cache(const DecoderLayer& layer, const LayerTokens& tokens, const LayerCache& cache,
                  AttentionPath path, int num_threads) {
  store(layer, tokens, cache, num_threads);
  paged_attention(attention_args(layer, tokens, cache), path, num_threads);
}

void finish_layer(const DecoderLayer& layer, const LayerTokens& tokens, AttentionPath path,
                  int num_threads) {
  const Kernels kernels = {layer, path, num_threads};
  const int64_t num_tokens = tokens.num_tokens, hidden_size = layer.hidden_size;
  auto* x = static_cast<std::byte*>(tokens.workspace);
  std::byte* gate = x + num_tokens * hidden_size * item_bytes(layer.dtype);
  std::byte* up = gate + num_tokens * layer.intermediate_size * item_bytes(layer.dtype);

  kernels.multiply(tokens.attended, layer.num_heads * layer.head_dim, num_tokens,
                   {into(x, layer.out)});
  kernels.normalize_in_place(layer.attention_norm, x, num_tokens, hidden_size);
  kernels.add_rows(tokens.hidden, x, tokens.out, num_tokens);

  kernels.normalize(layer.gate_norm, tokens.out, x, num_tokens, hidden_size);
  kernels.multiply(x, hidden_size, num_tokens, {into(gate, layer.gate), into(up, layer.up)});
  gated_activation({gate, up, gate, num_tokens, layer.intermediate_size, layer.intermediate_size,
                    layer.intermediate_size, layer.dtype, layer.activation},
                   path, num_threads);
  kernels.multiply(gate, layer.intermediate_size, num_tokens, {into(x, layer.down)});
  kernels.normalize_in_place(layer.mlp_norm, x, num_tokens, hidden_size);
  kernels.add_rows(tokens.out, x, tokens.out, num_tokens);
}

void run_layer(const DecoderLayer& layer, const LayerTokens& tokens, const LayerCache& cache,
               AttentionPath path, int num_threads) {
  const int64_t query_size = layer.num_heads * layer.head_dim;
  const int64_t key_size = layer.num_kv_heads * layer.head_dim;
  const int64_t row_size = 2 * (query_size + key_size) + workspace_size(layer);
  const int64_t num_bytes = tokens.num_tokens * row_size * item_bytes(layer.dtype);
  auto* memory = reinterpret_cast<std::byte*>(thread_scratch(4, (num_bytes + 3) / 4));
  LayerTokens all = tokens;
  const auto place = [&](void*& field, int64_t size) {
    field = memory;
    memory += tokens.num_tokens * size * item_bytes(layer.dtype);
  };
  place(all.query, query_size);
  place(all.key, key_size);
  place(all.value, key_size);
  place(all.attended, query_size);
  place(all.workspace, workspace_size(layer));
  project_heads(layer, all, path, num_threads);
  attend_cache(layer, all, cache, path, num_threads);
  finish_layer(layer, all, path, num_threads);
}

}  // namespace kvkernels
