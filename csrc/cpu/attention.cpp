// Paged attention: checks the indices, plans the work, shares it among threads, merges the parts.
#include "kvkernels/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "cpu/attention_kernel.h"
#include "cpu/attention_plan.h"
#include "cpu/attention_tiles.h"
#include "cpu/float_bits.h"
#include "kvkernels/cpu_features.h"
#include "kvkernels/parallel.h"

namespace kvkernels {
namespace {

constexpr float kLn2 = 0.69314718055994530942f;

const AttentionKernel& find_kernel(AttentionPath path, DType dtype, HeadDims dims) {
  const AttentionKernel* kernel = nullptr;
#if defined(__x86_64__)
  const bool may_emulate = path == AttentionPath::kAmxEmulated && best_isa() >= Isa::kAvx512Bf16;
  if (may_emulate) kernel = amx_emulated_kernel(dtype, dims);
  const bool may_use_amx = path == AttentionPath::kAmx && best_isa() >= Isa::kAmx;
  if (may_use_amx) kernel = amx_kernel(dtype, dims);
  const bool may_use_bf16 = path == AttentionPath::kAvx512Bf16 && best_isa() >= Isa::kAvx512Bf16;
  if (may_use_bf16) kernel = avx512_bf16_kernel(dtype, dims);
  const bool may_use_avx2 = path != AttentionPath::kPortable && best_isa() >= Isa::kAvx2;
  const bool may_use_avx512 =
      may_use_avx2 && path != AttentionPath::kAvx2 && best_isa() >= Isa::kAvx512;
  if (kernel == nullptr && may_use_avx512) kernel = avx512_kernel(dtype, dims);
  if (kernel == nullptr && may_use_avx2) kernel = avx2_kernel(dtype, dims);
#endif
  return kernel != nullptr ? *kernel : *portable_kernel(dtype);
}

// One call's work. Threads claim items until none is left. An item is one tile of query rows
// against one chunk of keys, or against all keys; the thread that finishes a tile's last chunk
// merges the chunks, always in the same order, so the result does not depend on which thread came
// when.
class AttentionCall {
 public:
  AttentionCall(const PagedAttentionArgs& args, const AttentionKernel& kernel, int num_threads)
      : args_(args), kernel_(kernel), plan_(make_plan(args, kernel, num_threads)) {
    if (plan_.num_split_tiles == 0) return;
    partials_ = thread_scratch(3, plan_.num_partials);
    num_done_ = std::make_unique<std::atomic<int32_t>[]>(plan_.num_split_tiles);
  }

  int64_t num_items() const { return plan_.num_items; }

  // How many threads get enough work to be worth waking.
  int64_t num_useful_threads() const {
    constexpr int64_t kWorkPerThread =
        256 << 10;  // score elements times channels: some 20 microseconds
    return 1 + plan_.num_scores * args_.head_dim / kWorkPerThread;
  }

  // What each of `num_threads` threads does.
  void work(int num_threads) {
    size_t sequence = 0;
    for (Items items = claim(sequence, num_threads); items.begin < items.end;
         items = claim(sequence, num_threads)) {
      const SequencePlan& seq = plan_.sequences[sequence];
      for (int64_t item = items.begin; item < items.end; ++item) {
        if (seq.num_splits == 1) {
          attend_whole(seq, seq.tile(args_, item - seq.first_item));
        } else {
          attend_chunk(seq, item - seq.first_item, item + 1 < items.end);
        }
      }
    }
  }

 private:
  struct Items {
    int64_t begin, end;
  };

