// Codes of 8, 4 and 2 bits of one side of a layer, written and read, in terms of lanes as
// codec_scales.h is.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/codec_paths.h"
#include "cpu/codec_scales.h"

namespace kvkernels {
namespace {

// Byte j of a row of codes holds those of the channels j, j + width, j + 2 * width, ... where
// `width` bytes make a row.
template <int kBits>
constexpr int kParts = 8 / kBits;

// Fetches what comes next, a little at a time: columns are not read in the order of memory.
class Ahead {
 public:
  Ahead(const std::byte* items, int64_t item_step, const uint8_t* codes, int64_t code_step)
      : items_(items), codes_(codes), item_step_(item_step), code_step_(code_step) {}

  void touch() {
    __builtin_prefetch(items_, 0, 2);
    __builtin_prefetch(codes_, 1, 2);
    items_ += item_step_;
    codes_ += code_step_;
  }

 private:
  const std::byte* items_;
  const uint8_t* codes_;
  int64_t item_step_, code_step_;
};

// Encoding adds the ranges it finds to `magnitudes`.
template <DType kType, int kBits>
void encode_keys(const std::byte* items, const Tile& tile, int64_t num_groups, uint8_t* codes,
                 uint16_t* pairs, Words& magnitudes) {
  using E = Elements<kType>;
  using Range = typename E::Range;
  constexpr int kCount = kParts<kBits>;
  const int64_t width = tile.dim / kCount, group_size = tile.size / num_groups;
  const int64_t row_bytes = tile.stride * E::kBytes;
  Ahead ahead(items + tile.size * row_bytes, kCount * kLanes * E::kBytes, codes + tile.size * width,
              kLanes);
  for (int64_t group = 0; group < num_groups; ++group, pairs += 2 * tile.dim) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = std::min(kLanes, width - c);
      const std::byte* const from = items + (group * group_size * tile.stride + c) * E::kBytes;
      const std::byte* row = from;
      const auto place = [&](int part) { return row + part * width * E::kBytes; };
      Range least[kCount], greatest[kCount];
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        least[part] = greatest[part] = E::read_range(place(part), count);
      }
      for (int64_t t = 1; t < group_size; ++t) {
        ahead.touch();
        row += row_bytes;
#pragma GCC unroll 4
        for (int part = 0; part < kCount; ++part) {
          const Range v = E::read_range(place(part), count);
          least[part] = E::least(least[part], v);
          greatest[part] = E::greatest(greatest[part], v);
        }
      }
      Steps steps[kCount];
      bool has_top = false;
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        const Floats lowest = E::floats(least[part]), highest = E::floats(greatest[part]);
        magnitudes = larger_magnitude(larger_magnitude(magnitudes, lowest), highest);
        steps[part] =
            find_scales<kType>(lowest, highest, kBits, pairs + 2 * (part * width + c), count);
        has_top |= steps[part].has_top;
      }
      const auto write = [&](auto has_top_constant) {
        row = from;
        uint8_t* to = codes + group * group_size * width + c;
        for (int64_t t = 0; t < group_size; ++t, row += row_bytes, to += width) {
          Words packed = no_words();
#pragma GCC unroll 4
          for (int part = 0; part < kCount; ++part) {
            const Floats v = E::read(place(part), count);
            packed = either(packed, to_code<kBits, has_top_constant>(v, steps[part], part));
          }
          store_bytes(to, packed, count);
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

template <DType kType, int kBits>
void decode_keys(const uint8_t* codes, const uint16_t* pairs, const Tile& tile, int64_t num_groups,
                 std::byte* items) {
  using E = Elements<kType>;
  constexpr int kCount = kParts<kBits>;
  const int64_t width = tile.dim / kCount, group_size = tile.size / num_groups;
  for (int64_t group = 0; group < num_groups; ++group, pairs += 2 * tile.dim) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = std::min(kLanes, width - c);
      Floats scale[kCount], low[kCount];
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        load_pairs(pairs + 2 * (part * width + c), count, scale[part], low[part]);
      }
      const uint8_t* from = codes + group * group_size * width + c;
      std::byte* to = items + (group * group_size * tile.stride + c) * E::kBytes;
      for (int64_t t = 0; t < group_size; ++t, from += width, to += tile.stride * E::kBytes) {
        const Words packed = load_bytes(from, count);
#pragma GCC unroll 4
        for (int part = 0; part < kCount; ++part) {
          const Floats v = restore(low[part], scale[part], code_from<kBits>(packed, part));
          E::write(to + part * width * E::kBytes, v, count);
        }
      }
    }
  }
}

