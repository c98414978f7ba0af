// Shares the layers of blocks among threads, and sums their bytes.
#include "kvkernels/codecs.h"

#include <algorithm>
#include <cstring>

#include "cpu/codec_paths.h"
#include "cpu/streaming_copy.h"
#include "kvkernels/cpu_features.h"
#include "kvkernels/parallel.h"

namespace kvkernels {
namespace {

constexpr int64_t kGrainBytes = 128
                                << 10;  // bytes of the pool per piece of work: some 10 microseconds

#if defined(__x86_64__)
CodecKernels find_avx512_kernels(AttentionPath path, DType dtype) {
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  CodecKernels kernels = has_vnni ? avx512_vnni_codec_kernels(dtype) : avx512_codec_kernels(dtype);
  const bool has_bf16 = path != AttentionPath::kAvx512 && best_isa() >= Isa::kAvx512Bf16;
  if (has_bf16 && dtype == DType::kBFloat16) kernels.decode = avx512_bf16_codec_decode();
  return kernels;
}
#endif

CodecKernels find_kernels(AttentionPath path, DType dtype) {
#if defined(__x86_64__)
  if (path != AttentionPath::kPortable && path != AttentionPath::kAmxEmulated) {
    if (path != AttentionPath::kAvx2 && best_isa() >= Isa::kAvx512) {
      return find_avx512_kernels(path, dtype);
    }
    if (best_isa() >= Isa::kAvx2) return avx2_codec_kernels(dtype);
  }
#endif
  return portable_codec_kernels(dtype);
}

int64_t plane_bytes(const CodecArgs& args) {
  return args.num_heads * args.block_size * args.head_dim * item_bytes(args.dtype);
}

int64_t layer_bytes(const CodecArgs& args) { return args.num_planes * plane_bytes(args); }

// One layer of one block, in the pool and in its payload.
struct Layer {
  const LayerFormat& format;
  std::byte *items, *payload;
};

template <typename Visit>
void for_each_layer(const CodecArgs& args, int num_threads, const Visit& visit) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / layer_bytes(args));
  parallel_ranges(args.num_blocks * args.num_layers, grain, num_threads,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      const int64_t block = i / args.num_layers, layer = i % args.num_layers;
                      const LayerFormat& format = args.layers[layer];
                      visit(i, Layer{format,
                                     args.pool + args.block_ids[block] * args.block_stride +
                                         layer * layer_bytes(args),
                                     args.payloads + block * args.payload_stride + format.offset});
                    }
                  });
}

// Whether a payload's layer is a plain copy of the pool's: all sides raw, in the same order and
// without gaps.
bool is_copy(const CodecArgs& args, const LayerFormat& format) {
  return format.num_bytes == layer_bytes(args) &&
         std::all_of(format.sides, format.sides + format.num_sides,
                     [](const SideFormat& side) { return side.bits == kRawBits; });
}

Side find_side(const CodecArgs& args, const SideFormat& format) {
  return {format, args.num_heads, args.block_size, args.head_dim};
}

std::byte* find_items(const CodecArgs& args, const Layer& layer, const SideFormat& side) {
  return layer.items + side.plane * plane_bytes(args) + side.first_channel * item_bytes(args.dtype);
}

// The end of a side's parts, before the padding that separates it from the next; in bytes from the
// layer's start.
int64_t end_of(const Side& side, DType dtype) {
  const SideFormat& format = side.format;
  if (format.bits == kRawBits) return format.parts[0] + side.num_items() * item_bytes(dtype);
  if (format.bits == kLosslessBits) return side.lossless_end();
  const int64_t sets = format.is_key ? format.num_channels : side.block_size;
  return format.parts[1] + side.num_heads * format.num_groups * sets * 4;
}

// Encodes side `index`, and writes zeros behind it up to the next or to the layer's end. Adds the
// sums of both unless `sums` is null. False if the codec cannot hold the side.
bool encode_side(const CodecArgs& args, const CodecKernels& kernels, const Layer& layer,
                 int64_t index, WordSums* sums) {
  const LayerFormat& format = layer.format;
  const Side side = find_side(args, format.sides[index]);
  const std::byte* items = find_items(args, layer, side.format);
  const bool is_summing = sums != nullptr && kernels.can_sum != nullptr && kernels.can_sum(side);
  const bool is_good = is_summing ? kernels.encode_and_sum(side, items, layer.payload, *sums)
                                  : kernels.encode(side, items, layer.payload);
  if (!is_good) return false;
  const int64_t begin = side.format.parts[0], end = end_of(side, args.dtype);
  const bool is_last = index + 1 == format.num_sides;
  const int64_t next = is_last ? format.num_bytes : format.sides[index + 1].parts[0];
  std::memset(layer.payload + end, 0, next - end);
  if (sums != nullptr && !is_summing) {
    append_sums(checksum_words(layer.payload + begin, next - begin), begin / 4, *sums);
  }
  return true;
}

}  // namespace

void encode_blocks(const CodecArgs& args, AttentionPath path, int num_threads) {
  const CodecKernels kernels = find_kernels(path, args.dtype);
  for_each_layer(args, num_threads, [&](int64_t index, const Layer& layer) {
    const LayerFormat& format = layer.format;
    args.is_good[index] = true;
    if (is_copy(args, format) && args.sums != nullptr) {
      args.sums[index] = copy_with_checksum(layer.items, layer.payload, format.num_bytes);
      return;
    }
    WordSums* sums = args.sums != nullptr ? args.sums + index : nullptr;
    if (sums != nullptr) *sums = {0, 0};
    for (int64_t i = 0; i < format.num_sides && args.is_good[index]; ++i) {
      args.is_good[index] = encode_side(args, kernels, layer, i, sums);
    }
  });
}

void decode_blocks(const CodecArgs& args, AttentionPath path, int num_threads) {
  const CodecKernels kernels = find_kernels(path, args.dtype);
  for_each_layer(args, num_threads, [&](int64_t index, const Layer& layer) {
    const LayerFormat& format = layer.format;
    const WordSums found = checksum_words(layer.payload, format.num_bytes);
    args.is_good[index] =
        found.sum == args.sums[index].sum && found.weighted == args.sums[index].weighted;
    if (!args.is_good[index]) return;
    if (is_copy(args, format)) {  // streaming does not read the pool's lines first
      copy_streaming(layer.payload, layer.items, format.num_bytes);
      return;
    }
    for (int64_t i = 0; i < format.num_sides; ++i) {
      const SideFormat& side = format.sides[i];
      kernels.decode(find_side(args, side), layer.payload, find_items(args, layer, side));
    }
  });
}

}  // namespace kvkernels
