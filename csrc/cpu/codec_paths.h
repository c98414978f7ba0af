// What each instruction set implements for the codecs, and the data that they pass.
#pragma once

#include <cstddef>

#include "kvkernels/codecs.h"

namespace kvkernels {

constexpr int64_t kMaxCodecDim = 1024;

// One head: `size` tokens, `dim` channels, `stride` items from one token to the next.
struct Tile {
  int64_t size, dim, stride;
};

// One side of one layer: items [num_heads, block_size, num_channels], in rows of head_dim.
struct Side {
  SideFormat format;
  int64_t num_heads, block_size, head_dim;

  [[gnu::always_inline]] int64_t num_rows() const { return num_heads * block_size; }
  [[gnu::always_inline]] int64_t num_items() const { return num_rows() * format.num_channels; }
  [[gnu::always_inline]] Tile tile() const { return {block_size, format.num_channels, head_dim}; }
  // End of its lossless codes, which cover all channels; in bytes from the layer's start.
  [[gnu::always_inline]] int64_t lossless_end() const {
    return format.parts[3] + num_heads * head_dim;
  }
};

// The parts of one head's lossless codes.
struct Lossless {
  uint8_t *low, *exponents;
  uint32_t* escapes;
  uint8_t* tops;
};

using CodecDecode = void (*)(const Side& side, const std::byte* layer, std::byte* items);

struct CodecKernels {
  // False if the codec cannot hold the items.
  bool (*encode)(const Side& side, const std::byte* items, std::byte* layer);
  CodecDecode decode;
  // For instruction sets that can sum bytes while encoding, else null. can_sum: for which sides.
  // encode_and_sum: encodes, and adds the sums of what it writes, with words counted from the
  // layer's start.
  bool (*can_sum)(const Side& side) = nullptr;
  bool (*encode_and_sum)(const Side& side, const std::byte* items, std::byte* layer,
                         WordSums& sums) = nullptr;
};

CodecKernels portable_codec_kernels(DType dtype);
CodecKernels avx2_codec_kernels(DType dtype);
CodecKernels avx512_codec_kernels(DType dtype);

// avx512_codec_kernels() with encode_and_sum; needs AVX512-VNNI.
CodecKernels avx512_vnni_codec_kernels(DType dtype);

// Decodes to bfloat16; needs AVX512-BF16.
CodecDecode avx512_bf16_codec_decode();

}  // namespace kvkernels
