// Codes of values: channels of a token share a scale. In terms of the lanes of an instruction set,
// like codec_scales.h.
#pragma once

#include <algorithm>

#include "cpu/codec_keys.h"
#include "cpu/codec_paths.h"
#include "cpu/codec_scales.h"

namespace kvkernels {
namespace {

// Vectors of sets whose scales are found at a time: while one waits for a division, another can go
// on.
constexpr int64_t kSetVectors = 2;

// The scales of some tokens, one entry per set (a group of a token's channels): for encoding and
// decoding.
struct ValueSets {
  ValueSets(int64_t dim, int64_t width, int64_t count)
      : num_groups(count),
        group_size(dim / count),
        batch(std::max<int64_t>(1, kSetVectors * kLanes / count)),
        in_columns(width % kLanes == 0 && (count == 1 || group_size % kLanes == 0)),
        in_pairs(width % (2 * kLanes) == 0 && (count == 1 || group_size % (2 * kLanes) == 0)) {}

  int64_t num_groups, group_size;
  int64_t batch;    // tokens at a time: as many as have kSetVectors vectors of sets
  bool in_columns;  // whether any kLanes channels lie in one group and one part of a row of codes
  bool in_pairs;    // whether any 2 * kLanes channels do
  float low[kMaxCodecDim + kLanes], inverse[kMaxCodecDim + kLanes], top[kMaxCodecDim + kLanes];
  float scale[kMaxCodecDim + kLanes];
};

// Repeats a number per group for each of its channels, so that kLanes channels can be looked up at
// a time where these may lie in several groups.
class ByChannel {
 public:
  explicit ByChannel(const ValueSets& sets)
      : num_groups_(sets.num_groups), group_size_(sets.group_size) {}

