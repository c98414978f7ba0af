// Attention over the block-table (paged) cache, and the merge of two attentions.
#pragma once

#include <cstdint>

namespace kvkernels {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8 = 3 };  // e4m3fn

// Bytes of one element. Static, as files compiled for different instruction sets include this.
static constexpr int64_t item_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8 ? 1 : 2;
}

// The set of kernels that runs. kAmxEmulated computes what kAmx does without its instructions, so
// that it can be tested on any processor with AVX512-BF16.
enum class AttentionPath : int {
  kPortable = 0,
  kAvx512 = 1,
  kAvx512Bf16 = 2,
  kAmx = 3,
  kAmxEmulated = 4,
  kAvx2 = 5
};

// Whether this processor has a path. A path that does not serve a dtype or head_dim leaves the call
// to the next in this order: AMX or AVX512-BF16, AVX-512, AVX2, portable.
bool has_attention_path(AttentionPath path);

// One of the four arrays of a quantised cache. Dense in all dimensions after block and head.
template <typename T>
struct CachePart {
  const T* data;
  int64_t block_stride, head_stride;  // in elements
};

// Blocks of 8- or 4-bit codes: an element is minimum + scale * code. Scales are pairs of float16:
// scale, then minimum. A row of 4-bit codes holds channel j in the low half of byte j, and channel
// j + dim / 2 in its high half.
struct QuantizedCache {
  CachePart<uint8_t> key_codes;      // [num_blocks, num_kv_heads, block_size, bytes of head_dim]
  CachePart<uint16_t> key_scales;    // [num_blocks, num_kv_heads, key_groups, head_dim, 2]
  CachePart<uint8_t> value_codes;    // [num_blocks, num_kv_heads, block_size, bytes of value_dim]
  CachePart<uint16_t> value_scales;  // [num_blocks, num_kv_heads, block_size, value_groups, 2]
  int64_t num_blocks;                // 0: there is no such cache
  int64_t key_groups;    // per block: groups of neighbouring tokens that share a channel's scale
  int64_t value_groups;  // per token and head: groups of neighbouring channels that share a scale
};

// An entry of the block table is the kind of cache, shifted left by kKindShift, plus the block id
// within the cache of that kind.
enum class BlockKind : int32_t { kFloat = 0, kInt8 = 1, kInt4 = 2 };
constexpr int kKindShift = 28;

constexpr int64_t kMaxTreeTokens = 16;

// Arguments of paged_attention. Strides are in elements; the last dimension of every tensor is
// dense. All memory is the caller's and is used only until the call returns.
struct PagedAttentionArgs {
  const void* query;            // [num_tokens, num_heads, head_dim]
  const void* key_cache;        // [num_blocks, num_kv_heads, block_size, head_dim]
  const void* value_cache;      // [num_blocks, num_kv_heads, block_size, value_dim]
  const int32_t* block_table;   // [num_seqs, max_blocks_per_seq]
  const int32_t* seq_lens;      // [num_seqs]: tokens in each, cached and new
  const int32_t* cu_seqlens_q;  // [num_seqs + 1], or null for one query a sequence
  void* out;                    // [num_tokens, num_heads, value_dim], contiguous
  float* lse;                   // [num_tokens, num_heads], contiguous, or null
  const float* sinks;           // [num_heads]: attention sinks, as logits; or null
  const float* alibi_slopes;    // [num_heads]: times distance, taken off the score; or null
  const int32_t* tree_mask;     // [num_tokens]: bit j: sees the sequence's j-th new token; or null
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, value_dim;
  int64_t num_seqs, max_blocks_per_seq, num_blocks, block_size;
  int64_t query_token_stride, query_head_stride;
  int64_t key_block_stride, key_head_stride, key_slot_stride;
  int64_t value_block_stride, value_head_stride, value_slot_stride;
  int64_t table_stride;
  float sm_scale;  // multiplies scores before the softmax
  float soft_cap;  // scores become soft_cap * tanh(score / soft_cap); 0: none
  bool causal;
  int64_t window;  // keys that a query sees up to its own position, its own included; 0: all
  bool batch_invariant = false;
  QuantizedCache int8, int4;
  DType dtype;        // of query and out
  DType cache_dtype;  // dtype, or kFloat8
};

// Writes out, and lse (natural logarithm) unless it is null. A row that sees no key, nor a sink,
// gives zeros and an lse of minus infinity; one with a score of infinity gives no numbers, and an
// lse of infinity.
//
// The result depends neither on num_threads nor on the other sequences of the call. With
// batch_invariant a query's result does not depend on the other queries of its sequence either, so
// prompts may be cut anywhere.
//
// Throws std::invalid_argument, before any work, if a value inside block_table, seq_lens or
// cu_seqlens_q is out of range or a tree has more than kMaxTreeTokens tokens. Shapes and strides
// are the caller's to check.
void paged_attention(const PagedAttentionArgs& args, AttentionPath path, int num_threads);

struct MergeAttentionArgs {
  const void *out_a, *out_b;   // [num_rows, head_dim], contiguous
  const float *lse_a, *lse_b;  // [num_rows]
  void* out;                   // [num_rows, head_dim], contiguous
  float* lse;                  // [num_rows]
  int64_t num_rows, head_dim;
  DType dtype;
};

// Merges the attentions of the same queries over two disjoint sets of keys. A row whose lse is
// minus infinity has no weight: its `out` is not read, so it may hold anything.
void merge_attention(const MergeAttentionArgs& args, AttentionPath path, int num_threads);

}  // namespace kvkernels
