// A tile of keys and values for the matrix-tile attention: keys are used where they lie, or copied;
// values are interleaved.
#pragma once

#include "cpu/attention_amx_work.h"
#include "cpu/attention_unpack_avx512.h"
#include "cpu/simd_avx512_bf16.h"

namespace kvkernels {
namespace {

// 16 keys as the rows of a tile.
struct KeyRows {
  const uint16_t* first;
  int64_t stride;  // in bytes
};

// Finds the 16 keys of part `part` of the tile. Copies them unless they lie in one block, evenly
// spaced, and all belong to [first, num_keys): other slots are never read.
KeyRows find_keys(const AttentionTile& tile, const Work& work, int64_t part, int64_t first,
                  int64_t num_keys, const int64_t* offsets, int64_t first_slot) {
  const auto* cache = static_cast<const uint16_t*>(tile.args->key_cache);
  const int64_t begin = part * kLanes, block_size = tile.args->block_size;
  const bool is_whole = begin >= first && begin + kLanes <= num_keys;
  if (is_whole && (first_slot + begin) % block_size + kLanes <= block_size) {
    return {cache + offsets[begin],
            tile.args->key_slot_stride * static_cast<int64_t>(sizeof(uint16_t))};
  }
  const int64_t row_bytes = work.head_dim * static_cast<int64_t>(sizeof(uint16_t));
  uint16_t* copy = work.keys + begin * work.head_dim;
  for (int64_t t = 0; t < kLanes; ++t) {
    uint16_t* target = copy + t * work.head_dim;
    if (begin + t < num_keys) {
      std::memcpy(target, cache + offsets[begin + t], row_bytes);
    } else {
      std::memset(target, 0, row_bytes);
    }
  }
  return {copy, row_bytes};
}

// Where the values of a tile of keys lie. Keys that are missing, or lie before [first, num_keys),
// have zeros: all are multiplied, and a weight of 0 times an infinite value would be NaN.
struct ValueRows {
  const uint16_t* row[kKeys];
};

void find_values(const uint16_t* cache, const int64_t* offsets, int64_t first, int64_t num_keys,
                 const Work& work, ValueRows& values) {
  for (int64_t t = 0; t < first; ++t) values.row[t] = work.zeros;
  for (int64_t t = first; t < num_keys; ++t) values.row[t] = cache + offsets[t];
  for (int64_t t = num_keys; t < kKeys; ++t) values.row[t] = work.zeros;
}

// Interleaves 32 channels of two neighbouring values, in pairs.
void interleave(const ValueRows& values, int64_t t, int64_t channel, uint16_t* target) {
  const __m512i a = _mm512_loadu_si512(values.row[t] + channel);
  const __m512i b = _mm512_loadu_si512(values.row[t + 1] + channel);
  _mm512_store_si512(target + t * kLanes, _mm512_unpacklo_epi16(a, b));
  _mm512_store_si512(target + (kKeys + t) * kLanes, _mm512_unpackhi_epi16(a, b));
}

// Interleaves all values of the tile, row after row.
void interleave_values(const ValueRows& values, Work& work) {
  for (int64_t t = 0; t < kKeys; t += 2) {
    for (int64_t i = 0; i < work.value_dim; i += kStep) {
      interleave(values, t, i, work.values + i * kKeys);
    }
  }
}

// Finds or unpacks the keys and values of [begin, end), as far as they belong to the item.
void find_tile(const AttentionTile& tile, int64_t begin, int64_t end, Work& work, KeyRows* keys,
               ValueRows& values) {
  const PagedAttentionArgs& args = *tile.args;
  int64_t key_offsets[kKeys], value_offsets[kKeys];
  const int64_t count = end - begin, first = std::max<int64_t>(tile.key_begin - begin, 0);
  const int64_t row_bytes = work.head_dim * static_cast<int64_t>(sizeof(uint16_t));
  if (lies_plain(tile, begin + first, end)) {
    find_rows(tile, begin + first, end, key_offsets + first, value_offsets + first);
    repeat_first_row(key_offsets, first);
    for (int64_t part = 0; part < kParts; ++part) {
      keys[part] = find_keys(tile, work, part, first, count, key_offsets, begin % args.block_size);
    }
    find_values(static_cast<const uint16_t*>(args.value_cache), value_offsets, first, count, work,
                values);
    return;
  }
  using Unpacker = Avx512Unpacker<RoundedBFloat16>;
  std::memset(work.keys, 0, kKeys * row_bytes);
  unpack_keys<Unpacker>(tile, 0, begin + first, end, work.scales,
                        work.keys + first * work.head_dim);
  for (int64_t part = 0; part < kParts; ++part) {
    keys[part] = {work.keys + part * kLanes * work.head_dim, row_bytes};
  }
  unpack_values<Unpacker>(tile, 0, begin + first, end, work.scales,
                          work.unpacked + first * work.value_dim);
  for (int64_t t = first; t < count; ++t) value_offsets[t] = t * work.value_dim;
  find_values(work.unpacked, value_offsets, first, count, work, values);
}

}  // namespace
}  // namespace kvkernels
