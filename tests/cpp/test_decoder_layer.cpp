// Runs a decoder layer on memory that ends at a page nobody may touch, and compares it, bit by bit,
// with its kernels called one by one, none of which writes over what another has made.
#include "kvkernels/decoder_layer.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "guarded.h"
#include "kvkernels/kv_cache.h"

namespace {

using namespace kvkernels;

constexpr int kThreads = 3;
constexpr int64_t kHidden = 50, kHeads = 4, kKVHeads = 2, kDim = 22, kIntermediate = 70;
constexpr int64_t kBlockSize = 4, kNumBlocks = 5;

// All memory of a test, freed at its end.
class Memory {
 public:
  explicit Memory(DType dtype) : dtype_(dtype) {}

  void* zeros(int64_t count) {
    pieces_.push_back(std::make_unique<Guarded>(count * item_bytes(dtype_)));
    return pieces_.back()->as<void>();
  }

  void* filled(int64_t count) {
    void* data = zeros(count);
    const int64_t step = 3 + 2 * static_cast<int64_t>(pieces_.size());
    // Multiples of 1/16 below 1: every dtype holds them.
    for (int64_t i = 0; i < count; ++i) {
      put(data, dtype_, i, static_cast<float>(i * step % 31 - 15) / 16);
    }
    return data;
  }

 private:
  DType dtype_;
  std::vector<std::unique_ptr<Guarded>> pieces_;
};

LinearLayer linear_layer(Memory& memory, int64_t out_features, int64_t in_features, bool has_bias) {
  return {memory.filled(out_features * in_features),
          has_bias ? memory.filled(out_features) : nullptr, nullptr, out_features, in_features};
}

DecoderLayer make_layer(Memory& memory, DType dtype, bool has_all) {
  const auto norm = [&](int64_t size, bool is_there) {
    return LayerNorm{is_there ? memory.filled(size) : nullptr, 1e-5f, has_all};
  };
  DecoderLayer layer;
  layer.dtype = dtype;
  layer.hidden_size = kHidden;
  layer.num_heads = kHeads;
  layer.num_kv_heads = kKVHeads;
  layer.head_dim = kDim;
  layer.intermediate_size = kIntermediate;
  layer.input_norm = norm(kHidden, true);
  layer.query_norm = norm(kDim, has_all);
  layer.key_norm = norm(kDim, has_all);
  layer.attention_norm = norm(kHidden, has_all);
  layer.gate_norm = norm(kHidden, true);
  layer.mlp_norm = norm(kHidden, has_all);
  layer.query = linear_layer(memory, kHeads * kDim, kHidden, has_all);
  layer.key = linear_layer(memory, kKVHeads * kDim, kHidden, has_all);
  layer.value = linear_layer(memory, kKVHeads * kDim, kHidden, has_all);
  layer.out = linear_layer(memory, kHidden, kHeads * kDim, false);
  layer.gate = linear_layer(memory, kIntermediate, kHidden, false);
  layer.up = linear_layer(memory, kIntermediate, kHidden, false);
  layer.down = linear_layer(memory, kHidden, kIntermediate, has_all);
  layer.activation = has_all ? Activation::kGeluTanh : Activation::kSilu;
  layer.sm_scale = 0.25f;
  layer.soft_cap = has_all ? 20.0f : 0.0f;
  return layer;
}

// The same layer, every step of it into memory of its own.
class StepByStep {
 public:
  StepByStep(Memory& memory, const DecoderLayer& layer, const LayerTokens& tokens,
             AttentionPath path)
      : memory_(memory), layer_(layer), tokens_(tokens), n_(tokens.num_tokens), path_(path) {}

  const void* run(const LayerCache& cache) {
    const void* x = norm(layer_.input_norm, tokens_.hidden, n_, kHidden);
    const void* query = norm(layer_.query_norm, multiply(layer_.query, x), n_ * kHeads, kDim);
    const void* key = norm(layer_.key_norm, multiply(layer_.key, x), n_ * kKVHeads, kDim);
    query = rotate(query, kHeads);
    key = rotate(key, kKVHeads);
    const void* value = multiply(layer_.value, x);
    x = multiply(layer_.out, attend(query, key, value, cache), kHeads * kDim);
    const void* hidden = sum(tokens_.hidden, norm(layer_.attention_norm, x, n_, kHidden));
    x = norm(layer_.gate_norm, hidden, n_, kHidden);
    void* gated = memory_.zeros(n_ * kIntermediate);
    gated_activation({multiply(layer_.gate, x), multiply(layer_.up, x), gated, n_, kIntermediate,
                      kIntermediate, kIntermediate, layer_.dtype, layer_.activation},
                     path_, 1);
    x = multiply(layer_.down, gated, kIntermediate);
    return sum(hidden, norm(layer_.mlp_norm, x, n_, kHidden));
  }

 private:
  const void* norm(const LayerNorm& norm, const void* input, int64_t num_rows, int64_t size) {
    if (norm.weight == nullptr) return input;
    void* out = memory_.zeros(num_rows * size);
    rms_norm(
        {input, norm.weight, out, num_rows, size, size, layer_.dtype, norm.eps, norm.is_offset},
        path_, 1);
    return out;
  }

  const void* multiply(LinearLayer layer, const void* input, int64_t in_features = kHidden) {
    layer.out = memory_.zeros(n_ * layer.out_features);
    linear({input, &layer, 1, n_, in_features, in_features, layer_.dtype}, path_, 1);
    return layer.out;
  }

