// The memory that a tile of keys occupies, to be prefetched before it is read.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/attention_read_ahead.h"
#include "cpu/attention_unpack.h"

namespace kvkernels {
namespace {

// Contiguous stretches of memory for the first head; those of head h lie h * head_stride bytes
// further.
struct Spans {
  static constexpr int kMaxSpans =
      256;  // enough for 128 keys: rows, or blocks of codes, and their scales

  struct Span {
    const char* data;
    int64_t num_bytes, head_stride;
  };

  int count = 0;
  int64_t num_bytes = 0;  // total, for one head
  Span spans[kMaxSpans];

  void clear() { count = 0, num_bytes = 0; }

  void add(const void* data, int64_t span_bytes, int64_t head_stride) {
    const auto* bytes = static_cast<const char*>(data);
    num_bytes += span_bytes;
    if (count > 0) {
      Span& last = spans[count - 1];
      if (last.data + last.num_bytes == bytes && last.head_stride == head_stride) {
        last.num_bytes += span_bytes;
        return;
      }
    }
    spans[count++] = {bytes, span_bytes, head_stride};
  }
};

// Adds `count` rows of a cache of floats. `item` is an element's size in bytes; strides are in
// elements.
inline void add_float_spans(const void* first, int64_t count, int64_t slot_stride, int64_t dim,
                            int64_t head_stride, int64_t item, Spans& spans) {
  const auto* bytes = static_cast<const char*>(first);
  if (slot_stride == dim) {
    spans.add(bytes, count * dim * item, head_stride * item);
    return;
  }
  for (int64_t t = 0; t < count; ++t) {
    spans.add(bytes + t * slot_stride * item, dim * item, head_stride * item);
  }
}

inline void find_spans(const AttentionTile& tile, int64_t begin, int64_t end, Spans& keys,
                       Spans& values) {
  keys.clear();
  values.clear();
  const PagedAttentionArgs& args = *tile.args;
  const int64_t item = item_bytes(args.cache_dtype), kv_head = tile.kv_head;
  for_each_run(tile, begin, end, [&](const Run& run) {
    const auto [kind, block] = run.block;
    if (kind == BlockKind::kFloat) {
      const int64_t key = block * args.key_block_stride + kv_head * args.key_head_stride +
                          run.slot * args.key_slot_stride;
      const int64_t value = block * args.value_block_stride + kv_head * args.value_head_stride +
                            run.slot * args.value_slot_stride;
      add_float_spans(static_cast<const char*>(args.key_cache) + key * item, run.count,
                      args.key_slot_stride, args.head_dim, args.key_head_stride, item, keys);
      add_float_spans(static_cast<const char*>(args.value_cache) + value * item, run.count,
                      args.value_slot_stride, args.value_dim, args.value_head_stride, item, values);
      return;
    }
    const QuantizedCache& cache = quantized_cache(args, kind);
    const Part key = {cache.key_codes, cache.key_scales};
    const Part value = {cache.value_codes, cache.value_scales};
    const int64_t key_bytes = code_row_bytes(kind, args.head_dim);
    const int64_t value_bytes = code_row_bytes(kind, args.value_dim);
    const int64_t group_size = args.block_size / cache.key_groups;
    const int64_t group = run.slot / group_size;
    const int64_t num_groups = (run.slot + run.count - 1) / group_size - group + 1;
    keys.add(key.scales_of(block, kv_head) + 2 * group * args.head_dim,
             4 * num_groups * args.head_dim, 2 * key.scales.head_stride);
    keys.add(key.codes_of(block, kv_head) + run.slot * key_bytes, run.count * key_bytes,
             key.codes.head_stride);
    values.add(value.codes_of(block, kv_head) + run.slot * value_bytes, run.count * value_bytes,
               value.codes.head_stride);
    values.add(value.scales_of(block, kv_head) + 2 * run.slot * cache.value_groups,
               4 * run.count * cache.value_groups, 2 * value.scales.head_stride);
  });
}

// Prefetches what an item reads, in the order of reading and ahead of the reader, line by line.
// Hardware prefetch stops at the end of each 4 KiB page and cannot guess the next block, but it
// follows where these requests lead. They go to the L2 cache where requests to the L1 cache would
// compete for its few buffers for misses (one core of Zen 4 decoded bfloat16 at 11 GB/s with L1, at
// 19 with L2), and to the L1 cache where it has plenty of those (one core of Zen 5: 30 GB/s with
// L1, 27 with L2).
class Prefetch : public ReadAhead {
 public:
  // Bytes ahead of the reader: enough to keep the buffers for misses full. With 32 KiB two cores of
  // Zen 4 decoded a tenth slower, with 8 KiB as fast.
  static constexpr int64_t kLead = 12 << 10;
  static constexpr int64_t kSecondLead =
      6 << 10;  // of the second request; on Zen 5 anything from 4 to 8 KiB did as well

