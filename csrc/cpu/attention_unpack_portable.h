// Unpacking in plain C++ that a compiler can turn into vectors of any width.
#pragma once

#include "cpu/attention_unpack.h"
#include "cpu/float_formats.h"

namespace kvkernels {
namespace {

// Writer has a type Item and a static function narrow(float) that returns one.
template <typename Writer>
struct PortableUnpacker {
  using Item = typename Writer::Item;

  static void widen_scales(const uint16_t* pairs, int64_t count, float* scales, float* minimums) {
    for (int64_t i = 0; i < count; ++i) {
      scales[i] = to_float(Float16{pairs[2 * i]});
      minimums[i] = to_float(Float16{pairs[2 * i + 1]});
    }
  }

  template <typename Scales>
  static void scale_bytes(const uint8_t* codes, int64_t dim, const Scales& scales, Item* row) {
    for (int64_t i = 0; i < dim; ++i) row[i] = scaled(codes[i], scales, i);
  }

  template <typename Scales>
  static void scale_nibbles(const uint8_t* codes, int64_t dim, const Scales& scales, Item* row) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) row[i] = scaled(codes[i] & 15, scales, i);
    for (int64_t i = half; i < dim; ++i) row[i] = scaled(codes[i - half] >> 4, scales, i);
  }

  static void convert(const void* cache, DType dtype, int64_t offset, int64_t dim, Item* row) {
    switch (dtype) {
      case DType::kFloat32:
        return convert_row(static_cast<const float*>(cache) + offset, dim, row);
      case DType::kFloat16:
        return convert_row(static_cast<const Float16*>(cache) + offset, dim, row);
      case DType::kBFloat16:
        return convert_row(static_cast<const BFloat16*>(cache) + offset, dim, row);
      case DType::kFloat8:
        return convert_row(static_cast<const Float8*>(cache) + offset, dim, row);
    }
  }

 private:
  template <typename Scales>
  static Item scaled(int code, const Scales& scales, int64_t channel) {
    return Writer::narrow(scales.minimum(channel) +
                          scales.scale(channel) * static_cast<float>(code));
  }

  template <typename T>
  static void convert_row(const T* source, int64_t dim, Item* row) {
    for (int64_t i = 0; i < dim; ++i) row[i] = Writer::narrow(to_float(source[i]));
  }
};

}  // namespace
}  // namespace kvkernels
