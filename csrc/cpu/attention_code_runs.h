// Turns tiles of keys whose blocks hold codes into jobs for the kernels of attention_codes.h.
#pragma once

#include "cpu/attention_codes.h"
#include "cpu/attention_spans.h"

namespace kvkernels {
namespace {

// The blocks of a tile; none (count 0) unless all hold codes of one kind, with a shape that suits
// the kernels.
struct CodeRuns {
  static constexpr int kMaxRuns = kCodeRowStride / 16;

  int count = 0;
  const CodeKernels* kernels;
  Run runs[kMaxRuns];

  BlockKind kind() const { return runs[0].block.kind; }
};

inline void find_code_runs(const AttentionTile& tile, int64_t begin, int64_t end,
                           FindCodeKernels kernels_of, CodeRuns& found) {
  const PagedAttentionArgs& args = *tile.args;
  found.count = 0;
  const BlockKind kind = block_entry(tile.blocks[begin / args.block_size]).kind;
  // The kernels' rounding is as fine as that of 16-bit floats, but coarser than float32.
  if (kind == BlockKind::kFloat || args.dtype == DType::kFloat32) return;
  const QuantizedCache& cache = quantized_cache(args, kind);
  const CodeShape shape = {args.block_size,  args.head_dim,      args.value_dim,
                           cache.key_groups, cache.value_groups, kind == BlockKind::kInt4};
  found.kernels = kernels_of(shape);
  if (found.kernels == nullptr || !found.kernels->suits(shape)) return;
  bool is_one_kind = true;
  for_each_run(tile, begin, end, [&](const Run& run) {
    is_one_kind &= run.block.kind == kind;
    found.runs[found.count++] = run;
  });
  if (!is_one_kind) found.count = 0;
}

inline CodeRun code_run(const Part& part, const Run& run, const PagedAttentionArgs& args,
                        int64_t kv_head, int64_t dim, int64_t groups) {
  return {part.codes_of(run.block.id, kv_head),
          part.scales_of(run.block.id, kv_head),
          run.block.kind == BlockKind::kInt4,
          run.slot,
          run.count,
          dim,
          groups,
          args.block_size};
}

// Room for the jobs of as many heads as a tile may have.
template <typename Job>
struct CodeJobs {
  int64_t count = 0;
  Job jobs[kMaxTileHeads * CodeRuns::kMaxRuns];
};

// Adds the jobs of one of the tile's heads: scores[r][t] = query row r * key t.
inline void add_key_jobs(const AttentionTile& tile, int64_t head, const CodeRuns& keys,
                         const float* query, float* scores, CodeJobs<KeyJob>& all) {
  const PagedAttentionArgs& args = *tile.args;
  const QuantizedCache& cache = quantized_cache(args, keys.kind());
  for (int i = 0; i < keys.count; ++i) {
    const Run& run = keys.runs[i];
    all.jobs[all.count++] = {code_run({cache.key_codes, cache.key_scales}, run, args,
                                      tile.kv_head + head, args.head_dim, cache.key_groups),
                             query, scores + run.first};
  }
}

// Adds the jobs of one of the tile's heads: sums[r][i] = sums[r][i] * decay[r] + sum over t of
// weights[r][t] * value t.
inline void add_value_jobs(const AttentionTile& tile, int64_t head, const CodeRuns& values,
                           const float* weights, const float* decay, float* sums,
                           CodeJobs<ValueJob>& all) {
  static constexpr float kNoDecay[kMaxCodeRows] = {1, 1, 1, 1, 1, 1, 1, 1};
  const PagedAttentionArgs& args = *tile.args;
  const QuantizedCache& cache = quantized_cache(args, values.kind());
  for (int i = 0; i < values.count; ++i) {
    const Run& run = values.runs[i];
    all.jobs[all.count++] = {code_run({cache.value_codes, cache.value_scales}, run, args,
                                      tile.kv_head + head, args.value_dim, cache.value_groups),
                             weights + run.first, i == 0 ? decay : kNoDecay, sums};
  }
}

}  // namespace
}  // namespace kvkernels
