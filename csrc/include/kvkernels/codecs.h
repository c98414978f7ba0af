// Codecs: blocks of the pool to payloads of records and back, with the checksums of every layer.
// kvkernels/reference/codecs.py says what the bytes mean; every path writes the same.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvkernels/attention.h"
#include "kvkernels/checksum.h"

namespace kvkernels {

constexpr int64_t kNumEscapes = 16;  // of each head and side, of lossless codes
constexpr uint32_t kUnusedEscape = 0xffffffff;
constexpr int64_t kRawBits = 16, kLosslessBits = 12;

// How one side of a layer is written: its keys, its values, or a part of its latents. Offsets are
// from the layer's start.
struct SideFormat {
  int64_t plane, first_channel, num_channels;  // where in the pool; of values, all channels
  int64_t is_key;      // whether tokens of a channel share a scale, or channels of a token
  int64_t bits;        // of a code; kRawBits: as they are; kLosslessBits: bfloat16 without loss
  int64_t num_groups;  // of tokens for keys, of channels for values
  int64_t parts[4];    // raw: items; codes: codes, scales; lossless: low, exponents, escapes, tops
};

constexpr int64_t kMaxSides = 2;

struct LayerFormat {  // as Python's table has it
  int64_t offset, num_bytes, num_sides;
  SideFormat sides[kMaxSides];
};
static_assert(sizeof(LayerFormat) == 23 * sizeof(int64_t));

struct CodecArgs {
  // [.., num_layers, num_planes, num_heads, block_size, head_dim], layers in one piece
  std::byte* pool;
  int64_t block_stride;  // in bytes
  int64_t num_layers, num_planes, num_heads, block_size, head_dim;
  DType dtype;
  const int64_t* block_ids;  // [num_blocks], in range
  int64_t num_blocks;
  const LayerFormat* layers;  // [num_layers]
  std::byte* payloads;        // [num_blocks, payload_stride]
  int64_t payload_stride;
  // [num_blocks, num_layers], of a layer's bytes; encode: null to leave them out.
  WordSums* sums;
  // [num_blocks, num_layers]. encode: whether the codec holds the layer; decode: whether its bytes
  // are those of `sums`, and so were written to the pool.
  uint8_t* is_good;
};

void encode_blocks(const CodecArgs& args, AttentionPath path, int num_threads);
void decode_blocks(const CodecArgs& args, AttentionPath path, int num_threads);

}  // namespace kvkernels