// Whether kLanes neighbouring channels of values, from a multiple of kLanes on, lie in one group
// and in one part of a row of codes.
inline bool share_groups(int64_t width, int64_t num_groups, int64_t group_size) {
  return width % kLanes == 0 && (num_groups == 1 || group_size % kLanes == 0);
}

// What codes of some tokens' values are found with, and values of codes: of each of their sets.
struct ValueSets {
  int64_t num_groups, group_size;
  float low[kMaxCodecDim + kLanes], inverse[kMaxCodecDim + kLanes], top[kMaxCodecDim + kLanes];
  float scale[kMaxCodecDim + kLanes];
};

// Numbers of each of a token's groups, to be looked up for kLanes channels at a time, where those
// may lie in several.
class ByChannel {
 public:
  explicit ByChannel(const ValueSets& sets)
      : num_groups_(sets.num_groups), group_size_(sets.group_size) {}

  // The groups of the token that follows.
  void begin(const float* groups) {
    for (int64_t group = 0; group < num_groups_; ++group) {
      std::fill_n(channels_ + group * group_size_, group_size_, groups[group]);
    }
  }

  Floats at(int64_t channel, int64_t count) const {
    return load_floats(channels_ + channel, count);
  }

 private:
  int64_t num_groups_, group_size_;
  float channels_[kMaxCodecDim + kLanes];
};

// Lowest and highest of up to kLanes sets of neighbouring items, `group_size` each.
template <DType kType>
inline void find_ranges(const std::byte* items, int64_t num_sets, int64_t group_size,
                        Floats& lowest, Floats& highest) {
  using E = Elements<kType>;
  using Range = typename E::Range;
  Range low[kLanes], high[kLanes];
  for (int64_t set = 0; set < kLanes; ++set) {
    const std::byte* first = items + std::min(set, num_sets - 1) * group_size * E::kBytes;
    Range a = E::read_range(first, std::min(group_size, kLanes));
    if (group_size < kLanes) a = E::repeat_first(a, group_size);
    Range b = a;
    for (int64_t i = kLanes; i < group_size; i += kLanes) {
      // The last ones may overlap those before.
      const Range v = E::read_range(first + std::min(i, group_size - kLanes) * E::kBytes, kLanes);
      a = E::least(a, v);
      b = E::greatest(b, v);
    }
    low[set] = a;
    high[set] = b;
  }
  lowest = E::floats(least_of_each(low));
  highest = E::floats(greatest_of_each(high));
}

// Columns of kLanes channels: a column is in the same group of every token.
template <DType kType, int kBits, bool kHasTop>
void encode_columns(const std::byte* items, int64_t num_tokens, int64_t width,
                    const ValueSets& sets, uint8_t* codes) {
  using E = Elements<kType>;
  constexpr int kCount = kParts<kBits>;
  for (int64_t c = 0; c < width; c += kLanes) {
    int64_t groups[kCount];
    for (int part = 0; part < kCount; ++part) groups[part] = (part * width + c) / sets.group_size;
    for (int64_t t = 0; t < num_tokens; ++t) {
      Words packed = no_words();
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        const int64_t channel = (t * kCount + part) * width + c;
        const int64_t set = t * sets.num_groups + groups[part];
        Steps steps = {all(sets.low[set]), all(sets.inverse[set]), {}, true};
        if (kHasTop) steps.top = all(sets.top[set]);
        const Floats v = E::read(items + channel * E::kBytes, kLanes);
        packed = either(packed, to_code<kBits, kHasTop>(v, steps, part));
      }
      store_bytes(codes + t * width + c, packed, kLanes);
    }
  }
}

// Rows of any width, in groups of any size.
template <DType kType, int kBits, bool kHasTop>
void encode_rows(const std::byte* items, int64_t num_tokens, int64_t width, const ValueSets& sets,
                 uint8_t* codes) {
  using E = Elements<kType>;
  constexpr int kCount = kParts<kBits>;
  ByChannel lows(sets), inverses(sets), tops(sets);
  for (int64_t t = 0; t < num_tokens; ++t) {
    lows.begin(sets.low + t * sets.num_groups);
    inverses.begin(sets.inverse + t * sets.num_groups);
    if (kHasTop) tops.begin(sets.top + t * sets.num_groups);
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = std::min(kLanes, width - c);
      Words packed = no_words();
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        const int64_t channel = part * width + c;
        const Floats v = E::read(items + (t * kCount * width + channel) * E::kBytes, count);
        Steps steps = {lows.at(channel, count), inverses.at(channel, count), {}, true};
        if (kHasTop) steps.top = tops.at(channel, count);
        packed = either(packed, to_code<kBits, kHasTop>(v, steps, part));
      }
      store_bytes(codes + t * width + c, packed, count);
    }
  }
}

