// Codecs: turn blocks of the pool into payloads of records and back, with the checksums of every
// layer. kvkernels/reference/codecs.py says what the bytes mean; every path writes the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvkernels/attention.h"
#include "kvkernels/checksum.h"

namespace kvkernels {

constexpr int64_t kNumEscapes = 16;  // per head, for keys and for values: exponents listed apart
constexpr uint32_t kUnusedEscape = 0xffffffff;
constexpr int64_t kRawBits = 16, kLosslessBits = 12;

// How one side of a layer is written: its keys, its values, or a part of its latents (MLA). Offsets
// are in bytes from the layer's start.
struct SideFormat {
  int64_t plane, first_channel, num_channels;  // in the pool; values use all channels
  int64_t is_key;      // 1: neighbouring tokens of a channel share a scale; 0: channels of a token
  int64_t bits;        // of a code; kRawBits: copied; kLosslessBits: bfloat16 without loss
  int64_t num_groups;  // groups that share a scale: of tokens (keys), of channels (values)
  // Offsets in bytes. raw: items; codes: codes, scales; lossless: low, exponents, escapes, tops.
  int64_t parts[4];
};

constexpr int64_t kMaxSides = 2;

struct LayerFormat {  // one row of the table that Python hands over, field by field
  int64_t offset, num_bytes, num_sides;
  SideFormat sides[kMaxSides];
};
static_assert(sizeof(LayerFormat) == 23 * sizeof(int64_t));

struct CodecArgs {
  // [blocks, num_layers, num_planes, num_heads, block_size, head_dim]; each block's layers are
  // contiguous. Memory is the caller's, here and below.
  std::byte* pool;
  int64_t block_stride;  // in bytes
  int64_t num_layers, num_planes, num_heads, block_size, head_dim;
  DType dtype;
  const int64_t* block_ids;  // [num_blocks], in range
  int64_t num_blocks;
  const LayerFormat* layers;  // [num_layers]
  std::byte* payloads;        // [num_blocks, payload_stride]
  int64_t payload_stride;
  // [num_blocks, num_layers]: checksums of each layer's bytes. encode_blocks writes them unless
  // this is null; decode_blocks compares with them.
  WordSums* sums;
  // [num_blocks, num_layers], written. encode_blocks: whether the codec can hold the layer (if not,
  // its payload is unspecified). decode_blocks: whether its bytes agree with `sums`; a layer that
  // does not is left as it was in the pool.
  uint8_t* is_good;
};

// Writes the payloads of blocks of the pool, with zeros between the sides of a layer and after the
// last; also `is_good`, and `sums` unless that is null. Formats, ids and sizes are the caller's to
// check. `path` as in paged_attention.
void encode_blocks(const CodecArgs& args, AttentionPath path, int num_threads);

// Checks every layer of the payloads against `sums`, writes it to its block of the pool if it
// agrees, and says so in `is_good`. Payloads may hold any bytes: nothing outside of their blocks is
// written.
void decode_blocks(const CodecArgs& args, AttentionPath path, int num_threads);

}  // namespace kvkernels
