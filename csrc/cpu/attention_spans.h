// The memory that a tile of keys takes, to be asked for before it is read.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/attention_unpack.h"
#include "cpu/prefetch_line.h"

namespace kvkernels {
namespace {

// Stretches of memory of the first head; the same of head h lie h * head_stride further.
struct Spans {
  static constexpr int kMaxSpans = 256;  // of 128 keys: rows or blocks of codes, and their scales

  struct Span {
    const char* data;
    int64_t num_bytes, head_stride;
  };

  int count = 0;
  int64_t num_bytes = 0;  // of one head
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

inline int64_t item_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8 ? 1 : 2;
}

// Rows of a cache of floats.
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

// How a reader's lines are asked for: how often, and into which cache.
enum class Asking { kOnceL1, kOnceL2, kTwiceL1 };

// What an item reads, in the order of reading, asked for ahead of the reader, line after line:
// hardware prefetch stops at the end of each 4 KiB page and cannot guess the next block, but it
// follows where these requests lead. They go to the L2 cache where those to the L1 cache would
// share its few buffers for misses (one core of Zen 4 decoded bfloat16 at 11 GB/s that way, at 19
// so), and to the L1 cache where it has plenty (one core of Zen 5: 30 GB/s that way, 27 so).
//
// Zen 5 drops requests while its buffers are full: one core can ask for lines of memory at 80 GB/s
// and gets 38. There a line may be asked for twice, and what was dropped is there in time: one core
// took 15 to 28 % less time to decode bfloat16 so, two 6 to 15 %; int8 7 %; int4 4 % more.
class Prefetch {
 public:
  // Enough to keep the buffers for misses full. With 32 KiB two cores of Zen 4 decoded a tenth
  // slower, with 8 KiB as fast.
  static constexpr int64_t kLead = 12 << 10;
  static constexpr int64_t kSecondLead = 6 << 10;  // on Zen 5 anything from 4 to 8 KiB

  // Lines that a reader asks for as it goes: a burst of requests fills the buffers for misses, and
  // what is read then waits for one. How they are asked for is part of the type: branches for each
  // line took 4 to 8 % of decode's time on Zen 5 where memory was fast.
  template <Asking kAsking>
  struct Lines {
    static constexpr CacheLevel kLevel =
        kAsking == Asking::kOnceL2 ? CacheLevel::kL2 : CacheLevel::kL1;

    const char *first, *second;

    template <int64_t kBytes>
    [[gnu::always_inline]] void ask() {
      ask<kBytes>(first);
      if constexpr (kAsking == Asking::kTwiceL1) ask<kBytes>(second);
    }

   private:
    template <int64_t kBytes>
    [[gnu::always_inline]] static void ask(const char*& lines) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kBytes; i += 64) prefetch_line<kLevel>(lines + i);
      lines += kBytes;
    }
  };

  // Args: lead, how far ahead of the reader, in bytes, and no further.
  explicit Prefetch(int64_t lead = kLead, bool asks_twice = false)
      : asks_twice_(asks_twice), first_{lead}, second_{kSecondLead} {}

  // Of who asks once, before the reader begins.
  void set_lead(int64_t lead) { first_.room = lead; }

  // The tile that will be read after all those added before: the keys of all heads, then the
  // values.
  void add_tile(const Spans& keys, const Spans& values, int64_t num_heads) {
    if (!asks_twice_) second_.next = first_.next;
    const size_t num_done = std::min(first_.next, second_.next);
    segments_.erase(segments_.begin(), segments_.begin() + num_done);
    first_.next -= num_done;
    second_.next -= num_done;
    for (const Spans* spans : {&keys, &values}) {
      for (int64_t head = 0; head < num_heads; ++head) {
        for (int i = 0; i < spans->count; ++i) {
          const Spans::Span& span = spans->spans[i];
          segments_.push_back({span.data + head * span.head_stride, span.num_bytes});
        }
      }
    }
  }

  // The reader begins with the next `num_bytes`. What it should have asked for by now and has not,
  // is.
  void begin(int64_t num_bytes) {
    advance(first_, first_.room);
    if (asks_twice_) advance(second_, second_.room);
    first_.room += num_bytes;
    second_.room += num_bytes;
  }

  Asking asking() const {
    if (asks_twice_) return Asking::kTwiceL1;
    return kPrefetchesToL1 ? Asking::kOnceL1 : Asking::kOnceL2;
  }

  // As advance(), for a reader that will ask itself for the next `num_bytes`. Where they are not in
  // one piece they are asked for here, and the reader's are those from `instead` on, which it reads
  // now.
  template <Asking kAsking>
  Lines<kAsking> take(int64_t num_bytes, const void* instead) {
    const char *first = take(first_, num_bytes), *second = nullptr;
    if constexpr (kAsking == Asking::kTwiceL1) second = take(second_, num_bytes);
    const auto* read = static_cast<const char*>(instead);
    return {first != nullptr ? first : read, second != nullptr ? second : read};
  }

