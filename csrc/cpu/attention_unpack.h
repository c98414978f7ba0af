// Turns keys and values of any kind of block into dense rows of one element type.
//
// The instruction set's part is a template parameter U, a class with
//   Item                                          the type of an element of a row
//   widen_scales(pairs, count, scales, minimums)  `count` pairs of float16 to two arrays of floats
//   scale_bytes(codes, dim, scales, row)          row[i] = minimum(i) + scale(i) * code i
//   scale_nibbles(codes, dim, scales, row)        the same for 4-bit codes, two a byte
//   convert(cache, dtype, offset, dim, row)       converts a row of a cache of floats
// where `scales` is a ChannelScales or a GroupScales.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/attention_rows.h"

namespace kvkernels {
namespace {

// The keys', or the values', arrays of a quantised cache.
struct Part {
  const CachePart<uint8_t>& codes;
  const CachePart<uint16_t>& scales;

  const uint8_t* codes_of(int64_t block, int64_t kv_head) const {
    return codes.data + block * codes.block_stride + kv_head * codes.head_stride;
  }
  const uint16_t* scales_of(int64_t block, int64_t kv_head) const {
    return scales.data + block * scales.block_stride + kv_head * scales.head_stride;
  }
};

inline const QuantizedCache& quantized_cache(const PagedAttentionArgs& args, BlockKind kind) {
  return kind == BlockKind::kInt4 ? args.int4 : args.int8;
}

inline int64_t code_row_bytes(BlockKind kind, int64_t dim) {
  return kind == BlockKind::kInt4 ? dim / 2 : dim;
}

// Scales with one entry per channel.
struct ChannelScales {
  const float *scales, *minimums;

  float scale(int64_t channel) const { return scales[channel]; }
  float minimum(int64_t channel) const { return minimums[channel]; }
};

// Maps channels to groups that share their scales, where groups are multiples of kSize channels.
class ChannelGroups {
 public:
  static constexpr int64_t kSize = 16;

  // False where a group is not a multiple of kSize channels, or where a row is not one, or with
  // 4-bit codes, whose bytes hold channels of both halves of the row, half a row.
  bool find(int64_t dim, int64_t groups, BlockKind kind) {
    const int64_t group_size = dim / groups, unit = kind == BlockKind::kInt4 ? 2 * kSize : kSize;
    if (group_size % kSize != 0 || dim % unit != 0 || dim > kMaxDim) return false;
    for (int64_t i = 0; i < dim; i += kSize) group_of_[i / kSize] = i / group_size;
    return true;
  }

  int64_t operator[](int64_t channel) const { return group_of_[channel / kSize]; }

 private:
  static constexpr int64_t kMaxDim = 1024;
  std::array<int64_t, kMaxDim / kSize> group_of_;
};

// Scales with one entry per group.
struct GroupScales {
  const float *scales, *minimums;
  const ChannelGroups& groups;

