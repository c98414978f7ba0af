// Shares the layers of blocks among threads, and sums their bytes.
#include "kvkernels/codecs.h"

#include <cstring>

#include "cpu/codec_paths.h"
#include "kvkernels/cpu_features.h"
#include "kvkernels/parallel.h"

namespace kvkernels {
namespace {

constexpr int64_t kGrainBytes = 128 << 10;  // of the pool: some 10 microseconds of work

CodecKernels find_kernels(AttentionPath path, DType dtype) {
#if defined(__x86_64__)
  if (path != AttentionPath::kPortable && path != AttentionPath::kAmxEmulated) {
    if (path != AttentionPath::kAvx2 && best_isa() >= Isa::kAvx512) {
      return avx512_codec_kernels(dtype);
    }
    if (best_isa() >= Isa::kAvx2) return avx2_codec_kernels(dtype);
  }
#endif
  return portable_codec_kernels(dtype);
}

int64_t item_bytes(const CodecArgs& args) { return args.dtype == DType::kFloat32 ? 4 : 2; }

int64_t layer_bytes(const CodecArgs& args) {
  return 2 * args.num_heads * args.block_size * args.head_dim * item_bytes(args);
}

// One layer of one block, in the pool and in its payload.
struct Layer {
  Side keys, values;
  std::byte *key_items, *value_items, *payload;
};

Layer find_layer(const CodecArgs& args, int64_t block, int64_t layer) {
  const LayerFormat& format = args.layers[layer];
  std::byte* items =
      args.pool + args.block_ids[block] * args.block_stride + layer * layer_bytes(args);
  return {{format.keys, true, args.num_heads, args.block_size, args.head_dim},
          {format.values, false, args.num_heads, args.block_size, args.head_dim},
          items,
          items + layer_bytes(args) / 2,
          args.payloads + block * args.payload_stride + format.offset};
}

template <typename Visit>
void for_each_layer(const CodecArgs& args, int num_threads, const Visit& visit) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / layer_bytes(args));
  parallel_ranges(args.num_blocks * args.num_layers, grain, num_threads,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      visit(i, find_layer(args, i / args.num_layers, i % args.num_layers));
                    }
                  });
}

void fill_gap(std::byte* layer, int64_t begin, int64_t end) {
  std::memset(layer + begin, 0, end - begin);
}

// Bytes of the parts of a side, without what separates them.
int64_t end_of(const Side& side, int64_t item_bytes) {
  const SideFormat& format = side.format;
  const int64_t num_items = side.num_heads * side.block_size * side.head_dim;
  if (format.bits == kRawBits) return format.parts[0] + num_items * item_bytes;
  if (format.bits == kLosslessBits) return format.parts[3] + side.num_heads * side.head_dim;
  const int64_t sets = side.is_key ? side.head_dim : side.block_size;
  return format.parts[1] + side.num_heads * format.num_groups * sets * 4;
}

}  // namespace

void encode_blocks(const CodecArgs& args, AttentionPath path, int num_threads) {
  const CodecKernels kernels = find_kernels(path, args.dtype);
  for_each_layer(args, num_threads, [&](int64_t index, const Layer& layer) {
    const LayerFormat& format = args.layers[index % args.num_layers];
    if (format.keys.bits == kRawBits && format.values.bits == kRawBits && args.sums != nullptr) {
      // Keys and values adjoin, in the pool and in the payload, and leave no gap.
      args.sums[index] = copy_with_checksum(layer.key_items, layer.payload, format.num_bytes);
      args.is_good[index] = true;
      return;
    }
    const bool holds_keys = kernels.encode(layer.keys, layer.key_items, layer.payload);
    args.is_good[index] =
        holds_keys && kernels.encode(layer.values, layer.value_items, layer.payload);
    fill_gap(layer.payload, end_of(layer.keys, item_bytes(args)), format.values.parts[0]);
    fill_gap(layer.payload, end_of(layer.values, item_bytes(args)), format.num_bytes);
    if (args.sums != nullptr) args.sums[index] = checksum_words(layer.payload, format.num_bytes);
  });
}

void decode_blocks(const CodecArgs& args, AttentionPath path, int num_threads) {
  const CodecKernels kernels = find_kernels(path, args.dtype);
  for_each_layer(args, num_threads, [&](int64_t index, const Layer& layer) {
    const WordSums found =
        checksum_words(layer.payload, args.layers[index % args.num_layers].num_bytes);
    args.is_good[index] =
        found.sum == args.sums[index].sum && found.weighted == args.sums[index].weighted;
    if (!args.is_good[index]) return;
    const LayerFormat& format = args.layers[index % args.num_layers];
    if (format.keys.bits == kRawBits && format.values.bits == kRawBits) {
      // Keys and values adjoin, in the pool and in the payload. This does not read the pool first.
      copy_with_checksum(layer.payload, layer.key_items, format.num_bytes);
      return;
    }
    kernels.decode(layer.keys, layer.payload, layer.key_items);
    kernels.decode(layer.values, layer.payload, layer.value_items);
  });
}

}  // namespace kvkernels