  // Asks for the next `num_bytes`, but not for what lies further ahead of the reader than it may.
  void advance(int64_t num_bytes) {
    advance(first_, num_bytes);
    if (asks_twice_) advance(second_, num_bytes);
  }

 private:
  struct Segment {
    const char* data;
    int64_t num_bytes;
  };

  struct Cursor {
    int64_t room;     // how much more may be asked for: the lead, before the reader begins
    size_t next = 0;  // among the segments
    const char* line = nullptr;
    int64_t left = 0;  // of the segment that `line` lies in

    void pass(int64_t num_bytes) {
      line += num_bytes;
      left -= num_bytes;
      room -= num_bytes;
    }
  };

  bool begin_segment(Cursor& cursor) {
    if (cursor.next == segments_.size()) return false;
    cursor.line = segments_[cursor.next].data;
    cursor.left = segments_[cursor.next].num_bytes;
    ++cursor.next;
    return true;
  }

  [[gnu::always_inline]] const char* take(Cursor& cursor, int64_t num_bytes) {
    if (num_bytes <= std::min(cursor.left, cursor.room)) {
      const char* lines = cursor.line;
      cursor.pass(num_bytes);
      return lines;
    }
    return take_rarely(cursor, num_bytes);
  }

  // Where a segment ends, or the reader may not ask for more.
  [[gnu::noinline]] const char* take_rarely(Cursor& cursor, int64_t num_bytes) {
    if (num_bytes <= cursor.room && cursor.left <= 0 && begin_segment(cursor) &&
        num_bytes <= cursor.left) {
      const char* lines = cursor.line;
      cursor.pass(num_bytes);
      return lines;
    }
    advance(cursor, num_bytes);
    return nullptr;
  }

  void advance(Cursor& cursor, int64_t num_bytes) {
    num_bytes = std::min(num_bytes, cursor.room);
    while (num_bytes > 0) {
      if (cursor.left <= 0 && !begin_segment(cursor)) return;
      const int64_t part = std::min(cursor.left, num_bytes);
      prefetch_lines(cursor.line, part);
      cursor.pass(part);
      num_bytes -= part;
    }
  }

  bool asks_twice_;
  std::vector<Segment> segments_;
  Cursor first_, second_;
};

// Calls `work` with the constant that says how `next` asks.
template <typename Work>
inline void with_asking(const Prefetch& next, const Work& work) {
  switch (next.asking()) {
    case Asking::kOnceL1:
      return work(std::integral_constant<Asking, Asking::kOnceL1>());
    case Asking::kOnceL2:
      return work(std::integral_constant<Asking, Asking::kOnceL2>());
    case Asking::kTwiceL1:
      return work(std::integral_constant<Asking, Asking::kTwiceL1>());
  }
}

// Of a tile's bytes, in whole lines, those to ask for with each of `num_parts` pieces of work. Many
// rows keep a processor busy long after their tile has been read, and reading the next one at once
// is then slow: asked for bit by bit it has come. Two cores of Zen 5 took 15 to 30 % less time for
// 64 to 1,024 rows a head so.
inline int64_t share_of_bytes(int64_t tile_bytes, int64_t num_parts) {
  return (tile_bytes / 64 / num_parts + 1) * 64;
}

// How many of a tile's keys to add values of before the next: that goes a few channels at a time,
// so all of a part is read long before its end, and should have been asked for (with whole tiles
// decode at d 256 took a third longer).
inline int64_t keys_of_part(int64_t value_bytes, int64_t tile_keys) {
  constexpr int64_t kPartBytes = 8 << 10;
  static_assert(kPartBytes < Prefetch::kLead);
  return std::clamp<int64_t>(kPartBytes / value_bytes / 16 * 16, 16, tile_keys);
}

// The first keys of what the thread turns to after this tile: memory then has something to do while
// one item ends and the next begins.
inline void add_next(const AttentionTile& tile, int64_t tile_keys, Prefetch& all) {
  if (tile.next == nullptr) return;
  const AttentionTile& next = *tile.next;
  const int64_t end = (next.key_begin / tile_keys + 1) * tile_keys;
  Spans keys, values;
  find_spans(next, next.key_begin, std::min(end, next.key_end), keys, values);
  values.clear();
  all.add_tile(keys, values, next.num_kv_heads);
}

// All that an item reads that goes through the keys of one head after the other, so many keys at a
// time, up to multiples of that. Returns the most bytes that such a tile has: codes take fewer than
// floats.
inline int64_t plan_reading(const AttentionTile& tile, int64_t tile_keys, Prefetch& all) {
  Spans keys, values;
  int64_t most = 0;
  for (int64_t head = 0; head < tile.num_kv_heads; ++head) {
    AttentionTile one = tile;
    one.kv_head += head;
    for (int64_t begin = tile.key_begin, end; begin < tile.key_end; begin = end) {
      end = std::min((begin / tile_keys + 1) * tile_keys, tile.key_end);
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
