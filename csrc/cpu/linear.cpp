// Linear layers: chooses the kernel, and shares the result among threads as rectangles of rows and
// columns.
#include "kvkernels/linear.h"

#include <algorithm>
#include <atomic>

#include "cpu/linear_kernel.h"
#include "cpu/thread_scratch.h"
#include "kvkernels/cpu_features.h"
#include "kvkernels/parallel.h"

namespace kvkernels {
namespace {

// A rectangle's rows and columns of weights should together stay in the L2 cache, and a call should
// have several rectangles for each thread.
constexpr int64_t kTileRows = 128, kTileCols = 64;
// With few rows all time goes into reading the weights, which narrow rectangles share out evenly.
constexpr int64_t kFewRows = 16, kFewRowsTileCols = 32;
// With packed rows weights may be copied for a rectangle, so more rows share each copy.
constexpr int64_t kPackedTileRows = 256;
// Rows packed at a time: bounds the memory for them, at the cost of reading the weights once more
// for each further lot.
constexpr int64_t kPackedRows = 1024;
// Multiplications that take some 20 microseconds; for fewer no thread is woken. Reading a weight of
// this many elements takes as long.
constexpr int64_t kWorkPerThread = 256 << 10;
constexpr int64_t kBytesPerThread = 128 << 10;  // of packed rows, for which the same holds

LinearKernel find_kernel(AttentionPath path, DType dtype) {
#if defined(__x86_64__)
  const bool is_plain = path == AttentionPath::kPortable || path == AttentionPath::kAmxEmulated;
  LinearKernel kernel = {nullptr};
  if (path == AttentionPath::kAmx && best_isa() >= Isa::kAmx) {
    kernel = amx_linear(dtype);
  } else if (path == AttentionPath::kAmxEmulated && best_isa() >= Isa::kAvx512Bf16) {
    kernel = amx_emulated_linear(dtype);
  } else if (path == AttentionPath::kAvx512Bf16 && best_isa() >= Isa::kAvx512Bf16) {
    kernel = avx512_bf16_linear(dtype);
  }
  if (kernel.multiply != nullptr) return kernel;
  if (!is_plain && path != AttentionPath::kAvx2 && best_isa() >= Isa::kAvx512) {
    return avx512_linear(dtype);
  }
  if (!is_plain && best_isa() >= Isa::kAvx2) return avx2_linear(dtype);
#endif
  return portable_linear(dtype);
}

// The rectangles of all layers of a call for the rows [row_begin, row_end), in the order of the
// weights in memory.
class Tiles {
 public:
  Tiles(const LinearArgs& args, int64_t row_begin, int64_t row_end, const char* packed)
      : args_(args),
        packed_(packed),
        row_begin_(row_begin),
        row_end_(row_end),
        num_rows_(packed == nullptr ? kTileRows : kPackedTileRows),
        num_cols_(row_end - row_begin <= kFewRows ? kFewRowsTileCols : kTileCols),
        num_row_tiles_((row_end - row_begin + num_rows_ - 1) / num_rows_) {
    for (int64_t i = 0; i < args.num_layers; ++i) count_ += count_of(args.layers[i]);
  }

  int64_t count() const { return count_; }

  LinearTile find(int64_t index) const {
    const LinearLayer* layer = args_.layers;
    for (int64_t count = count_of(*layer); index >= count; count = count_of(*layer)) {
      index -= count;
      ++layer;
    }
    const int64_t offset = index % num_row_tiles_ * num_rows_, row = row_begin_ + offset;
    const int64_t col = index / num_row_tiles_ * num_cols_;
    const char* packed =
        packed_ == nullptr ? nullptr : packed_ + offset / kGroupRows * packed_group_bytes(args_);
    return {&args_,  layer,
            row,     std::min(row_end_, row + num_rows_),
            col,     std::min(layer->out_features, col + num_cols_),
            nullptr, packed};
  }

  const void* weights_of(const LinearTile& tile) const {
    return static_cast<const char*>(tile.layer->weight) +
           tile.col_begin * tile.layer->weight_stride * item_bytes(args_.dtype);
  }

 private:
  int64_t count_of(const LinearLayer& layer) const {
    return num_row_tiles_ * ((layer.out_features + num_cols_ - 1) / num_cols_);
  }

  const LinearArgs& args_;
  const char* packed_;
  const int64_t row_begin_, row_end_, num_rows_, num_cols_, num_row_tiles_;
  int64_t count_ = 0;
};

int64_t count_work(const LinearArgs& args, int64_t num_rows) {
  int64_t num_cols = 0;
  for (int64_t i = 0; i < args.num_layers; ++i) num_cols += args.layers[i].out_features;
  return std::max<int64_t>(num_rows, 4) * args.in_features * num_cols;
}

const char* pack_rows(const LinearArgs& args, const LinearKernel& kernel, int64_t row_begin,
                      int64_t row_end, int num_threads) {
  const int64_t num_groups = (row_end - row_begin + kGroupRows - 1) / kGroupRows;
  const int64_t group_bytes = packed_group_bytes(args);
  const int64_t num_floats = num_groups * group_bytes / static_cast<int64_t>(sizeof(float));
  // Not slot 1: the kernels use that meanwhile, on this thread too.
  auto* packed = reinterpret_cast<char*>(thread_scratch(2, num_floats));
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / group_bytes);
  parallel_ranges(num_groups, grain, num_threads, [&](int64_t begin, int64_t end) {
    kernel.pack(args, row_begin + begin * kGroupRows,
                std::min(row_end, row_begin + end * kGroupRows), packed + begin * group_bytes);
  });
  return packed;
}

bool packs(const LinearKernel& kernel, const LinearArgs& args) {
  return kernel.pack != nullptr && (kernel.packs == nullptr || kernel.packs(args));
}

void multiply_rows(const LinearArgs& args, const LinearKernel& kernel, int64_t row_begin,
                   int64_t row_end, int num_threads) {
  const char* packed =
      packs(kernel, args) ? pack_rows(args, kernel, row_begin, row_end, num_threads) : nullptr;
  const Tiles tiles(args, row_begin, row_end, packed);
  const int64_t work = count_work(args, row_end - row_begin);
  const int64_t num_useful =
      std::min<int64_t>({num_threads, tiles.count(), 1 + work / kWorkPerThread / 4});
  std::atomic<int64_t> next{0};
  run_parallel(static_cast<int>(num_useful), [&] {
    // A thread takes its next tile before it works on this one, whose end then prefetches the next
    // one's weights.
    int64_t index = next++;
    while (index < tiles.count()) {
      const int64_t following = next++;
      LinearTile tile = tiles.find(index);
      // Where nothing follows, its own weights are prefetched again: that costs next to nothing.
      tile.next = tiles.weights_of(following < tiles.count() ? tiles.find(following) : tile);
      kernel.multiply(tile);
      index = following;
    }
  });
}

}  // namespace

void linear(const LinearArgs& args, AttentionPath path, int num_threads) {
  const LinearKernel kernel = find_kernel(path, args.dtype);
  const int64_t most = packs(kernel, args) ? kPackedRows : args.num_rows;
  for (int64_t row = 0; row < args.num_rows; row += most) {
    multiply_rows(args, kernel, row, std::min(args.num_rows, row + most), num_threads);
  }
}

}  // namespace kvkernels
