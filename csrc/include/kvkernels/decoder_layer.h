// One decoder layer of a transformer over some tokens: all of its kernels, one after another.
//
//   x = input_norm(hidden)
//   query, key, value = rotate(query_norm(query(x))), rotate(key_norm(key(x))), value(x)
//   x = hidden + attention_norm(out(attention(query, key, value)))
//   x + mlp_norm(down(activation(gate(gate_norm(x))) * up(gate_norm(x))))
//
// The bits are those of the kernels called one by one: every step is rounded to the dtype, and a
// token's result does not depend on what other tokens there are.
#pragma once

#include "kvkernels/attention.h"
#include "kvkernels/linear.h"
#include "kvkernels/pointwise.h"

namespace kvkernels {

// A norm of the layer; fields as in RmsNormArgs.
struct LayerNorm {
  const void* weight;  // null: the model has no such norm; input_norm and gate_norm must be there
  float eps;
  bool is_offset;
};

struct DecoderLayer {
  DType dtype;  // of all tensors; not kFloat8
  int64_t hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size;
  LayerNorm input_norm, query_norm, key_norm, attention_norm, gate_norm, mlp_norm;
  LinearLayer query, key, value, out, gate, up, down;  // `out` of each is ignored
  Activation activation;
  float sm_scale;
  float soft_cap;  // of scores, as in PagedAttentionArgs; 0: none
};

// The tokens of one call. All tensors are contiguous and the caller's.
struct LayerTokens {
  const void* hidden;                    // [num_tokens, hidden_size]
  void* out;                             // [num_tokens, hidden_size]
  const void *cos, *sin;                 // [num_tokens, head_dim]
  void *query, *key, *value, *attended;  // [num_tokens, num_heads or num_kv_heads, head_dim]
  void* workspace;                       // num_tokens * workspace_size(layer) elements
  int64_t num_tokens;
};

// Elements of workspace per token.
int64_t workspace_size(const DecoderLayer& layer);

// The layer up to its attention: writes query, key and value, normalised and rotated.
void project_heads(const DecoderLayer& layer, const LayerTokens& tokens, AttentionPath path,
                   int num_threads);

// The cache of the layer, and which of its tokens each new one sees: see StoreKVArgs and
// PagedAttentionArgs. Strides are in elements.
struct LayerCache {
  void *key_cache, *value_cache;
  const int32_t *block_table, *seq_lens, *cu_seqlens_q;
  const int64_t* slot_mapping;
  int64_t num_blocks, block_size, num_seqs, max_blocks_per_seq, table_stride, slot_mapping_stride;
  int64_t key_strides[3], value_strides[3];  // of block, head and slot
  int64_t window;                            // as in PagedAttentionArgs; 0: all
};

// Stores key and value in the cache, then attends causally: writes `attended`. Batch invariant.
// Throws std::invalid_argument as store_kv and paged_attention do; if paged_attention does, the
// cache has been written.
void attend_cache(const DecoderLayer& layer, const LayerTokens& tokens, const LayerCache& cache,
                  AttentionPath path, int num_threads);

// The layer after its attention: writes out.
void finish_layer(const DecoderLayer& layer, const LayerTokens& tokens, AttentionPath path,
                  int num_threads);

// All three, one after another, for few tokens: what lies between `hidden` and `out` is kept in
// memory of the calling thread, so `tokens` need not name any.
void run_layer(const DecoderLayer& layer, const LayerTokens& tokens, const LayerCache& cache,
               AttentionPath path, int num_threads);

}  // namespace kvkernels
