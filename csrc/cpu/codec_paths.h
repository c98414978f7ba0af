// The codecs' kernels, one set for each instruction set.
#pragma once

#include <cstddef>

#include "kvkernels/codecs.h"

namespace kvkernels {

constexpr int64_t kMaxCodecDim = 1024;

// The keys or the values of one layer.
struct Side {
  SideFormat format;
  bool is_key;
  int64_t num_heads, block_size, head_dim;
};

struct CodecKernels {
  // False if the codec cannot hold the items [num_heads, block_size, head_dim].
  bool (*encode)(const Side& side, const std::byte* items, std::byte* layer);
  void (*decode)(const Side& side, const std::byte* layer, std::byte* items);
};

CodecKernels portable_codec_kernels(DType dtype);
CodecKernels avx2_codec_kernels(DType dtype);
CodecKernels avx512_codec_kernels(DType dtype);

}  // namespace kvkernels