  const void* rotate(const void* states, int64_t num_heads) {
    const int64_t row = num_heads * kDim;
    void* out = memory_.zeros(n_ * row);
    rotary_embedding({states,
                      tokens_.cos,
                      tokens_.sin,
                      out,
                      1,
                      num_heads,
                      n_,
                      kDim,
                      {n_ * row, kDim, row},
                      {n_ * row, kDim, row},
                      {0, kDim},
                      layer_.dtype},
                     path_, 1);
    return out;
  }

  const void* sum(const void* a, const void* b) {
    void* out = memory_.zeros(n_ * kHidden);
    add({a, b, out, n_, kHidden, layer_.dtype}, path_, 1);
    return out;
  }

  const void* attend(const void* query, const void* key, const void* value,
                     const LayerCache& cache) {
    const int64_t item = item_bytes(layer_.dtype), head = kDim * item;
    const auto side = [&](const void* source, void* target) {
      return StoreSide{static_cast<const std::byte*>(source),
                       static_cast<std::byte*>(target),
                       kKVHeads * head,
                       head,
                       kKVHeads * kBlockSize * head,
                       kBlockSize * head,
                       head};
    };
    store_kv({side(key, cache.key_cache), side(value, cache.value_cache), cache.slot_mapping, 1, n_,
              kKVHeads, kNumBlocks, kBlockSize, head},
             1);
    PagedAttentionArgs args = {};
    args.query = query;
    args.key_cache = cache.key_cache;
    args.value_cache = cache.value_cache;
    args.block_table = cache.block_table;
    args.seq_lens = cache.seq_lens;
    args.cu_seqlens_q = cache.cu_seqlens_q;
    args.out = memory_.zeros(n_ * kHeads * kDim);
    args.num_tokens = n_;
    args.num_heads = kHeads;
    args.num_kv_heads = kKVHeads;
    args.head_dim = args.value_dim = kDim;
    args.num_seqs = 1;
    args.max_blocks_per_seq = args.table_stride = kNumBlocks;
    args.num_blocks = kNumBlocks;
    args.block_size = kBlockSize;
    args.query_token_stride = kHeads * kDim;
    args.query_head_stride = args.key_slot_stride = args.value_slot_stride = kDim;
    args.key_head_stride = args.value_head_stride = kBlockSize * kDim;
    args.key_block_stride = args.value_block_stride = kKVHeads * kBlockSize * kDim;
    args.sm_scale = layer_.sm_scale;
    args.soft_cap = layer_.soft_cap;
    args.causal = true;
    args.window = cache.window;
    args.batch_invariant = true;
    args.dtype = args.cache_dtype = layer_.dtype;
    paged_attention(args, path_, 1);
    return args.out;
  }

  Memory& memory_;
  const DecoderLayer& layer_;
  const LayerTokens& tokens_;
  const int64_t n_;
  const AttentionPath path_;
};

// A sequence of `num_tokens` new tokens after others, whose keys and values are in the cache.
void check_layer(int64_t num_tokens, DType dtype, AttentionPath path, bool has_all) {
  Memory memory(dtype);
  const DecoderLayer layer = make_layer(memory, dtype, has_all);
  LayerTokens tokens;
  tokens.hidden = memory.filled(num_tokens * kHidden);
  tokens.out = memory.zeros(num_tokens * kHidden);
  tokens.cos = memory.filled(num_tokens * kDim);
  tokens.sin = memory.filled(num_tokens * kDim);
  tokens.query = memory.zeros(num_tokens * kHeads * kDim);
  tokens.key = memory.zeros(num_tokens * kKVHeads * kDim);
  tokens.value = memory.zeros(num_tokens * kKVHeads * kDim);
  tokens.attended = memory.zeros(num_tokens * kHeads * kDim);
  tokens.workspace = memory.zeros(num_tokens * workspace_size(layer));
  tokens.num_tokens = num_tokens;

  const int64_t seq_len = kNumBlocks * kBlockSize - 1;
  const int32_t table[] = {3, 0, 4, 2, 1}, seq_lens[] = {static_cast<int32_t>(seq_len)};
  const int32_t bounds[] = {0, static_cast<int32_t>(num_tokens)};
  std::vector<int64_t> slots;
  for (int64_t i = seq_len - num_tokens; i < seq_len; ++i) {
    slots.push_back(table[i / kBlockSize] * kBlockSize + i % kBlockSize);
  }
  const int64_t block = kKVHeads * kBlockSize * kDim;
  LayerCache cache = {memory.filled(kNumBlocks * block),
                      memory.filled(kNumBlocks * block),
                      table,
                      seq_lens,
                      bounds,
                      slots.data(),
                      kNumBlocks,
                      kBlockSize,
                      1,
                      kNumBlocks,
                      kNumBlocks,
                      1,
                      {block, kBlockSize * kDim, kDim},
                      {block, kBlockSize * kDim, kDim},
                      has_all ? 7 : 0};
  const void* expected = StepByStep(memory, layer, tokens, path).run(cache);

  project_heads(layer, tokens, path, kThreads);
  attend_cache(layer, tokens, cache, path, kThreads);
  finish_layer(layer, tokens, path, kThreads);
  CHECK(std::memcmp(tokens.out, expected, num_tokens * kHidden * item_bytes(dtype)) == 0);
}

}  // namespace

int main() {
  const AttentionPath paths[] = {AttentionPath::kPortable, AttentionPath::kAvx2,
                                 AttentionPath::kAvx512, AttentionPath::kAvx512Bf16,
                                 AttentionPath::kAmx};
  for (const AttentionPath path : paths) {
    if (!has_attention_path(path)) continue;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const int64_t num_tokens : {1, 5}) {
        for (const bool has_all : {false, true}) check_layer(num_tokens, dtype, path, has_all);
      }
    }
  }
  return 0;
}