// Tokens of values are dense: there are no more channels than those that are written.
template <DType kType, int kBits>
void encode_values(const std::byte* items, const Tile& tile, int64_t num_groups, uint8_t* codes,
                   uint16_t* pairs, Words& magnitudes) {
  using E = Elements<kType>;
  const int64_t width = tile.dim / kParts<kBits>, group_size = tile.dim / num_groups;
  const bool in_columns = share_groups(width, num_groups, group_size);
  // As many whole tokens as their sets fill lanes, or one.
  const int64_t batch = std::max<int64_t>(1, kLanes / num_groups);
  ValueSets sets;
  sets.num_groups = num_groups, sets.group_size = group_size;
  for (int64_t token = 0; token < tile.size; token += batch) {
    const int64_t num_tokens = std::min(batch, tile.size - token);
    const int64_t num_sets = num_tokens * num_groups;
    const std::byte* from = items + token * tile.dim * E::kBytes;
    bool has_top = false;
    for (int64_t set = 0; set < num_sets; set += kLanes) {
      const int64_t count = std::min(kLanes, num_sets - set);
      Floats lowest, highest;
      find_ranges<kType>(from + set * group_size * E::kBytes, count, group_size, lowest, highest);
      magnitudes = larger_magnitude(larger_magnitude(magnitudes, lowest), highest);
      const Steps steps =
          find_scales<kType>(lowest, highest, kBits, pairs + 2 * (token * num_groups + set), count);
      store_floats(sets.low + set, steps.low);
      store_floats(sets.inverse + set, steps.inverse);
      store_floats(sets.top + set, steps.top);
      has_top |= steps.has_top;
    }
    const auto encode =
        in_columns
            ? (has_top ? encode_columns<kType, kBits, true> : encode_columns<kType, kBits, false>)
            : (has_top ? encode_rows<kType, kBits, true> : encode_rows<kType, kBits, false>);
    encode(from, num_tokens, width, sets, codes + token * width);
  }
}

template <DType kType, int kBits>
void decode_columns(const uint8_t* codes, int64_t num_tokens, int64_t width, const ValueSets& sets,
                    std::byte* items) {
  using E = Elements<kType>;
  constexpr int kCount = kParts<kBits>;
  for (int64_t c = 0; c < width; c += kLanes) {
    int64_t groups[kCount];
    for (int part = 0; part < kCount; ++part) groups[part] = (part * width + c) / sets.group_size;
    for (int64_t t = 0; t < num_tokens; ++t) {
      const Words packed = load_bytes(codes + t * width + c, kLanes);
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        const int64_t channel = (t * kCount + part) * width + c;
        const int64_t set = t * sets.num_groups + groups[part];
        const Floats v =
            restore(all(sets.low[set]), all(sets.scale[set]), code_from<kBits>(packed, part));
        E::write(items + channel * E::kBytes, v, kLanes);
      }
    }
  }
}

template <DType kType, int kBits>
void decode_rows(const uint8_t* codes, int64_t num_tokens, int64_t width, const ValueSets& sets,
                 std::byte* items) {
  using E = Elements<kType>;
  constexpr int kCount = kParts<kBits>;
  ByChannel lows(sets), scales(sets);
  for (int64_t t = 0; t < num_tokens; ++t) {
    lows.begin(sets.low + t * sets.num_groups);
    scales.begin(sets.scale + t * sets.num_groups);
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = std::min(kLanes, width - c);
      const Words packed = load_bytes(codes + t * width + c, count);
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        const int64_t channel = part * width + c;
        const Floats v = restore(lows.at(channel, count), scales.at(channel, count),
                                 code_from<kBits>(packed, part));
        E::write(items + (t * kCount * width + channel) * E::kBytes, v, count);
      }
    }
  }
}

