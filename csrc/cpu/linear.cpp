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

// The rectangles of all layers of a call, in the order of the weights in memory.
class Tiles {
 public:
  Tiles(const LinearArgs& args)
      : args_(args),
        num_cols_(args.num_rows <= kFewRows ? kFewRowsTileCols : kTileCols),
        num_row_tiles_((args.num_rows + kTileRows - 1) / kTileRows) {
    for (int64_t i = 0; i < args.num_layers; ++i) count_ += count_of(args.layers[i]);
  }

  int64_t count() const { return count_; }

  LinearTile find(int64_t index) const {
    const LinearLayer* layer = args_.layers;
    for (int64_t count = count_of(*layer); index >= count; count = count_of(*layer)) {
      index -= count;
      ++layer;
    }
    const int64_t row = index % num_row_tiles_ * kTileRows;
    const int64_t col = index / num_row_tiles_ * num_cols_;
    return {&args_, layer,
            row,    std::min(args_.num_rows, row + kTileRows),
            col,    std::min(layer->out_features, col + num_cols_),
            nullptr};
  }

  const void* weights_of(const LinearTile& tile) const {
    const int64_t item = args_.dtype == DType::kFloat32 ? 4 : 2;
    return static_cast<const char*>(tile.layer->weight) +
           tile.col_begin * tile.layer->weight_stride * item;
  }

 private:
  int64_t count_of(const LinearLayer& layer) const {
    return num_row_tiles_ * ((layer.out_features + num_cols_ - 1) / num_cols_);
  }

  const LinearArgs& args_;
  const int64_t num_cols_, num_row_tiles_;
  int64_t count_ = 0;
};

int64_t count_work(const LinearArgs& args) {
  int64_t num_cols = 0;
  for (int64_t i = 0; i < args.num_layers; ++i) num_cols += args.layers[i].out_features;
  return std::max<int64_t>(args.num_rows, 4) * args.in_features * num_cols;
}

}  // namespace

void linear(const LinearArgs& args, AttentionPath path, int num_threads) {
  const LinearKernel multiply = find_kernel(path, args.dtype);
  const Tiles tiles(args);
  const int64_t num_useful =
      std::min<int64_t>({num_threads, tiles.count(), 1 + count_work(args) / kWorkPerThread / 4});
  std::atomic<int64_t> next{0};
  run_parallel(static_cast<int>(num_useful), [&] {
    // A thread takes a tile while it works on the one before, whose end then asks for its weights.
    int64_t index = next++;
    while (index < tiles.count()) {
      const int64_t following = next++;
      LinearTile tile = tiles.find(index);
      // Where nothing follows, its own weights are asked for once more: that costs next to nothing.
      tile.next = tiles.weights_of(following < tiles.count() ? tiles.find(following) : tile);
      multiply(tile);
      index = following;
    }
  });
}

}  // namespace kvkernels
