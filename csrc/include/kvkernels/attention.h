// Attention over the block-table cache, and the union of two attentions.
#pragma once

#include <cstdint>

namespace kvkernels {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8 = 3 };  // e4m3fn

// Which code runs. kAmxEmulated computes what kAmx does without its instructions, to test it.
enum class AttentionPath : int {
  kPortable = 0,
  kAvx512 = 1,
  kAvx512Bf16 = 2,
  kAmx = 3,
  kAmxEmulated = 4,
  kAvx2 = 5
};

// Whether this processor has a path. One that does not serve a dtype or head_dim leaves the call to
// the next: AMX and AVX512-BF16 to AVX-512, that to AVX2, that to portable.
bool has_attention_path(AttentionPath path);

// One of the four arrays of a quantised cache. All but the first two of its dimensions are dense.
template <typename T>
struct CachePart {
  const T* data;
  int64_t block_stride, head_stride;  // in elements
};

// Blocks of 8- or 4-bit codes; an element is minimum + scale * code. Scales are float16 pairs of
// scale and minimum. Codes of 4 bits: channel j in the low half of byte j, channel j + dim / 2 in
// the high half.
struct QuantizedCache {
  CachePart<uint8_t> key_codes;      // [num_blocks, num_kv_heads, block_size, bytes of head_dim]
  CachePart<uint16_t> key_scales;    // [num_blocks, num_kv_heads, key_groups, head_dim, 2]
  CachePart<uint8_t> value_codes;    // [num_blocks, num_kv_heads, block_size, bytes of value_dim]
  CachePart<uint16_t> value_scales;  // [num_blocks, num_kv_heads, block_size, value_groups, 2]
  int64_t num_blocks;                // 0: there is no such cache
  int64_t key_groups;                // of neighbouring tokens, in a block
  int64_t value_groups;              // of neighbouring channels, in a head
};

// Entries of the block table hold a kind above the block id, which counts within that kind.
enum class BlockKind : int32_t { kFloat = 0, kInt8 = 1, kInt4 = 2 };
constexpr int kKindShift = 28;

constexpr int64_t kMaxTreeTokens = 16;

// Strides are in elements; the last dimension of every tensor is dense.
struct PagedAttentionArgs {
  const void* query;            // [num_tokens, num_heads, head_dim]
  const void* key_cache;        // [num_blocks, num_kv_heads, block_size, head_dim]
  const void* value_cache;      // [num_blocks, num_kv_heads, block_size, value_dim]
  const int32_t* block_table;   // [num_seqs, max_blocks_per_seq]
  const int32_t* seq_lens;      // [num_seqs]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1], or null for one query a sequence
  void* out;                    // [num_tokens, num_heads, value_dim], contiguous
  float* lse;                   // [num_tokens, num_heads], contiguous, or null
  const float* sinks;           // [num_heads]: logits, or null
  const float* alibi_slopes;    // [num_heads], or null
  const int32_t* tree_mask;     // [num_tokens], or null
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, value_dim;
  int64_t num_seqs, max_blocks_per_seq, num_blocks, block_size;
  int64_t query_token_stride, query_head_stride;
  int64_t key_block_stride, key_head_stride, key_slot_stride;
  int64_t value_block_stride, value_head_stride, value_slot_stride;
  int64_t table_stride;
  float sm_scale;
  float soft_cap;  // 0: none
  bool causal;
  int64_t window;  // 0: none
  bool batch_invariant = false;
  QuantizedCache int8, int4;
  DType dtype;        // of query and out
  DType cache_dtype;  // dtype, or kFloat8
};

// Fills out, and lse unless it is null. The result depends neither on num_threads nor on the other
// sequences of the call; with batch_invariant that of a query also not on the other queries of its
// sequence, so prompts may be cut anywhere. Throws std::invalid_argument, before any work, if a
// value inside an index tensor is out of range.
void paged_attention(const PagedAttentionArgs& args, AttentionPath path, int num_threads);

struct MergeAttentionArgs {
  const void *out_a, *out_b;   // [num_rows, head_dim], contiguous
  const float *lse_a, *lse_b;  // [num_rows]
  void* out;                   // [num_rows, head_dim], contiguous
  float* lse;                  // [num_rows]
  int64_t num_rows, head_dim;
  DType dtype;
};

// Merges the attention over two disjoint sets of keys. A row whose lse is minus infinity is not
// read as numbers.
void merge_attention(const MergeAttentionArgs& args, AttentionPath path, int num_threads);

}  // namespace kvkernels
