// Prefetching by kernels that read keys and values: what has been asked for, and what comes next.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/prefetch_line.h"

namespace kvkernels {

// How often a line is asked for, and into which cache.
enum class Asking { kOnceL1, kOnceL2, kTwiceL1 };

// Lines that a kernel asks for as it goes, a few with each vector that it reads. A burst of
// requests would fill the buffers for misses, and reads would then wait for one (with bursts of 2
// and 4 KiB, decode of int8 took 15 % longer on two cores of Zen 5 that read 45 GB/s, 4 % longer at
// 70). How lines are asked for is part of the type: branches for each line took 4 to 8 % of
// decode's time there where memory was fast.
template <Asking kAsking>
struct LinesAhead {
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

// Memory in the order of reading, and up to where it has been asked for. Files that are compiled
// for different instruction sets pass this to each other, so its members are always inlined: no
// copy of one is left that the linker could take for all.
//
// Zen 5 drops requests while its buffers are full: one core can ask for lines of memory at 80 GB/s
// and gets 38. There a line may be asked for twice, and what was dropped the first time still
// arrives early enough: decode of bfloat16 took 15 to 28 % less time on one core, 6 to 15 % on two;
// int8 took 7 % less, int4 4 % more.
struct ReadAhead {
  struct Segment {
    const char* data;
    int64_t num_bytes;
  };

  struct Cursor {
    int64_t room;     // bytes that may still be asked for: the lead, before the reader begins
    size_t next = 0;  // next of the segments
    const char* line = nullptr;
    int64_t left = 0;  // bytes left of the segment that `line` lies in

    [[gnu::always_inline]] void pass(int64_t num_bytes) {
      line += num_bytes;
      left -= num_bytes;
      room -= num_bytes;
    }
  };

  bool asks_twice;
  Cursor first, second;
  const Segment* segments = nullptr;
  size_t num_segments = 0;

  // As advance(), for a kernel that asks for the next `num_bytes` itself, by LinesAhead. Where they
  // are not contiguous they are asked for here, and the kernel is given the lines from `instead`
  // on, which it is about to read anyway.
  template <Asking kAsking>
  [[gnu::always_inline]] LinesAhead<kAsking> take(int64_t num_bytes, const void* instead);

  // Asks for the next `num_bytes`, but never for what lies further ahead of the reader than the
  // lead.
  [[gnu::always_inline]] void advance(int64_t num_bytes);

  [[gnu::always_inline]] Asking asking() const {
    if (asks_twice) return Asking::kTwiceL1;
    return kPrefetchesToL1 ? Asking::kOnceL1 : Asking::kOnceL2;
  }
};

static inline bool begin_segment(const ReadAhead& all, ReadAhead::Cursor& cursor) {
  if (cursor.next == all.num_segments) return false;
  cursor.line = all.segments[cursor.next].data;
  cursor.left = all.segments[cursor.next].num_bytes;
  ++cursor.next;
  return true;
}

static inline void advance_cursor(const ReadAhead& all, ReadAhead::Cursor& cursor,
                                  int64_t num_bytes) {
  num_bytes = std::min(num_bytes, cursor.room);
  while (num_bytes > 0) {
    if (cursor.left <= 0 && !begin_segment(all, cursor)) return;
    const int64_t part = std::min(cursor.left, num_bytes);
    prefetch_lines(cursor.line, part);
    cursor.pass(part);
    num_bytes -= part;
  }
}

// The rare case of take_lines: a segment ends, or the reader may not ask for more.
[[gnu::noinline, maybe_unused]] static const char* take_rarely(const ReadAhead& all,
                                                               ReadAhead::Cursor& cursor,
                                                               int64_t num_bytes) {
  if (num_bytes <= cursor.room && cursor.left <= 0 && begin_segment(all, cursor) &&
      num_bytes <= cursor.left) {
    const char* lines = cursor.line;
    cursor.pass(num_bytes);
    return lines;
  }
  advance_cursor(all, cursor, num_bytes);
  return nullptr;
}

[[gnu::always_inline]] static inline const char* take_lines(const ReadAhead& all,
                                                            ReadAhead::Cursor& cursor,
                                                            int64_t num_bytes) {
  if (num_bytes <= std::min(cursor.left, cursor.room)) {
    const char* lines = cursor.line;
    cursor.pass(num_bytes);
    return lines;
  }
  return take_rarely(all, cursor, num_bytes);
}

template <Asking kAsking>
inline LinesAhead<kAsking> ReadAhead::take(int64_t num_bytes, const void* instead) {
  const char *from_first = take_lines(*this, first, num_bytes), *from_second = nullptr;
  if constexpr (kAsking == Asking::kTwiceL1) from_second = take_lines(*this, second, num_bytes);
  const auto* read = static_cast<const char*>(instead);
  return {from_first != nullptr ? from_first : read, from_second != nullptr ? from_second : read};
}

[[gnu::noinline, maybe_unused]] static void advance_all(ReadAhead& all, int64_t num_bytes) {
  advance_cursor(all, all.first, num_bytes);
  if (all.asks_twice) advance_cursor(all, all.second, num_bytes);
}

inline void ReadAhead::advance(int64_t num_bytes) { advance_all(*this, num_bytes); }

// Calls `work` with `next.asking()` as a compile-time constant.
template <typename Work>
static inline void with_asking(const ReadAhead& next, const Work& work) {
  switch (next.asking()) {
    case Asking::kOnceL1:
      return work(std::integral_constant<Asking, Asking::kOnceL1>());
    case Asking::kOnceL2:
      return work(std::integral_constant<Asking, Asking::kOnceL2>());
    case Asking::kTwiceL1:
      return work(std::integral_constant<Asking, Asking::kTwiceL1>());
  }
}

// The same for kernels that never ask for a line twice.
template <typename Work>
static inline void with_asking_once(const Work& work) {
  if (kPrefetchesToL1) return work(std::integral_constant<Asking, Asking::kOnceL1>());
  work(std::integral_constant<Asking, Asking::kOnceL2>());
}

}  // namespace kvkernels