  // Takes the next items, all of one sequence, to which it moves `sequence` on. A thread does best
  // with items that are neighbours: it can prefetch the keys of the next one early, and has in its
  // own caches what it merges. So a claim takes 1 / kParts of a thread's share of the work that is
  // left, down to single items at the end.
  Items claim(size_t& sequence, int num_threads) {
    constexpr int64_t kParts = 4;
    int64_t begin = next_.load(std::memory_order_relaxed);
    while (begin < plan_.num_items) {
      while (begin >= plan_.sequences[sequence].end_item()) ++sequence;
      const SequencePlan& seq = plan_.sequences[sequence];
      const int64_t cost_left =
          plan_.cost - seq.cost_before - (begin - seq.first_item) * seq.item_cost;
      const int64_t num_wanted =
          std::max<int64_t>(1, cost_left / (kParts * num_threads * seq.item_cost));
      const int64_t end = std::min(begin + num_wanted, seq.end_item());
      if (next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return {begin, end};
    }
    return {begin, begin};
  }

  void attend_whole(const SequencePlan& seq, const AttentionTile& tile) const {
    const int64_t tile_floats = seq.heads_per_tile * seq.result_size;
    float* merged = thread_scratch(0, 2 * tile_floats);
    float* memory = merged + tile_floats;
    bool has_any = false;
    for (int64_t chunk = 0; chunk < seq.num_chunks; ++chunk) {
      AttentionTile part = tile;
      if (!seq.clip_to_chunk(part, chunk)) continue;
      attend(seq, part, has_any ? memory : merged);
      if (has_any) {
        merge(seq, tile, memory, merged);
      } else {
        clear_empty(seq, tile, merged);
      }
      has_any = true;
    }
    if (!has_any) start(seq, tile, merged);
    finish(seq, tile, merged);
  }

  // Attends one chunk. With `has_next` this thread goes on with the item after it, whose keys are
  // prefetched towards the end of this one.
  void attend_chunk(const SequencePlan& seq, int64_t item, bool has_next) {
    const int64_t tile_index = item / seq.num_splits, chunk = item % seq.num_splits;
    const AttentionTile tile = seq.tile(args_, tile_index);
    AttentionTile part = tile, next;
    if (has_next) {
      next = seq.tile(args_, (item + 1) / seq.num_splits);
      if (seq.clip_to_chunk(next, (item + 1) % seq.num_splits)) part.next = &next;
    }
    const int64_t tile_floats = seq.heads_per_tile * seq.result_size;
    float* memory = partials_ + seq.first_partial + tile_index * seq.num_chunks * tile_floats;
    if (seq.clip_to_chunk(part, chunk)) attend(seq, part, memory + chunk * tile_floats);
    std::atomic<int32_t>& num_done = num_done_[seq.first_split_tile + tile_index];
    if (num_done.fetch_add(1, std::memory_order_acq_rel) + 1 < seq.num_chunks) return;
    float* merged = thread_scratch(0, tile_floats);
    start(seq, tile, merged);
    for (int64_t other = 0; other < seq.num_chunks; ++other) {
      part = tile;
      if (seq.clip_to_chunk(part, other)) merge(seq, tile, memory + other * tile_floats, merged);
    }
    finish(seq, tile, merged);
  }

  // Where the result of one of a tile's heads lies in `memory`, which holds the heads' results one
  // after the other.
  TileResult result_in(const SequencePlan& seq, float* memory, int64_t head) const {
    float* out = memory + head * seq.result_size;
    float* max = out + seq.rows_per_tile * args_.value_dim;
    return {out, max, max + seq.rows_per_tile};
  }

  void attend(const SequencePlan& seq, const AttentionTile& tile, float* memory) const {
    TileResult results[kMaxTileHeads];
    for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
      results[head] = result_in(seq, memory, head);
    }
    attend_tile(kernel_, tile, results);
  }

  void start(const SequencePlan& seq, const AttentionTile& tile, float* merged) const {
    for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
      clear_rows(result_in(seq, merged, head), tile.row_end - tile.row_begin, args_.value_dim);
    }
  }

  void clear_empty(const SequencePlan& seq, const AttentionTile& tile, float* memory) const {
    for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
      clear_empty_rows(result_in(seq, memory, head), tile.row_end - tile.row_begin,
                       args_.value_dim);
    }
  }

  // Merges the results over one chunk into those over the chunks before it.
  void merge(const SequencePlan& seq, const AttentionTile& tile, float* memory,
             float* merged) const {
    for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
      merge_rows(kernel_, result_in(seq, memory, head), result_in(seq, merged, head),
                 tile.row_end - tile.row_begin, args_.value_dim);
    }
  }

  // Divides the rows by their sums of weights, and writes them and their lse.
  void finish(const SequencePlan& seq, const AttentionTile& tile, float* merged) const {
    const int64_t group = args_.num_heads / args_.num_kv_heads;
    const int64_t row_bytes = args_.value_dim * item_bytes(args_.dtype);
    for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
      const TileResult result = result_in(seq, merged, head);
      for (int64_t row = 0; row < tile.row_end - tile.row_begin; ++row) {
        const int64_t r = tile.row_begin + row;
        const int64_t query_head = (tile.kv_head + head) * group + r % group;
        const int64_t index = (tile.first_token + r / group) * args_.num_heads + query_head;
        float base = result.max[row], sum = result.sum[row], weight = 1;
        // A sink is a key without a value, seen by every query; one of minus infinity is none.
        const float sink = args_.sinks == nullptr ? -kInfinity : args_.sinks[query_head] * kLog2E;
        if (sink != -kInfinity) {
          base = std::max(base, sink);
          weight = std::exp2(result.max[row] - base);
          sum = weight * sum + std::exp2(sink - base);
        }
        kernel_.narrow(result.out + row * args_.value_dim, sum == 0 ? 0.0f : weight / sum,
                       static_cast<char*>(args_.out) + index * row_bytes, args_.value_dim);
        // A score of infinity leaves no number of the sum, but the maximum tells what it was.
        if (args_.lse != nullptr) {
          args_.lse[index] = base == kInfinity ? base : (base + std::log2(sum)) * kLn2;
        }
      }
    }
  }

  const PagedAttentionArgs& args_;
  const AttentionKernel& kernel_;
  const Plan plan_;
  float* partials_ = nullptr;  // scratch of the calling thread, written by all
  std::unique_ptr<std::atomic<int32_t>[]>
      num_done_;  // chunks finished, for each tile that has several
  std::atomic<int64_t> next_{0};
};

}  // namespace

