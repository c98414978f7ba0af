// One layer's keys or values, encoded and decoded, in terms of the lanes of an instruction set: to
// be included after one of the codec_lanes_*.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "cpu/codec_paths.h"

namespace kvkernels {
namespace {

// Tokens and channels of one head, and items from one token to the next.
struct Tile {
  int64_t size, dim, stride;
};

// ---- scales --------------------------------------------------------------------------------

// What turns numbers into codes, a set of codes a lane.
struct Steps {
  Floats low, inverse;
  Floats top;    // the greatest code
  bool has_top;  // whether that may be less than bits hold, in any lane
};

// The code of a number, not yet rounded and bounded. Once it is rounded it is not below zero: a
// minimum is rounded down, or up by at most half of the least scale.
inline Floats find_code(Floats v, const Steps& steps) {
  return mul(sub(v, steps.low), steps.inverse);
}

template <int kBits, bool kHasTop>
inline Words to_code(Floats v, const Steps& steps, int part) {
  const Floats code = find_code(v, steps);
  return code_at<kBits>(kHasTop ? min(code, steps.top) : code, part);
}

// A scale, the code of the greatest element, and what that restores.
struct Fit {
  Floats scale, top, restored;
};

template <DType kType>
inline Fit fit_scale(Floats low, Floats highest, Floats levels, Floats step) {
  const auto code_of_highest = [&](Floats scale) {
    const Floats code = max(mul(sub(highest, low), inverse_of(scale)), all(0.0f));
    const Floats to_whole = all(0x1.8p23f);  // from here on, floats are whole numbers
    return sub(add(min(code, levels), to_whole), to_whole);
  };
  const auto restored = [&](Floats scale) {
    return Elements<kType>::round(add(low, mul(scale, code_of_highest(scale))));
  };
  const Floats range = max(sub(highest, low), all(0.0f));
  const Floats first = from_half(half_nearest(mul(range, step)));
  const Floats scale = from_half(half_nearest(mul(sub(restored(first), low), step)));
  return {scale, code_of_highest(scale), restored(scale)};
}

// All of what kvkernels/reference/quantize.py does to find scales: for sets that are rare.
template <DType kType>
[[gnu::noinline, gnu::cold]] Steps find_small_scales(Floats lowest, Floats highest, Floats levels,
                                                     Floats step, uint16_t* pairs, int64_t count) {
  const Floats nearest = add(from_half(half_nearest(lowest)), all(0.0f));
  const Floats low = where_small(lowest, nearest, from_half(half_below(lowest)));
  const Fit fit = fit_scale<kType>(low, highest, levels, step);
  const Fit again = fit_scale<kType>(low, fit.restored, levels, step);
  const Floats scale = where_small(fit.scale, again.scale, fit.scale);
  store_pairs(pairs, half_nearest(scale), half_nearest(low), count);
  return {low, inverse_of(scale), where_small(fit.scale, again.top, levels), true};
}

// Finds and writes the scales of sets that lie between `lowest` and `highest`.
template <DType kType>
inline Steps find_scales(Floats lowest, Floats highest, int bits, uint16_t* pairs, int64_t count) {
  const Floats levels = all(static_cast<float>((1 << bits) - 1));
  const Floats step = all(1.0f / static_cast<float>((1 << bits) - 1));
  lowest = add(lowest, all(0.0f));  // no minus zero
  const Words minimum = half_below(lowest);
  const Floats low = from_half(minimum);
  const Floats first = from_half(half_nearest(mul(sub(highest, low), step)));
  // A scale may still come out a little smaller than the first.
  if (any_small(lowest, first)) {
    return find_small_scales<kType>(lowest, highest, levels, step, pairs, count);
  }
  // Once more for the range as the codes would restore it: they give the same scale again.
  const Floats restored = Elements<kType>::round(add(low, mul(first, levels)));
  const Words scale = half_nearest(mul(sub(restored, low), step));
  store_pairs(pairs, scale, minimum, count);
  return {low, inverse_of(from_half(scale)), levels, false};
}

// ---- codes ---------------------------------------------------------------------------------

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
  const int64_t item_bytes = tile.size * tile.stride * E::kBytes;
  Ahead ahead(items + item_bytes, kCount * kLanes * E::kBytes, codes + tile.size * width, kLanes);
  for (int64_t group = 0; group < num_groups; ++group, pairs += 2 * tile.dim) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = std::min(kLanes, width - c);
      const auto place = [&](int64_t t, int part) {
        return items + ((group * group_size + t) * tile.stride + part * width + c) * E::kBytes;
      };
      Range least[kCount], greatest[kCount];
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        least[part] = greatest[part] = E::read_range(place(0, part), count);
      }
      for (int64_t t = 1; t < group_size; ++t) {
        ahead.touch();
#pragma GCC unroll 4
        for (int part = 0; part < kCount; ++part) {
          const Range v = E::read_range(place(t, part), count);
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
        for (int64_t t = 0; t < group_size; ++t) {
          Words packed = no_words();
#pragma GCC unroll 4
          for (int part = 0; part < kCount; ++part) {
            const Floats v = E::read(place(t, part), count);
            packed = either(packed, to_code<kBits, has_top_constant>(v, steps[part], part));
          }
          store_bytes(codes + (group * group_size + t) * width + c, packed, count);
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

constexpr int64_t kMaxDim = kMaxCodecDim;

// Numbers of each of a token's groups, to be looked up for kLanes channels at a time.
class ByChannel {
 public:
  ByChannel(int64_t num_groups, int64_t group_size)
      : num_groups_(num_groups),
        group_size_(group_size),
        is_even_(group_size % kLanes == 0 || num_groups == 1) {
    for (int64_t channel = 0; is_even_ && channel < num_groups * group_size; channel += kLanes) {
      group_of_[channel / kLanes] = static_cast<int16_t>(channel / group_size);
    }
  }

  // The groups of the token that follows.
  void begin(const float* groups) {
    groups_ = groups;
    if (is_even_) return;
    for (int64_t group = 0; group < num_groups_; ++group) {
      std::fill_n(channels_ + group * group_size_, group_size_, groups[group]);
    }
  }

  Floats at(int64_t channel, int64_t count) const {
    if (is_even_) return all(groups_[group_of_[channel / kLanes]]);
    return load_floats(channels_ + channel, count);
  }

  // For parts of rows that do not start at multiples of kLanes: a vector may lie in two groups.
  void allow_any_channel() { is_even_ = false; }

 private:
  int64_t num_groups_, group_size_;
  bool is_even_;
  const float* groups_ = nullptr;
  int16_t group_of_[kMaxDim / kLanes + 1];
  float channels_[kMaxDim + kLanes];
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

// Tokens of values are dense: there are no more channels than those that are written.
template <DType kType, int kBits>
void encode_values(const std::byte* items, const Tile& tile, int64_t num_groups, uint8_t* codes,
                   uint16_t* pairs, Words& magnitudes) {
  using E = Elements<kType>;
  constexpr int kCount = kParts<kBits>;
  const int64_t width = tile.dim / kCount, group_size = tile.dim / num_groups;
  // As many whole tokens as their sets fill lanes, or one.
  const int64_t batch = std::max<int64_t>(1, kLanes / num_groups);
  float low[kMaxDim + kLanes], inverse[kMaxDim + kLanes];  // of the sets of a batch
  float top[kMaxDim + kLanes];
  ByChannel lows(num_groups, group_size), inverses(num_groups, group_size);
  if (width % kLanes != 0) lows.allow_any_channel(), inverses.allow_any_channel();
  for (int64_t token = 0; token < tile.size; token += batch) {
    const int64_t num_tokens = std::min(batch, tile.size - token);
    const int64_t num_sets = num_tokens * num_groups;
    bool has_top = false;
    for (int64_t set = 0; set < num_sets; set += kLanes) {
      const int64_t count = std::min(kLanes, num_sets - set), first = token * num_groups + set;
      Floats lowest, highest;
      find_ranges<kType>(items + first * group_size * E::kBytes, count, group_size, lowest,
                         highest);
      magnitudes = larger_magnitude(larger_magnitude(magnitudes, lowest), highest);
      const Steps steps = find_scales<kType>(lowest, highest, kBits, pairs + 2 * first, count);
      store_floats(low + set, steps.low);
      store_floats(inverse + set, steps.inverse);
      store_floats(top + set, steps.top);
      has_top |= steps.has_top;
    }
    const auto write = [&](auto has_top_constant) {
      std::optional<ByChannel> tops;
      if (has_top_constant) tops.emplace(num_groups, group_size);
      if (has_top_constant && width % kLanes != 0) tops->allow_any_channel();
      for (int64_t t = token; t < token + num_tokens; ++t) {
        lows.begin(low + (t - token) * num_groups);
        inverses.begin(inverse + (t - token) * num_groups);
        if (has_top_constant) tops->begin(top + (t - token) * num_groups);
        for (int64_t c = 0; c < width; c += kLanes) {
          const int64_t count = std::min(kLanes, width - c);
          Words packed = no_words();
#pragma GCC unroll 4
          for (int part = 0; part < kCount; ++part) {
            const int64_t channel = part * width + c;
            const Floats v = E::read(items + (t * tile.dim + channel) * E::kBytes, count);
            Steps steps = {lows.at(channel, count), inverses.at(channel, count), {}, true};
            if (has_top_constant) steps.top = tops->at(channel, count);
            packed = either(packed, to_code<kBits, has_top_constant>(v, steps, part));
          }
          store_bytes(codes + t * width + c, packed, count);
        }
      }
    };
    if (has_top) {
      write(std::true_type());
    } else {
      write(std::false_type());
    }
  }
}

template <DType kType, int kBits>
void decode_values(const uint8_t* codes, const uint16_t* pairs, const Tile& tile,
                   int64_t num_groups, std::byte* items) {
  using E = Elements<kType>;
  constexpr int kCount = kParts<kBits>;
  const int64_t width = tile.dim / kCount, group_size = tile.dim / num_groups;
  const int64_t batch = std::max<int64_t>(1, kLanes / num_groups);
  float low[kMaxDim + kLanes], scale[kMaxDim + kLanes];
  ByChannel lows(num_groups, group_size), scales(num_groups, group_size);
  if (width % kLanes != 0) lows.allow_any_channel(), scales.allow_any_channel();
  for (int64_t token = 0; token < tile.size; token += batch) {
    const int64_t num_tokens = std::min(batch, tile.size - token);
    const int64_t num_sets = num_tokens * num_groups;
    for (int64_t set = 0; set < num_sets; set += kLanes) {
      Floats steps, least;
      load_pairs(pairs + 2 * (token * num_groups + set), std::min(kLanes, num_sets - set), steps,
                 least);
      store_floats(scale + set, steps);
      store_floats(low + set, least);
    }
    for (int64_t t = token; t < token + num_tokens; ++t) {
      lows.begin(low + (t - token) * num_groups);
      scales.begin(scale + (t - token) * num_groups);
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t count = std::min(kLanes, width - c);
        const Words packed = load_bytes(codes + t * width + c, count);
#pragma GCC unroll 4
        for (int part = 0; part < kCount; ++part) {
          const int64_t channel = part * width + c;
          const Floats v = restore(lows.at(channel, count), scales.at(channel, count),
                                   code_from<kBits>(packed, part));
          E::write(items + (t * tile.dim + channel) * E::kBytes, v, count);
        }
      }
    }
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

// ---- bfloat16 without loss -----------------------------------------------------------------

struct Lossless {
  uint8_t *low, *exponents;
  uint32_t* escapes;
  uint8_t* tops;
};

// Signs, mantissas and distances of a row of exponents; whether one lies too far away.
inline bool split_row(const uint16_t* __restrict row, const uint16_t* __restrict tops, int64_t dim,
                      uint8_t* __restrict low, uint8_t* __restrict deltas) {
  uint16_t far = 0;
  for (int64_t c = 0; c < dim; ++c) {
    const uint16_t exponent = (row[c] >> 7) & 255, delta = tops[c] - exponent;
    low[c] = static_cast<uint8_t>(((row[c] >> 8) & 0x80) | (row[c] & 0x7f));
    deltas[c] = static_cast<uint8_t>(delta < 15 ? delta : 15);
    far |= delta < 15 ? 0 : exponent;
  }
  return far != 0;
}

bool encode_lossless(const uint16_t* items, const Tile& tile, const Lossless& out) {
  uint16_t tops[kMaxDim] = {};
  for (int64_t t = 0; t < tile.size; ++t) {
    const uint16_t* row = items + t * tile.dim;
    for (int64_t c = 0; c < tile.dim; ++c) {
      const uint16_t exponent = (row[c] >> 7) & 255;
      tops[c] = tops[c] > exponent ? tops[c] : exponent;
    }
  }
  for (int64_t c = 0; c < tile.dim; ++c) out.tops[c] = static_cast<uint8_t>(tops[c]);
  std::fill_n(out.escapes, kNumEscapes, kUnusedEscape);
  const int64_t half = tile.dim / 2;
  int64_t num_escapes = 0;
  uint8_t deltas[kMaxDim + 64];
  for (int64_t t = 0; t < tile.size; ++t) {
    const uint16_t* row = items + t * tile.dim;
    const bool has_escapes = split_row(row, tops, tile.dim, out.low + t * tile.dim, deltas);
    uint8_t* __restrict nibbles = out.exponents + t * half;
    for (int64_t c = 0; c < half; ++c) {
      nibbles[c] = static_cast<uint8_t>(deltas[c] | (deltas[c + half] << 4));
    }
    if (!has_escapes) continue;
    for (int64_t c = 0; c < tile.dim; ++c) {
      const uint32_t exponent = (row[c] >> 7) & 255;
      if (deltas[c] < 15 || exponent == 0) continue;
      if (num_escapes == kNumEscapes) return false;
      out.escapes[num_escapes++] = static_cast<uint32_t>(t * tile.dim + c) | exponent << 24;
    }
  }
  return true;
}

// Half a row: channels whose distances lie in the bits from kShift on.
template <int kShift>
inline void join_row(const uint8_t* __restrict low, const uint8_t* __restrict nibbles,
                     const uint16_t* __restrict tops, int64_t count, uint16_t* __restrict row) {
  for (int64_t c = 0; c < count; ++c) {
    const uint16_t delta = (nibbles[c] >> kShift) & 15;
    const uint16_t mask = delta == 15 ? 0 : 255, exponent = (tops[c] - delta) & mask;
    row[c] = static_cast<uint16_t>((low[c] & 0x80) << 8 | exponent << 7 | (low[c] & 0x7f));
  }
}

void decode_lossless(const Lossless& in, const Tile& tile, uint16_t* items) {
  const int64_t half = tile.dim / 2;
  uint16_t tops[kMaxDim];
  for (int64_t c = 0; c < tile.dim; ++c) tops[c] = in.tops[c];
  for (int64_t t = 0; t < tile.size; ++t) {
    const uint8_t *low = in.low + t * tile.dim, *nibbles = in.exponents + t * half;
    uint16_t* row = items + t * tile.dim;
    join_row<0>(low, nibbles, tops, half, row);
    join_row<4>(low + half, nibbles, tops + half, half, row + half);
  }
  for (int64_t i = 0; i < kNumEscapes; ++i) {
    const uint32_t place = in.escapes[i] & 0xffffff;
    // Also where a record is not what an encoder wrote.
    if (in.escapes[i] == kUnusedEscape || place >= tile.size * tile.dim) continue;
    const uint32_t exponent = in.escapes[i] >> 24;
    items[place] = static_cast<uint16_t>((items[place] & 0x807f) | exponent << 7);
  }
}

// ---- sides ---------------------------------------------------------------------------------

inline Tile tile_of(const Side& side) {
  return {side.block_size, side.format.num_channels, side.head_dim};
}

template <DType kType, int kBits>
bool encode_codes(const Side& side, const std::byte* items, std::byte* layer) {
  if (!Elements<kType>::kRangesSeeAll && !fits_half<kType>(side, items)) return false;
  Words magnitudes = no_words();
  const Tile tile = tile_of(side);
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
  const Tile tile = tile_of(side);
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

// Without loss all of a row is written: there are no channels beside it.
inline Lossless lossless_parts(const Side& side, std::byte* layer, int64_t head) {
  const int64_t num_items = side.block_size * side.head_dim;
  const int64_t* parts = side.format.parts;
  return {reinterpret_cast<uint8_t*>(layer + parts[0]) + head * num_items,
          reinterpret_cast<uint8_t*>(layer + parts[1]) + head * num_items / 2,
          reinterpret_cast<uint32_t*>(layer + parts[2]) + head * kNumEscapes,
          reinterpret_cast<uint8_t*>(layer + parts[3]) + head * side.head_dim};
}

inline bool encode_lossless(const Side& side, const std::byte* items, std::byte* layer) {
  const Tile tile = tile_of(side);
  const auto* numbers = reinterpret_cast<const uint16_t*>(items);
  bool is_good = true;
  for (int64_t head = 0; head < side.num_heads; ++head) {
    is_good &= encode_lossless(numbers + head * tile.size * tile.dim, tile,
                               lossless_parts(side, layer, head));
  }
  return is_good;
}

inline void decode_lossless(const Side& side, const std::byte* layer, std::byte* items) {
  const Tile tile = tile_of(side);
  auto* numbers = reinterpret_cast<uint16_t*>(items);
  for (int64_t head = 0; head < side.num_heads; ++head) {
    decode_lossless(lossless_parts(side, const_cast<std::byte*>(layer), head), tile,
                    numbers + head * tile.size * tile.dim);
  }
}

// Rows of `num_bytes` to where they lie in other distances.
inline void copy_rows(const std::byte* source, int64_t source_stride, std::byte* target,
                      int64_t target_stride, int64_t num_rows, int64_t num_bytes) {
  if (source_stride == num_bytes && target_stride == num_bytes) {
    std::memcpy(target, source, num_rows * num_bytes);
    return;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    std::memcpy(target + row * target_stride, source + row * source_stride, num_bytes);
  }
}

template <DType kType>
bool encode_side(const Side& side, const std::byte* items, std::byte* layer) {
  constexpr int64_t kBytes = Elements<kType>::kBytes;
  const int64_t row_bytes = side.format.num_channels * kBytes;
  switch (side.format.bits) {
    case kRawBits:
      copy_rows(items, side.head_dim * kBytes, layer + side.format.parts[0], row_bytes,
                side.num_rows(), row_bytes);
      return true;
    case kLosslessBits:
      return encode_lossless(side, items, layer);
    case 8:
      return encode_codes<kType, 8>(side, items, layer);
    case 4:
      return encode_codes<kType, 4>(side, items, layer);
    default:
      return encode_codes<kType, 2>(side, items, layer);
  }
}

template <DType kType>
void decode_side(const Side& side, const std::byte* layer, std::byte* items) {
  constexpr int64_t kBytes = Elements<kType>::kBytes;
  const int64_t row_bytes = side.format.num_channels * kBytes;
  switch (side.format.bits) {
    case kRawBits:
      return copy_rows(layer + side.format.parts[0], row_bytes, items, side.head_dim * kBytes,
                       side.num_rows(), row_bytes);
    case kLosslessBits:
      return decode_lossless(side, layer, items);
    case 8:
      return decode_codes<kType, 8>(side, layer, items);
    case 4:
      return decode_codes<kType, 4>(side, layer, items);
    default:
      return decode_codes<kType, 2>(side, layer, items);
  }
}

inline CodecKernels kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {encode_side<DType::kFloat32>, decode_side<DType::kFloat32>};
    case DType::kFloat16:
      return {encode_side<DType::kFloat16>, decode_side<DType::kFloat16>};
    default:
      return {encode_side<DType::kBFloat16>, decode_side<DType::kBFloat16>};
  }
}

}  // namespace
}  // namespace kvkernels
