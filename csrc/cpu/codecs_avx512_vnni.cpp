// Encodes lossless codes and sums what is written in one pass: the sums are taken from registers,
// while the encoder waits for memory.
#include <algorithm>

#include "cpu/checksum_sums_avx512_vnni.h"
#include "cpu/codec_lossless.h"

namespace kvkernels {
namespace {

using avx512_vnni::ByteSums;

// A Sums (see encode_rows) over neighbouring heads: of signs and mantissas, and of distances. A row
// is a group of ByteSums.
struct RowSums {
  static constexpr bool kMayStream = true;
  ByteSums low, nibbles;

  void begin_row() {
    low.begin_group();
    nibbles.begin_group();
  }
  void take_low(__m512i bytes, int vector) { low.take(bytes, vector); }
  void take_nibbles(__m512i bytes, int vector) { nibbles.take(bytes, vector); }
};

// So that sums stay within 32 bits: a row of 256 channels adds at most 4 * 4 * 255 to each lane of
// `low.first`, and this many rows add less than 2^32 to `low.outer`.
constexpr int64_t kMostRows = 1024;

template <int kVectors>
bool encode_with_sums(const Side& side, const std::byte* items, std::byte* layer, WordSums& sums) {
  constexpr int64_t kRowBytes = kVectors * kVectorChannels;
  const Tile tile = side.tile();
  const auto* numbers = reinterpret_cast<const uint16_t*>(items);
  const int64_t most_heads = kMostRows / side.block_size;
  bool is_good = true;
  for (int64_t first = 0; first < side.num_heads; first += most_heads) {
    const int64_t last = std::min(first + most_heads, side.num_heads);
    RowSums rows;
    for (int64_t head = first; head < last; ++head) {
      is_good &= encode_vectors<kVectors>(numbers + head * tile.size * tile.dim, tile,
                                          lossless_parts(side, layer, head), rows);
    }
    const int64_t num_rows = (last - first) * tile.size, first_byte = first * tile.size * kRowBytes;
    append_sums(rows.low.finish(num_rows, kRowBytes / 4), (side.format.parts[0] + first_byte) / 4,
                sums);
    append_sums(rows.nibbles.finish(num_rows, kRowBytes / 8),
                (side.format.parts[1] + first_byte / 2) / 4, sums);
  }
  finish_streaming();
  const int64_t rest = side.format.parts[2];
  append_sums(checksum_words(layer + rest, side.lossless_end() - rest), rest / 4, sums);
  return is_good;
}

bool can_sum(const Side& side) {
  const int64_t dim = side.format.num_channels;
  return side.format.bits == kLosslessBits && side.block_size <= kMostRows &&
         (dim == 64 || dim == 128 || dim == 256);
}

bool encode_and_sum(const Side& side, const std::byte* items, std::byte* layer, WordSums& sums) {
  switch (side.format.num_channels) {
    case 64:
      return encode_with_sums<1>(side, items, layer, sums);
    case 128:
      return encode_with_sums<2>(side, items, layer, sums);
    default:
      return encode_with_sums<4>(side, items, layer, sums);
  }
}

}  // namespace

CodecKernels avx512_vnni_codec_kernels(DType dtype) {
  CodecKernels kernels = avx512_codec_kernels(dtype);
  kernels.can_sum = can_sum;
  kernels.encode_and_sum = encode_and_sum;
  return kernels;
}

}  // namespace kvkernels