  float scale(int64_t channel) const { return scales[groups[channel]]; }
  float minimum(int64_t channel) const { return minimums[groups[channel]]; }
};

template <typename U, typename Scales>
void scale_row(BlockKind kind, const uint8_t* codes, int64_t dim, const Scales& scales,
               typename U::Item* row) {
  if (kind == BlockKind::kInt4) {
    U::scale_nibbles(codes, dim, scales, row);
  } else {
    U::scale_bytes(codes, dim, scales, row);
  }
}

template <typename U>
void unpack_key_run(const AttentionTile& tile, int64_t kv_head, const Run& run, float* scratch,
                    typename U::Item* row) {
  const PagedAttentionArgs& args = *tile.args;
  const int64_t dim = args.head_dim, row_bytes = code_row_bytes(run.block.kind, dim);
  const QuantizedCache& cache = quantized_cache(args, run.block.kind);
  const Part part = {cache.key_codes, cache.key_scales};
  const uint8_t* codes = part.codes_of(run.block.id, kv_head);
  const uint16_t* pairs = part.scales_of(run.block.id, kv_head);
  const int64_t group_size = args.block_size / cache.key_groups;
  float *scales = scratch, *minimums = scratch + dim;
  for (int64_t slot = run.slot; slot < run.slot + run.count; ++slot, row += dim) {
    if (slot == run.slot || slot % group_size == 0) {
      U::widen_scales(pairs + slot / group_size * dim * 2, dim, scales, minimums);
    }
    scale_row<U>(run.block.kind, codes + slot * row_bytes, dim, ChannelScales{scales, minimums},
                 row);
  }
}

template <typename U>
void unpack_value_run(const AttentionTile& tile, int64_t kv_head, const Run& run, float* scratch,
                      typename U::Item* row) {
  const PagedAttentionArgs& args = *tile.args;
  const int64_t dim = args.value_dim, row_bytes = code_row_bytes(run.block.kind, dim);
  const QuantizedCache& cache = quantized_cache(args, run.block.kind);
  const Part part = {cache.value_codes, cache.value_scales};
  const uint8_t* codes = part.codes_of(run.block.id, kv_head);
  const uint16_t* pairs = part.scales_of(run.block.id, kv_head);
  const int64_t groups = cache.value_groups, group_size = dim / groups;
  const int64_t end = run.slot + run.count;
  float *scales = scratch, *minimums = scratch + dim;
  ChannelGroups shared;
  if (!shared.find(dim, groups, run.block.kind)) {
    for (int64_t slot = run.slot; slot < end; ++slot, row += dim) {
      for (int64_t group = 0; group < groups; ++group) {
        float scale, minimum;
        U::widen_scales(pairs + (slot * groups + group) * 2, 1, &scale, &minimum);
        std::fill_n(scales + group * group_size, group_size, scale);
        std::fill_n(minimums + group * group_size, group_size, minimum);
      }
      scale_row<U>(run.block.kind, codes + slot * row_bytes, dim, ChannelScales{scales, minimums},
                   row);
    }
    return;
  }
  // `scratch` has room for the scales of group_size tokens at a time.
  for (int64_t first = run.slot; first < end; first += group_size) {
    const int64_t count = std::min(group_size, end - first);
    U::widen_scales(pairs + first * groups * 2, count * groups, scales, minimums);
    for (int64_t t = 0; t < count; ++t, row += dim) {
      scale_row<U>(run.block.kind, codes + (first + t) * row_bytes, dim,
                   GroupScales{scales + t * groups, minimums + t * groups, shared}, row);
    }
  }
}

// Unpacks the keys [begin, end) of one of the tile's heads to dense rows of head_dim. `scratch` has
// room for two rows of floats.
template <typename U>
void unpack_keys(const AttentionTile& tile, int64_t head, int64_t begin, int64_t end,
                 float* scratch, typename U::Item* rows) {
  const PagedAttentionArgs& args = *tile.args;
  const int64_t kv_head = tile.kv_head + head, dim = args.head_dim;
  for_each_run(tile, begin, end, [&](const Run& run) {
    auto* row = rows + run.first * dim;
    if (run.block.kind != BlockKind::kFloat) {
      unpack_key_run<U>(tile, kv_head, run, scratch, row);
      return;
    }
    int64_t offset = run.block.id * args.key_block_stride + kv_head * args.key_head_stride +
                     run.slot * args.key_slot_stride;
    for (int64_t t = 0; t < run.count; ++t, row += dim, offset += args.key_slot_stride) {
      U::convert(args.key_cache, args.cache_dtype, offset, dim, row);
    }
  });
}

// The same for values, rows of value_dim.
template <typename U>
void unpack_values(const AttentionTile& tile, int64_t head, int64_t begin, int64_t end,
                   float* scratch, typename U::Item* rows) {
  const PagedAttentionArgs& args = *tile.args;
  const int64_t kv_head = tile.kv_head + head, dim = args.value_dim;
  for_each_run(tile, begin, end, [&](const Run& run) {
    auto* row = rows + run.first * dim;
    if (run.block.kind != BlockKind::kFloat) {
      unpack_value_run<U>(tile, kv_head, run, scratch, row);
      return;
    }
    int64_t offset = run.block.id * args.value_block_stride + kv_head * args.value_head_stride +
                     run.slot * args.value_slot_stride;
    for (int64_t t = 0; t < run.count; ++t, row += dim, offset += args.value_slot_stride) {
      U::convert(args.value_cache, args.cache_dtype, offset, dim, row);
    }
  });
}

}  // namespace
}  // namespace kvkernels