bool has_attention_path(AttentionPath path) {
  switch (path) {
    case AttentionPath::kPortable:
      return true;
    case AttentionPath::kAvx2:
      return best_isa() >= Isa::kAvx2;
    case AttentionPath::kAvx512:
      return best_isa() >= Isa::kAvx512;
    case AttentionPath::kAvx512Bf16:
    case AttentionPath::kAmxEmulated:
      return best_isa() >= Isa::kAvx512Bf16;
    case AttentionPath::kAmx:
      return best_isa() >= Isa::kAmx;
  }
  return false;
}

void paged_attention(const PagedAttentionArgs& args, AttentionPath path, int num_threads) {
  check_indices(args);
  const AttentionKernel& kernel = find_kernel(path, args.dtype, {args.head_dim, args.value_dim});
  AttentionCall call(args, kernel, num_threads);
  const int64_t num_useful =
      std::min({static_cast<int64_t>(num_threads), call.num_items(), call.num_useful_threads()});
  if (num_useful > 0) {
    const auto num_working = static_cast<int>(num_useful);
    run_parallel(num_working, [&] { call.work(num_working); });
  }
}

void merge_attention(const MergeAttentionArgs& args, AttentionPath path, int num_threads) {
  const AttentionKernel& kernel = find_kernel(path, args.dtype, {args.head_dim, args.head_dim});
  const int64_t head_dim = args.head_dim;
  const int64_t row_bytes = head_dim * item_bytes(args.dtype);
  constexpr int64_t kGrainElements = 64 << 10;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, head_dim));
  parallel_ranges(args.num_rows, grain, num_threads, [&](int64_t begin, int64_t end) {
    float* a = thread_scratch(0, 2 * head_dim);
    float* b = a + head_dim;
    for (int64_t row = begin; row < end; ++row) {
      const float lse_a = args.lse_a[row], lse_b = args.lse_b[row];
      constexpr float kNoKey = -kInfinity;
      const float max = std::max(lse_a, lse_b);
      // Tested on both, not on `max`: std::max with a NaN may return either.
      const bool is_empty = lse_a == kNoKey && lse_b == kNoKey;
      const float exp_a = is_empty ? 0.0f : std::exp(lse_a - max);
      const float exp_b = is_empty ? 0.0f : std::exp(lse_b - max);
      const float sum = exp_a + exp_b;
      const float weight_a = is_empty ? 0.0f : exp_a / sum,
                  weight_b = is_empty ? 0.0f : exp_b / sum;
      // Nothing is read where the weight is zero: zero times what lies there might be NaN.
      if (weight_a != 0) {
        kernel.widen(static_cast<const char*>(args.out_a) + row * row_bytes, a, head_dim);
      } else {
        std::fill_n(a, head_dim, 0.0f);
      }
      if (weight_b != 0) {
        kernel.widen(static_cast<const char*>(args.out_b) + row * row_bytes, b, head_dim);
      } else {
        std::fill_n(b, head_dim, 0.0f);
      }
      for (int64_t i = 0; i < head_dim; ++i) a[i] = weight_a * a[i] + weight_b * b[i];
      kernel.narrow(a, 1.0f, static_cast<char*>(args.out) + row * row_bytes, head_dim);
      // Beyond all numbers stays so, though no weights follow from it.
      const bool is_infinite = std::isinf(max) && !std::isnan(lse_a) && !std::isnan(lse_b);
      args.lse[row] = is_infinite ? max : max + std::log(sum);
    }
  });
}

}  // namespace kvkernels