template <DType kType, int kBits>
void decode_values(const uint8_t* codes, const uint16_t* pairs, const Tile& tile,
                   int64_t num_groups, std::byte* items) {
  const int64_t width = tile.dim / kParts<kBits>, group_size = tile.dim / num_groups;
  const bool in_columns = share_groups(width, num_groups, group_size);
  const int64_t batch = std::max<int64_t>(1, kLanes / num_groups);
  ValueSets sets;
  sets.num_groups = num_groups, sets.group_size = group_size;
  for (int64_t token = 0; token < tile.size; token += batch) {
    const int64_t num_tokens = std::min(batch, tile.size - token);
    const int64_t num_sets = num_tokens * num_groups;
    for (int64_t set = 0; set < num_sets; set += kLanes) {
      Floats steps, least;
      load_pairs(pairs + 2 * (token * num_groups + set), std::min(kLanes, num_sets - set), steps,
                 least);
      store_floats(sets.scale + set, steps);
      store_floats(sets.low + set, least);
    }
    const auto decode = in_columns ? decode_columns<kType, kBits> : decode_rows<kType, kBits>;
    decode(codes + token * width, num_tokens, width, sets,
           items + token * tile.dim * Elements<kType>::kBytes);
  }
}

// Whether all items are numbers that float16 holds: by their bits without the sign, which are
// ordered like their magnitudes.
template <typename Bits>
bool lie_below(const std::byte* items, int64_t num_items, Bits limit) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const auto* bits = reinterpret_cast<const Bits*>(items);
  Bits largest = 0;
  for (int64_t i = 0; i < num_items; ++i) {
    const Bits magnitude = bits[i] & kMagnitude;
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest <= limit;
}

// Codes restore numbers up to 65408 as finite float16; its bits.
constexpr uint32_t kLargest = 0x477f8000;

template <DType kType>
bool fits_half(const std::byte* items, int64_t num_items) {
  if (kType == DType::kFloat32) return lie_below<uint32_t>(items, num_items, kLargest);
  return lie_below<uint16_t>(items, num_items, kType == DType::kFloat16 ? 0x7bfc : 0x477f);
}

template <DType kType>
bool fits_half(const Side& side, const std::byte* items) {
  const int64_t dim = side.format.num_channels;
  if (dim == side.head_dim) return fits_half<kType>(items, side.num_items());
  for (int64_t row = 0; row < side.num_rows(); ++row) {
    if (!fits_half<kType>(items + row * side.head_dim * Elements<kType>::kBytes, dim)) return false;
  }
  return true;
}

template <DType kType, int kBits>
bool encode_codes(const Side& side, const std::byte* items, std::byte* layer) {
  if (!Elements<kType>::kRangesSeeAll && !fits_half<kType>(side, items)) return false;
  Words magnitudes = no_words();
  const Tile tile = side.tile();
  const int64_t num_codes = tile.size * tile.dim / kParts<kBits>, groups = side.format.num_groups;
  const int64_t num_pairs = groups * (side.format.is_key ? tile.dim : tile.size);
  auto* codes = reinterpret_cast<uint8_t*>(layer + side.format.parts[0]);
  auto* pairs = reinterpret_cast<uint16_t*>(layer + side.format.parts[1]);
  const auto encode = side.format.is_key ? encode_keys<kType, kBits> : encode_values<kType, kBits>;
  for (int64_t head = 0; head < side.num_heads; ++head) {
    encode(items + head * tile.size * tile.stride * Elements<kType>::kBytes, tile, groups,
           codes + head * num_codes, pairs + head * num_pairs * 2, magnitudes);
  }
  return largest_lane(magnitudes) <= kLargest;
}

template <DType kType, int kBits>
void decode_codes(const Side& side, const std::byte* layer, std::byte* items) {
  const Tile tile = side.tile();
  const int64_t num_codes = tile.size * tile.dim / kParts<kBits>, groups = side.format.num_groups;
  const int64_t num_pairs = groups * (side.format.is_key ? tile.dim : tile.size);
  const auto* codes = reinterpret_cast<const uint8_t*>(layer + side.format.parts[0]);
  const auto* pairs = reinterpret_cast<const uint16_t*>(layer + side.format.parts[1]);
  const auto decode = side.format.is_key ? decode_keys<kType, kBits> : decode_values<kType, kBits>;
  for (int64_t head = 0; head < side.num_heads; ++head) {
    decode(codes + head * num_codes, pairs + head * num_pairs * 2, tile, groups,
           items + head * tile.size * tile.stride * Elements<kType>::kBytes);
  }
}

}  // namespace
}  // namespace kvkernels
