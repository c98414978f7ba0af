// Writes and reads codes of 8, 4 and 2 bits for one side of a layer, in terms of the lanes of an
// instruction set, like codec_scales.h.
#pragma once

#include "cpu/codec_keys.h"
#include "cpu/codec_paths.h"
#include "cpu/codec_scales.h"
#include "cpu/codec_values.h"
#include "cpu/streaming_copy.h"

namespace kvkernels {
namespace {

// Whether all items' magnitudes are at most `limit`, given as bits. Bits without the sign are
// ordered like magnitudes, NaN above all.
template <typename Bits>
bool lie_below(const std::byte* items, int64_t num_items, Bits limit) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const auto* bits = reinterpret_cast<const Bits*>(items);
  Bits largest = 0;
  for (int64_t i = 0; i < num_items; ++i) {
    const Bits magnitude = bits[i] & kMagnitude;
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest <= limit;
}

// The bits of 65408 as float32: the codes of numbers up to that restore finite float16.
constexpr uint32_t kLargest = 0x477f8000;

template <DType kType>
bool fits_half(const std::byte* items, int64_t num_items) {
  if (kType == DType::kFloat32) return lie_below<uint32_t>(items, num_items, kLargest);
  return lie_below<uint16_t>(items, num_items, kType == DType::kFloat16 ? 0x7bfc : 0x477f);
}

template <DType kType>
bool fits_half(const Side& side, const std::byte* items) {
  const int64_t dim = side.format.num_channels;
  if (dim == side.head_dim) return fits_half<kType>(items, side.num_items());
  for (int64_t row = 0; row < side.num_rows(); ++row) {
    if (!fits_half<kType>(items + row * side.head_dim * Elements<kType>::kBytes, dim)) return false;
  }
  return true;
}

template <DType kType, int kBits>
bool encode_codes(const Side& side, const std::byte* items, std::byte* layer) {
  if (!Elements<kType>::kRangesSeeAll && !fits_half<kType>(side, items)) return false;
  Words magnitudes = no_words();
  const Tile tile = side.tile();
  const int64_t num_codes = tile.size * tile.dim / kParts<kBits>, groups = side.format.num_groups;
  const int64_t num_pairs = groups * (side.format.is_key ? tile.dim : tile.size);
  auto* codes = reinterpret_cast<uint8_t*>(layer + side.format.parts[0]);
  auto* pairs = reinterpret_cast<uint16_t*>(layer + side.format.parts[1]);
  using E = Elements<kType>;
  constexpr int kMost = kMostVectors<E>;
  const auto encode_key_head = tile.dim / kParts<kBits> % (kMost * kLanes) == 0
                                   ? encode_keys<kType, kBits, kMost>
                                   : encode_keys<kType, kBits, 1>;
  const auto encode = side.format.is_key ? encode_key_head : encode_values<kType, kBits>;
  for (int64_t head = 0; head < side.num_heads; ++head) {
    encode(items + head * tile.size * tile.stride * E::kBytes, tile, groups,
           codes + head * num_codes, pairs + head * num_pairs * 2, magnitudes);
  }
  return largest_lane(magnitudes) <= kLargest;
}

template <DType kType, int kBits>
void decode_codes(const Side& side, const std::byte* layer, std::byte* items) {
  const Tile tile = side.tile();
  const int64_t num_codes = tile.size * tile.dim / kParts<kBits>, groups = side.format.num_groups;
  const int64_t num_pairs = groups * (side.format.is_key ? tile.dim : tile.size);
  const auto* codes = reinterpret_cast<const uint8_t*>(layer + side.format.parts[0]);
  const auto* pairs = reinterpret_cast<const uint16_t*>(layer + side.format.parts[1]);
  using E = Elements<kType>;
  const auto decode_key_head =
      can_stream<E>(items, tile.stride * E::kBytes, tile.dim / kParts<kBits>)
          ? decode_keys<kType, kBits, E::kLineVectors>
          : decode_keys<kType, kBits, 0>;
  const auto decode = side.format.is_key ? decode_key_head : decode_values<kType, kBits>;
  for (int64_t head = 0; head < side.num_heads; ++head) {
    decode(codes + head * num_codes, pairs + head * num_pairs * 2, tile, groups,
           items + head * tile.size * tile.stride * E::kBytes);
  }
  finish_streaming();
}

}  // namespace
}  // namespace kvkernels
