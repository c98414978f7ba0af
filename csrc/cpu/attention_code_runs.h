// Turns tiles of keys whose blocks hold codes into jobs for the kernels of attention_codes.h.
#pragma once

#include "cpu/attention_codes.h"
#include "cpu/attention_spans.h"

namespace kvkernels {
namespace {

constexpr int kMaxCodeRuns = kCodeRowStride / 16;

// The codes of a tile's keys, or of its values: those of its first head, and how far apart heads
// are.
struct HeadCodes {
  CodeRun runs[kMaxCodeRuns];
  int64_t codes_stride, scales_stride;

  HeadCodes() {}  // leaves all uninitialised: tiles come by the thousand

  CodeRun of(int64_t head, int i) const {
    CodeRun run = runs[i];
    run.codes += head * codes_stride;
    run.scales += head * scales_stride;
    return run;
  }
};

// The blocks of a tile; none (count 0) unless all hold codes of one kind, with a shape that suits
// the kernels.
struct CodeRuns {
  int count = 0;
  const CodeKernels* kernels;
  int64_t first[kMaxCodeRuns];  // position of a run's first key in the tile
  HeadCodes keys, values;
};

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
  const Part keys = {cache.key_codes, cache.key_scales};
  const Part values = {cache.value_codes, cache.value_scales};
  found.keys.codes_stride = keys.codes.head_stride;
  found.keys.scales_stride = keys.scales.head_stride;
  found.values.codes_stride = values.codes.head_stride;
  found.values.scales_stride = values.scales.head_stride;
  bool is_one_kind = true;
  int count = 0;
  for_each_run(tile, begin, end, [&](const Run& run) {
    is_one_kind = is_one_kind && run.block.kind == kind;
    if (!is_one_kind) return;
    found.first[count] = run.first;
    found.keys.runs[count] =
        code_run(keys, run, args, tile.kv_head, args.head_dim, cache.key_groups);
    found.values.runs[count] =
        code_run(values, run, args, tile.kv_head, args.value_dim, cache.value_groups);
    ++count;
  });
  if (is_one_kind) found.count = count;
}

// Room for the jobs of as many heads as a tile may have.
template <typename Job>
struct CodeJobs {
  int64_t count = 0;
  Job jobs[kMaxTileHeads * kMaxCodeRuns];
};

// Adds the jobs of one of the tile's heads: scores[r][t] = query row r * key t.
inline void add_key_jobs(int64_t head, const CodeRuns& found, const float* query, float* scores,
                         CodeJobs<KeyJob>& all) {
  for (int i = 0; i < found.count; ++i) {
    all.jobs[all.count++] = {found.keys.of(head, i), query, scores + found.first[i]};
  }
}

// Adds the jobs of one of the tile's heads: sums[r][i] = sums[r][i] * decay[r] + sum over t of
// weights[r][t] * value t.
inline void add_value_jobs(int64_t head, const CodeRuns& found, const float* weights,
                           const float* decay, float* sums, CodeJobs<ValueJob>& all) {
  static constexpr float kNoDecay[kMaxCodeRows] = {1, 1, 1, 1, 1, 1, 1, 1};
  for (int i = 0; i < found.count; ++i) {
    all.jobs[all.count++] = {found.values.of(head, i), weights + found.first[i],
                             i == 0 ? decay : kNoDecay, sums};
  }
}

}  // namespace
}  // namespace kvkernels