  // Args: lead, in bytes: how far ahead of the reader it may ask.
  explicit Prefetch(int64_t lead = kLead, bool asks_twice = false)
      : ReadAhead{asks_twice, {lead}, {kSecondLead}} {}

  // Not copied, since `segments` points into its own vector.
  Prefetch(const Prefetch&) = delete;
  Prefetch& operator=(const Prefetch&) = delete;

  // Sets the lead of a prefetcher that asks for each line once. To be called before the reader
  // begins.
  void set_lead(int64_t lead) { first.room = lead; }

  // Appends the tile that will be read after all those added before: the keys of all heads, then
  // their values.
  void add_tile(const Spans& keys, const Spans& values, int64_t num_heads) {
    if (!asks_twice) second.next = first.next;
    const size_t num_done = std::min(first.next, second.next);
    own_segments_.erase(own_segments_.begin(), own_segments_.begin() + num_done);
    first.next -= num_done;
    second.next -= num_done;
    const size_t num_left = own_segments_.size();
    own_segments_.resize(num_left + num_heads * (keys.count + values.count));
    Segment* segment = own_segments_.data() + num_left;
    for (const Spans* spans : {&keys, &values}) {
      for (int64_t head = 0; head < num_heads; ++head) {
        for (int i = 0; i < spans->count; ++i) {
          const Spans::Span& span = spans->spans[i];
          *segment++ = {span.data + head * span.head_stride, span.num_bytes};
        }
      }
    }
    segments = own_segments_.data();
    num_segments = own_segments_.size();
  }

  // Says that the reader begins with the next `num_bytes`. Asks for whatever it should have asked
  // for by now and has not.
  void begin(int64_t num_bytes) {
    advance_cursor(*this, first, first.room);
    if (asks_twice) advance_cursor(*this, second, second.room);
    first.room += num_bytes;
    second.room += num_bytes;
  }

 private:
  std::vector<Segment> own_segments_;
};

// How many bytes of the next tile, in whole lines, to ask for with each of `num_parts` pieces of
// work on this one. With many rows a tile is worked on long after it has been read; the next one,
// read only then, would be slow, but asked for bit by bit it has arrived. Two cores of Zen 5 took
// 15 to 30 % less time that way for 64 to 1,024 rows a head.
inline int64_t share_of_bytes(int64_t tile_bytes, int64_t num_parts) {
  return (tile_bytes / 64 / num_parts + 1) * 64;
}

// How many of a tile's keys to add values of at a time. Values are added a few channels at a time,
// over all keys of such a part, so all of its memory is touched long before the part is done, and
// must have been asked for (with whole tiles as parts, decode at head_dim 256 took a third longer).
inline int64_t keys_of_part(int64_t value_bytes, int64_t tile_keys) {
  constexpr int64_t kPartBytes = 8 << 10;
  static_assert(kPartBytes < Prefetch::kLead);
  return std::clamp<int64_t>(kPartBytes / value_bytes / 16 * 16, 16, tile_keys);
}

// The elements of a row of a tile's query. Prefetches those of the row 16 rows on: rows of
// neighbouring tokens lie pages apart, and without requests each would be waited for (prefill of
// 512 tokens took 15 % longer on Zen 5).
template <typename Item>
[[gnu::always_inline]] inline const Item* read_query(const AttentionTile& tile, int64_t row) {
  constexpr int64_t kLead = 16;
  const auto* query = static_cast<const Item*>(tile.args->query);
  if (row + kLead < tile.row_end) {
    prefetch_lines(query + query_offset(tile, row + kLead), tile.args->head_dim * sizeof(Item));
  }
  return query + query_offset(tile, row);
}

// Appends the first keys of the tile that this thread works on next: memory stays busy while one
// item ends and the next begins.
inline void add_next(const AttentionTile& tile, int64_t tile_keys, Prefetch& all) {
  if (tile.next == nullptr) return;
  const AttentionTile& next = *tile.next;
  const int64_t end = key_tile_end(next, next.key_begin, tile_keys);
  Spans keys, values;
  find_spans(next, next.key_begin, end, keys, values);
  values.clear();
  all.add_tile(keys, values, next.num_kv_heads);
}

// Appends all that an item reads if it goes through the keys of one head after the other,
// `tile_keys` at a time, up to multiples of that. Returns the bytes of the largest such tile: codes
// take fewer than floats.
inline int64_t plan_reading(const AttentionTile& tile, int64_t tile_keys, Prefetch& all) {
  Spans keys, values;
  int64_t most = 0;
  for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
    AttentionTile one = tile;
    one.kv_head += head;
    for (int64_t begin = tile.key_begin, end; begin < tile.key_end; begin = end) {
      end = key_tile_end(tile, begin, tile_keys);
      find_spans(one, begin, end, keys, values);
      all.add_tile(keys, values, 1);
      most = std::max(most, keys.num_bytes + values.num_bytes);
    }
  }
  add_next(tile, tile_keys, all);
  return most;
}

}  // namespace
}  // namespace kvkernels
