// Linear layers: chooses the code, shares the result's rectangles among threads.
#include "kvkernels/linear.h"

#include <algorithm>
#include <atomic>

#include "cpu/linear_kernel.h"
#include "kvkernels/cpu_features.h"
#include "kvkernels/parallel.h"

namespace kvkernels {
namespace {

// A rectangle's rows and columns should stay in the L2 cache together, and a call should have
// several rectangles for each thread.
constexpr int64_t kTileRows = 128, kTileCols = 64;
// With few rows all time goes into reading the weight, which narrow rectangles share out evenly.
constexpr int64_t kFewRows = 16, kFewRowsTileCols = 32;
// Multiplications that take some 20 microseconds; for fewer no thread is woken. A weight of so many
// elements takes as long to read.
constexpr int64_t kWorkPerThread = 256 << 10;

LinearKernel find_kernel(AttentionPath path, DType dtype) {
#if defined(__x86_64__)
  const bool is_plain = path == AttentionPath::kPortable || path == AttentionPath::kAmxEmulated;
  if (path == AttentionPath::kAvx512Bf16 && best_isa() >= Isa::kAvx512Bf16) {
    if (const LinearKernel kernel = avx512_bf16_linear(dtype)) return kernel;
  }
  if (!is_plain && path != AttentionPath::kAvx2 && best_isa() >= Isa::kAvx512) {
    return avx512_linear(dtype);
  }
  if (!is_plain && best_isa() >= Isa::kAvx2) return avx2_linear(dtype);
#endif
  return portable_linear(dtype);
}

}  // namespace

void linear(const LinearArgs& args, AttentionPath path, int num_threads) {
  const LinearKernel multiply = find_kernel(path, args.dtype);
  const int64_t tile_cols = args.num_rows <= kFewRows ? kFewRowsTileCols : kTileCols;
  const int64_t num_row_tiles = (args.num_rows + kTileRows - 1) / kTileRows;
  const int64_t num_tiles = num_row_tiles * ((args.out_features + tile_cols - 1) / tile_cols);
  const int64_t work = std::max<int64_t>(args.num_rows, 4) * args.in_features * args.out_features;
  const int64_t num_useful =
      std::min<int64_t>({num_threads, num_tiles, 1 + work / kWorkPerThread / 4});
  std::atomic<int64_t> next{0};
  run_parallel(static_cast<int>(num_useful), [&] {
    // A thread takes a tile while it works on the one before, whose end then asks for its weights.
    int64_t index = next++;
    while (index < num_tiles) {
      const int64_t following = next++;
      const int64_t row = index % num_row_tiles * kTileRows;
      const int64_t col = index / num_row_tiles * tile_cols;
      const int64_t next_col = following / num_row_tiles * tile_cols;
      multiply({&args, row, std::min(args.num_rows, row + kTileRows), col,
                std::min(args.out_features, col + tile_cols),
                following < num_tiles && next_col != col ? next_col : -1});
      index = following;
    }
  });
}

}  // namespace kvkernels