  // Sets the numbers of one token's groups.
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

// Finds the lowest and highest element of up to kLanes sets of `group_size` neighbouring items.
template <DType kType>
inline void find_ranges(const std::byte* items, int64_t num_sets, int64_t group_size,
                        Floats& lowest, Floats& highest) {
  using E = Elements<kType>;
  using Range = typename E::Range;
  Range low[kLanes], high[kLanes];
  for (int64_t set = 0; set < kLanes; ++set) {
    const std::byte* first = items + std::min(set, num_sets - 1) * group_size * E::kBytes;
    if constexpr (E::kHasPairs) {
      if (group_size % (2 * kLanes) == 0) {
        auto least = E::read_pair_range(first), greatest = least;
        for (int64_t i = 2 * kLanes; i < group_size; i += 2 * kLanes) {
          const auto v = E::read_pair_range(first + i * E::kBytes);
          least = E::least(least, v);
          greatest = E::greatest(greatest, v);
        }
        low[set] = E::least(E::first_half(least), E::last_half(least));
        high[set] = E::greatest(E::first_half(greatest), E::last_half(greatest));
        continue;
      }
    }
    Range a = E::read_range(first, std::min(group_size, kLanes));
    if (group_size < kLanes) a = E::repeat_first(a, group_size);
    Range b = a;
    for (int64_t i = kLanes; i < group_size; i += kLanes) {
      // The last vector may overlap the one before.
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

// Encodes columns of kVectors * kLanes channels: a column lies in the same group of every token.
template <DType kType, int kBits, int kVectors, bool kHasTop>
void encode_columns(const std::byte* items, int64_t num_tokens, int64_t width,
                    const ValueSets& sets, uint8_t* codes) {
  using E = Elements<kType>;
  using Row = Items<E, kVectors>;
  constexpr int kCount = kParts<kBits>;
  for (int64_t c = 0; c < width; c += kVectors * kLanes) {
    int64_t groups[kCount];
    for (int part = 0; part < kCount; ++part) groups[part] = (part * width + c) / sets.group_size;
    for (int64_t t = 0; t < num_tokens; ++t) {
      Words packed[kVectors];
      std::fill_n(packed, kVectors, no_words());
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        const int64_t channel = (t * kCount + part) * width + c;
        const int64_t set = t * sets.num_groups + groups[part];
        Steps steps = {all(sets.low[set]), all(sets.inverse[set]), {}, true};
        if (kHasTop) steps.top = all(sets.top[set]);
        Floats v[kVectors];
        Row::read(items + channel * E::kBytes, kLanes, v);
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; ++i) {
          packed[i] = either(packed[i], to_code<kBits, kHasTop>(v[i], steps, part));
        }
      }
      Row::store_codes(codes + t * width + c, packed, kLanes);
    }
  }
}

// Encodes rows of any width, in groups of any size.
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

template <DType kType, int kBits, bool kHasTop>
auto choose_encoder(const ValueSets& sets) {
  constexpr int kMost = kMostVectors<Elements<kType>>;
  if (kMost > 1 && sets.in_pairs) return encode_columns<kType, kBits, kMost, kHasTop>;
  return sets.in_columns ? encode_columns<kType, kBits, 1, kHasTop>
                         : encode_rows<kType, kBits, kHasTop>;
}

// Encodes one head. Tokens are dense: values have no channels that are left out.
template <DType kType, int kBits>
void encode_values(const std::byte* items, const Tile& tile, int64_t num_groups, uint8_t* codes,
                   uint16_t* pairs, Words& magnitudes) {
  using E = Elements<kType>;
  const int64_t width = tile.dim / kParts<kBits>;
  ValueSets sets(tile.dim, width, num_groups);
  for (int64_t token = 0; token < tile.size; token += sets.batch) {
    const int64_t num_tokens = std::min(sets.batch, tile.size - token);
    const int64_t num_sets = num_tokens * num_groups;
    const std::byte* from = items + token * tile.dim * E::kBytes;
    bool has_top = false;
    for (int64_t set = 0; set < num_sets; set += kLanes) {
      const int64_t count = std::min(kLanes, num_sets - set);
      Floats lowest, highest;
      find_ranges<kType>(from + set * sets.group_size * E::kBytes, count, sets.group_size, lowest,
                         highest);
      magnitudes = larger_magnitude(larger_magnitude(magnitudes, lowest), highest);
      const Steps steps =
          find_scales<kType>(lowest, highest, kBits, pairs + 2 * (token * num_groups + set), count);
      store_floats(sets.low + set, steps.low);
      store_floats(sets.inverse + set, steps.inverse);
      store_floats(sets.top + set, steps.top);
      has_top |= steps.has_top;
    }
    const auto encode = has_top ? choose_encoder<kType, kBits, true>(sets)
                                : choose_encoder<kType, kBits, false>(sets);
    encode(from, num_tokens, width, sets, codes + token * width);
  }
}

// Decodes columns; kVectors as in `decode_keys`.
template <DType kType, int kBits, int kVectors>
void decode_columns(const uint8_t* codes, int64_t num_tokens, int64_t width, const ValueSets& sets,
                    std::byte* items) {
  using E = Elements<kType>;
  constexpr int kCount = kParts<kBits>;
  constexpr int64_t kStep = std::max(kVectors, 1) * kLanes;
  for (int64_t c = 0; c < width; c += kStep) {
    int64_t groups[kCount][kStep / kLanes];
    for (int part = 0; part < kCount; ++part) {
      for (int v = 0; v < kStep / kLanes; ++v) {
        groups[part][v] = (part * width + c + v * kLanes) / sets.group_size;
      }
    }
    for (int64_t t = 0; t < num_tokens; ++t) {
      Words packed[kStep / kLanes];
#pragma GCC unroll 2
      for (int v = 0; v < kStep / kLanes; ++v) {
        packed[v] = load_bytes(codes + t * width + c + v * kLanes, kLanes);
      }
#pragma GCC unroll 4
      for (int part = 0; part < kCount; ++part) {
        Floats out[kStep / kLanes];
#pragma GCC unroll 2
        for (int v = 0; v < kStep / kLanes; ++v) {
          const int64_t set = t * sets.num_groups + groups[part][v];
          out[v] =
              restore(all(sets.low[set]), all(sets.scale[set]), code_from<kBits>(packed[v], part));
        }
        std::byte* place = items + ((t * kCount + part) * width + c) * E::kBytes;
        if constexpr (kVectors > 0) {
          E::stream_line(place, out);
        } else {
          E::write(place, out[0], kLanes);
        }
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
  const int64_t width = tile.dim / kParts<kBits>;
  using E = Elements<kType>;
  const auto in_columns = can_stream<E>(items, tile.dim * E::kBytes, width)
                              ? decode_columns<kType, kBits, E::kLineVectors>
                              : decode_columns<kType, kBits, 0>;
  ValueSets sets(tile.dim, width, num_groups);
  for (int64_t token = 0; token < tile.size; token += sets.batch) {
    const int64_t num_tokens = std::min(sets.batch, tile.size - token);
    const int64_t num_sets = num_tokens * num_groups;
    for (int64_t set = 0; set < num_sets; set += kLanes) {
      Floats steps, least;
      load_pairs(pairs + 2 * (token * num_groups + set), std::min(kLanes, num_sets - set), steps,
                 least);
      store_floats(sets.scale + set, steps);
      store_floats(sets.low + set, least);
    }
    const auto decode = sets.in_columns ? in_columns : decode_rows<kType, kBits>;
    decode(codes + token * width, num_tokens, width, sets,
           items + token * tile.dim * Elements<kType>::kBytes);
  }
}

}  // namespace
}  // namespace kvkernels
