// Codes of keys: tokens of a channel share a scale. In terms of the lanes of an instruction set,
// like codec_scales.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/codec_items.h"
#include "cpu/codec_paths.h"
#include "cpu/codec_scales.h"
#include "cpu/prefetch_line.h"

namespace kvkernels {
namespace {

constexpr int64_t kLineBytes = 64;

// Codes per byte. Byte j of a row of codes holds those of the channels j, j + width, j + 2 * width,
// ..., where a row has `width` bytes.
template <int kBits>
constexpr int kParts = 8 / kBits;

// Prefetches the next head's items and codes, a little at a time: the order of reading, column by
// column, is not that of memory. (Into the L1 cache, on Zen 5, blocks took 3 to 8 % less time than
// into the L2 cache.)
class Ahead {
 public:
  Ahead(const std::byte* items, int64_t item_step, const uint8_t* codes, int64_t code_step)
      : items_(items), codes_(codes), item_step_(item_step), code_step_(code_step) {}

  void touch() {
    prefetch_lines(items_, item_step_);
    __builtin_prefetch(codes_, 1, 2);
    items_ += item_step_;
    codes_ += code_step_;
  }

 private:
  const std::byte* items_;
  const uint8_t* codes_;
  int64_t item_step_, code_step_;
};

// Encodes one head, kVectors * kLanes channels at a time; with two vectors, the width is a multiple
// of that. `magnitudes` keeps the largest magnitude in each lane.
template <DType kType, int kBits, int kVectors>
void encode_keys(const std::byte* items, const Tile& tile, int64_t num_groups, uint8_t* codes,
                 uint16_t* pairs, Words& magnitudes) {
  using E = Elements<kType>;
  using Row = Items<E, kVectors>;
  using Range = typename Row::Range;
  constexpr int kCount = kParts<kBits>;
  constexpr int64_t kStep = kVectors * kLanes;
  const int64_t width = tile.dim / kCount, group_size = tile.size / num_groups;
  const int64_t row_bytes = tile.stride * E::kBytes;
  Ahead ahead(items + tile.size * row_bytes, kCount * kStep * E::kBytes, codes + tile.size * width,
              kStep);
  for (int64_t group = 0; group < num_groups; ++group, pairs += 2 * tile.dim) {
    for (int64_t c = 0; c < width; c += kStep) {
      const int64_t count = std::min(kLanes, width - c);
      const std::byte* const from = items + (group * group_size * tile.stride + c) * E::kBytes;
      const std::byte* row = from;
      const auto place = [&](int part) { return row + part * width * E::kBytes; };
      Range least[kCount], greatest[kCount];
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        least[part] = greatest[part] = Row::read_range(place(part), count);
      }
      for (int64_t t = 1; t < group_size; ++t) {
        ahead.touch();
        row += row_bytes;
#pragma GCC unroll 4
        for (int part = 0; part < kCount; ++part) {
          const Range v = Row::read_range(place(part), count);
          least[part] = E::least(least[part], v);
          greatest[part] = E::greatest(greatest[part], v);
        }
      }
      Steps steps[kCount][kVectors];
      bool has_top = false;
      for (int part = 0; part < kCount; ++part) {
        Floats lowest[kVectors], highest[kVectors];
        Row::to_floats(least[part], lowest);
        Row::to_floats(greatest[part], highest);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          magnitudes = larger_magnitude(larger_magnitude(magnitudes, lowest[v]), highest[v]);
          uint16_t* to = pairs + 2 * (part * width + c + v * kLanes);
          steps[part][v] = find_scales<kType>(lowest[v], highest[v], kBits, to, count);
          has_top |= steps[part][v].has_top;
        }
        Row::arrange(steps[part]);
      }
      const auto write = [&](auto has_top_constant) {
        row = from;
        uint8_t* to = codes + group * group_size * width + c;
        for (int64_t t = 0; t < group_size; ++t, row += row_bytes, to += width) {
          Words packed[kVectors];
          std::fill_n(packed, kVectors, no_words());
#pragma GCC unroll 4
          for (int part = 0; part < kCount; ++part) {
            Floats v[kVectors];
            Row::read(place(part), count, v);
#pragma GCC unroll 2
            for (int i = 0; i < kVectors; ++i) {
              packed[i] =
                  either(packed[i], to_code<kBits, has_top_constant>(v[i], steps[part][i], part));
            }
          }
          Row::store_codes(to, packed, count);
        }
      };
      if (has_top) {
        write(std::true_type());
      } else {
        write(std::false_type());
      }
    }
  }
}

// Whether decoded items can be written in whole cache lines past the cache (streaming stores), so
// that no line is read only to be overwritten; restored items are not read soon. `width` is how
// many neighbouring items each part of a row has.
template <typename E>
bool can_stream(const std::byte* items, int64_t row_bytes, int64_t width) {
  if constexpr (E::kLineVectors == 0) return false;
  const int64_t unaligned = reinterpret_cast<std::uintptr_t>(items) | row_bytes | width * E::kBytes;
  return unaligned % kLineBytes == 0;
}

// Decodes one head, kVectors * kLanes channels at a time, streamed line by line; with kVectors = 0,
// one vector at a time by plain stores.
template <DType kType, int kBits, int kVectors>
void decode_keys(const uint8_t* codes, const uint16_t* pairs, const Tile& tile, int64_t num_groups,
                 std::byte* items) {
  using E = Elements<kType>;
  constexpr int kCount = kParts<kBits>;
  constexpr int64_t kStep = std::max(kVectors, 1) * kLanes;
  const int64_t width = tile.dim / kCount, group_size = tile.size / num_groups;
  for (int64_t group = 0; group < num_groups; ++group, pairs += 2 * tile.dim) {
    for (int64_t c = 0; c < width; c += kStep) {
      const int64_t count = std::min(kLanes, width - c);
      Floats scale[kCount][kStep / kLanes], low[kCount][kStep / kLanes];
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
#pragma GCC unroll 2
        for (int v = 0; v < kStep / kLanes; ++v) {
          load_pairs(pairs + 2 * (part * width + c + v * kLanes), count, scale[part][v],
                     low[part][v]);
        }
      }
      const uint8_t* from = codes + group * group_size * width + c;
      std::byte* to = items + (group * group_size * tile.stride + c) * E::kBytes;
      for (int64_t t = 0; t < group_size; ++t, from += width, to += tile.stride * E::kBytes) {
        Words packed[kStep / kLanes];
#pragma GCC unroll 2
        for (int v = 0; v < kStep / kLanes; ++v) packed[v] = load_bytes(from + v * kLanes, count);
#pragma GCC unroll 4
        for (int part = 0; part < kCount; ++part) {
          Floats out[kStep / kLanes];
#pragma GCC unroll 2
          for (int v = 0; v < kStep / kLanes; ++v) {
            out[v] = restore(low[part][v], scale[part][v], code_from<kBits>(packed[v], part));
          }
          std::byte* place = to + part * width * E::kBytes;
          if constexpr (kVectors > 0) {
            E::stream_line(place, out);
          } else {
            E::write(place, out[0], count);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvkernels
