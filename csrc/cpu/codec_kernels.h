// Encodes and decodes one side of a layer, in terms of the lanes of an instruction set: to be
// included after one of the codec_lanes_*.h.
#pragma once

#include <cstring>

#include "cpu/codec_codes.h"
#include "cpu/codec_lossless.h"
#include "cpu/codec_paths.h"

namespace kvkernels {
namespace {

// Copies rows of `num_bytes`; strides are in bytes.
inline void copy_rows(const std::byte* source, int64_t source_stride, std::byte* target,
                      int64_t target_stride, int64_t num_rows, int64_t num_bytes) {
  if (source_stride == num_bytes && target_stride == num_bytes) {
    std::memcpy(target, source, num_rows * num_bytes);
    return;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    std::memcpy(target + row * target_stride, source + row * source_stride, num_bytes);
  }
}

template <DType kType>
bool encode_side(const Side& side, const std::byte* items, std::byte* layer) {
  constexpr int64_t kBytes = Elements<kType>::kBytes;
  const int64_t row_bytes = side.format.num_channels * kBytes;
  switch (side.format.bits) {
    case kRawBits:
      copy_rows(items, side.head_dim * kBytes, layer + side.format.parts[0], row_bytes,
                side.num_rows(), row_bytes);
      return true;
    case kLosslessBits:
      return encode_lossless(side, items, layer);
    case 8:
      return encode_codes<kType, 8>(side, items, layer);
    case 4:
      return encode_codes<kType, 4>(side, items, layer);
    default:
      return encode_codes<kType, 2>(side, items, layer);
  }
}

template <DType kType>
void decode_side(const Side& side, const std::byte* layer, std::byte* items) {
  constexpr int64_t kBytes = Elements<kType>::kBytes;
  const int64_t row_bytes = side.format.num_channels * kBytes;
  switch (side.format.bits) {
    case kRawBits:
      return copy_rows(layer + side.format.parts[0], row_bytes, items, side.head_dim * kBytes,
                       side.num_rows(), row_bytes);
    case kLosslessBits:
      return decode_lossless(side, layer, items);
    case 8:
      return decode_codes<kType, 8>(side, layer, items);
    case 4:
      return decode_codes<kType, 4>(side, layer, items);
    default:
      return decode_codes<kType, 2>(side, layer, items);
  }
}

inline CodecKernels kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {encode_side<DType::kFloat32>, decode_side<DType::kFloat32>};
    case DType::kFloat16:
      return {encode_side<DType::kFloat16>, decode_side<DType::kFloat16>};
    default:
      return {encode_side<DType::kBFloat16>, decode_side<DType::kBFloat16>};
  }
}

}  // namespace
}  // namespace kvkernels
