// Writes and reads one side of a layer of bfloat16 without loss ("l12"): per item, sign and
// mantissa in a byte, and in 4 bits how far its exponent lies below its channel's largest ("top").
// Exponents 15 or more below are listed apart as escapes; exponent 0 needs none.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/codec_paths.h"
#include "cpu/streaming_copy.h"
#if defined(__AVX512BW__)
#include "cpu/codec_lossless_avx512.h"
#endif

namespace kvkernels {
namespace {

// Splits a row into signs and mantissas (`low`) and distances of the exponents from the tops
// (`deltas`). Returns whether one lies too far away.
inline bool split_row(const uint16_t* __restrict row, const uint16_t* __restrict tops, int64_t dim,
                      uint8_t* __restrict low, uint8_t* __restrict deltas) {
  uint16_t far = 0;
  for (int64_t c = 0; c < dim; ++c) {
    const uint16_t exponent = (row[c] >> 7) & 255, delta = tops[c] - exponent;
    low[c] = static_cast<uint8_t>(((row[c] >> 8) & 0x80) | (row[c] & 0x7f));
    deltas[c] = static_cast<uint8_t>(delta < 15 ? delta : 15);
    far |= delta < 15 ? 0 : exponent;
  }
  return far != 0;
}

inline bool encode_any(const uint16_t* items, const Tile& tile, const Lossless& out) {
  constexpr int64_t kLineItems = 32;
  uint16_t tops[kMaxCodecDim] = {};
  for (int64_t t = 0; t < tile.size; ++t) {
    const uint16_t* row = items + t * tile.dim;
    // Prefetches the next head, or the next side.
    const uint16_t* ahead = row + tile.size * tile.dim;
    for (int64_t c = 0; c < tile.dim; c += kLineItems) __builtin_prefetch(ahead + c, 0, 2);
    for (int64_t c = 0; c < tile.dim; ++c) {
      const uint16_t exponent = (row[c] >> 7) & 255;
      tops[c] = tops[c] > exponent ? tops[c] : exponent;
    }
  }
  for (int64_t c = 0; c < tile.dim; ++c) out.tops[c] = static_cast<uint8_t>(tops[c]);
  std::fill_n(out.escapes, kNumEscapes, kUnusedEscape);
  const int64_t half = tile.dim / 2;
  int64_t num_escapes = 0;
  uint8_t deltas[kMaxCodecDim + 64];
  for (int64_t t = 0; t < tile.size; ++t) {
    const uint16_t* row = items + t * tile.dim;
    const bool has_escapes = split_row(row, tops, tile.dim, out.low + t * tile.dim, deltas);
    uint8_t* __restrict nibbles = out.exponents + t * half;
    for (int64_t c = 0; c < half; ++c) {
      nibbles[c] = static_cast<uint8_t>(deltas[c] | (deltas[c + half] << 4));
    }
    if (!has_escapes) continue;
    for (int64_t c = 0; c < tile.dim; ++c) {
      const uint32_t exponent = (row[c] >> 7) & 255;
      if (deltas[c] < 15 || exponent == 0) continue;
      if (num_escapes == kNumEscapes) return false;
      out.escapes[num_escapes++] = static_cast<uint32_t>(t * tile.dim + c) | exponent << 24;
    }
  }
  return true;
}

// Joins half a row: the channels whose distances lie in the 4 bits from kShift on.
template <int kShift>
inline void join_row(const uint8_t* __restrict low, const uint8_t* __restrict nibbles,
                     const uint16_t* __restrict tops, int64_t count, uint16_t* __restrict row) {
  for (int64_t c = 0; c < count; ++c) {
    const uint16_t delta = (nibbles[c] >> kShift) & 15;
    const uint16_t mask = delta == 15 ? 0 : 255, exponent = (tops[c] - delta) & mask;
    row[c] = static_cast<uint16_t>((low[c] & 0x80) << 8 | exponent << 7 | (low[c] & 0x7f));
  }
}

inline void decode_any(const Lossless& in, const Tile& tile, uint16_t* items) {
  const int64_t half = tile.dim / 2;
  uint16_t tops[kMaxCodecDim];
  for (int64_t c = 0; c < tile.dim; ++c) tops[c] = in.tops[c];
  for (int64_t t = 0; t < tile.size; ++t) {
    const uint8_t *low = in.low + t * tile.dim, *nibbles = in.exponents + t * half;
    uint16_t* row = items + t * tile.dim;
    join_row<0>(low, nibbles, tops, half, row);
    join_row<4>(low + half, nibbles, tops + half, half, row + half);
  }
}

inline void put_escapes(const Lossless& in, const Tile& tile, uint16_t* items) {
  for (int64_t i = 0; i < kNumEscapes; ++i) {
    const uint32_t place = in.escapes[i] & 0xffffff;
    // Checked because a record may not be what an encoder wrote.
    if (in.escapes[i] == kUnusedEscape || place >= tile.size * tile.dim) continue;
    const uint32_t exponent = in.escapes[i] >> 24, low = in.low[place];
    items[place] = static_cast<uint16_t>((low & 0x80) << 8 | exponent << 7 | (low & 0x7f));
  }
}

// False if the codec cannot hold the items.
inline bool encode_head(const uint16_t* items, const Tile& tile, const Lossless& out) {
#if defined(__AVX512BW__)
  NoSums no_sums;
  if (tile.dim == 64) return encode_vectors<1>(items, tile, out, no_sums);
  if (tile.dim == 128) return encode_vectors<2>(items, tile, out, no_sums);
  if (tile.dim == 256) return encode_vectors<4>(items, tile, out, no_sums);
#endif
  return encode_any(items, tile, out);
}

inline void decode_head(const Lossless& in, const Tile& tile, uint16_t* items) {
#if defined(__AVX512BW__)
  if (tile.dim == 64) return decode_vectors<1>(in, tile, items);
  if (tile.dim == 128) return decode_vectors<2>(in, tile, items);
  if (tile.dim == 256) return decode_vectors<4>(in, tile, items);
#endif
  decode_any(in, tile, items);
}

// Lossless codes cover all channels of a row: no others lie between them.
inline Lossless lossless_parts(const Side& side, std::byte* layer, int64_t head) {
  const int64_t num_items = side.block_size * side.head_dim;
  const int64_t* parts = side.format.parts;
  return {reinterpret_cast<uint8_t*>(layer + parts[0]) + head * num_items,
          reinterpret_cast<uint8_t*>(layer + parts[1]) + head * num_items / 2,
          reinterpret_cast<uint32_t*>(layer + parts[2]) + head * kNumEscapes,
          reinterpret_cast<uint8_t*>(layer + parts[3]) + head * side.head_dim};
}

inline bool encode_lossless(const Side& side, const std::byte* items, std::byte* layer) {
  const Tile tile = side.tile();
  const auto* numbers = reinterpret_cast<const uint16_t*>(items);
  bool is_good = true;
  for (int64_t head = 0; head < side.num_heads; ++head) {
    is_good &=
        encode_head(numbers + head * tile.size * tile.dim, tile, lossless_parts(side, layer, head));
  }
  return is_good;
}

inline void decode_lossless(const Side& side, const std::byte* layer, std::byte* items) {
  const Tile tile = side.tile();
  auto* numbers = reinterpret_cast<uint16_t*>(items);
  const auto for_each_head = [&](const auto& visit) {
    for (int64_t head = 0; head < side.num_heads; ++head) {
      visit(lossless_parts(side, const_cast<std::byte*>(layer), head),
            numbers + head * tile.size * tile.dim);
    }
  };
  for_each_head([&](const Lossless& in, uint16_t* rows) { decode_head(in, tile, rows); });
  finish_streaming();
  for_each_head([&](const Lossless& in, uint16_t* rows) { put_escapes(in, tile, rows); });
}

}  // namespace
}  // namespace kvkernels
