// The lanes of the codecs' kernels for any processor: eight numbers at a time, in plain C++.
// Comments are in codec_lanes_avx512.h, which has the same functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "cpu/float_formats.h"
#include "kvkernels/attention.h"

namespace kvkernels {
namespace {

constexpr int64_t kLanes = 8;

struct Floats {
  float v[kLanes];
};
struct Words {
  uint32_t v[kLanes];
};

template <typename To, typename Make>
inline To lanes_of(const Make& make) {
  To result;
  for (int64_t i = 0; i < kLanes; ++i) result.v[i] = make(i);
  return result;
}

inline Floats all(float value) {
  return lanes_of<Floats>([&](int64_t) { return value; });
}
inline Floats add(Floats a, Floats b) {
  return lanes_of<Floats>([&](int64_t i) { return a.v[i] + b.v[i]; });
}
inline Floats sub(Floats a, Floats b) {
  return lanes_of<Floats>([&](int64_t i) { return a.v[i] - b.v[i]; });
}
inline Floats mul(Floats a, Floats b) {
  return lanes_of<Floats>([&](int64_t i) { return a.v[i] * b.v[i]; });
}
inline Floats min(Floats a, Floats b) {
  return lanes_of<Floats>([&](int64_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats max(Floats a, Floats b) {
  return lanes_of<Floats>([&](int64_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats inverse_of(Floats v) {
  return lanes_of<Floats>([&](int64_t i) { return v.v[i] > 0 ? 1.0f / v.v[i] : 0.0f; });
}

inline Floats where_small(Floats test, Floats a, Floats b) {
  return lanes_of<Floats>(
      [&](int64_t i) { return std::abs(test.v[i]) < 0x1p-14f ? a.v[i] : b.v[i]; });
}
inline bool any_small(Floats a, Floats b) {
  bool any = false;
  for (int64_t i = 0; i < kLanes; ++i) {
    const auto is_small = [](float v) { return std::abs(v) < 0x1.1p-14f && v != 0; };
    any |= is_small(a.v[i]) || is_small(b.v[i]);
  }
  return any;
}

inline Floats load_floats(const float* from, int64_t count) {
  Floats v = {};
  std::memcpy(v.v, from, std::min(count, kLanes) * sizeof(float));
  return v;
}
inline void store_floats(float* to, Floats v) { std::memcpy(to, v.v, sizeof(v.v)); }

inline uint32_t half_of(float value) {
  Float16 half;
  from_float(value, half);
  return half.bits;
}
inline float half_value(uint32_t half) { return to_float(Float16{static_cast<uint16_t>(half)}); }
inline Words half_nearest(Floats v) {
  return lanes_of<Words>([&](int64_t i) { return half_of(v.v[i]); });
}
inline Words half_below(Floats v) {
  return lanes_of<Words>([&](int64_t i) {
    const uint32_t half = half_of(v.v[i]);
    if (half_value(half) <= v.v[i]) return half;
    // The next lower float16: towards zero from positive numbers, away from it otherwise.
    return half == 0 ? 0x8001u : half & 0x8000u ? half + 1 : half - 1;
  });
}
inline Floats from_half(Words half) {
  return lanes_of<Floats>([&](int64_t i) { return half_value(half.v[i] & 0xffff); });
}

inline void store_pairs(uint16_t* to, Words first, Words second, int64_t count) {
  const Words both = lanes_of<Words>([&](int64_t i) { return first.v[i] | second.v[i] << 16; });
  std::memcpy(to, both.v, std::min(count, kLanes) * sizeof(uint32_t));
}
inline void load_pairs(const uint16_t* from, int64_t count, Floats& first, Floats& second) {
  Words both = {};
  std::memcpy(both.v, from, std::min(count, kLanes) * sizeof(uint32_t));
  first = from_half(both);
  second = from_half(lanes_of<Words>([&](int64_t i) { return both.v[i] >> 16; }));
}

template <int kBits>
inline Words code_at(Floats code, int part) {
  return lanes_of<Words>([&](int64_t i) {
    const float bounded = std::min(code.v[i], static_cast<float>((1 << kBits) - 1));
    return (bits_from_float(bounded + 0x1.8p23f) & ((1u << kBits) - 1)) << (kBits * part);
  });
}
inline Words either(Words a, Words b) {
  return lanes_of<Words>([&](int64_t i) { return a.v[i] | b.v[i]; });
}
inline Words no_words() { return {}; }
inline void store_bytes(uint8_t* to, Words v, int64_t count) {
  uint8_t bytes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) bytes[i] = static_cast<uint8_t>(v.v[i]);
  std::memcpy(to, bytes, std::min(count, kLanes));
}
inline Words load_bytes(const uint8_t* from, int64_t count) {
  uint8_t bytes[kLanes] = {};
  std::memcpy(bytes, from, std::min(count, kLanes));
  return lanes_of<Words>([&](int64_t i) { return bytes[i]; });
}
template <int kBits>
inline Floats code_from(Words packed, int part) {
  return lanes_of<Floats>([&](int64_t i) {
    return static_cast<float>((packed.v[i] >> (kBits * part)) & ((1u << kBits) - 1));
  });
}
inline Floats restore(Floats low, Floats scale, Floats code) { return add(low, mul(scale, code)); }

inline Words larger_magnitude(Words largest, Floats v) {
  return lanes_of<Words>(
      [&](int64_t i) { return std::max(largest.v[i], bits_from_float(v.v[i]) & 0x7fffffff); });
}
inline uint32_t largest_lane(Words v) { return *std::max_element(v.v, v.v + kLanes); }

inline Floats least_of_each(const Floats* v) {
  return lanes_of<Floats>([&](int64_t i) { return *std::min_element(v[i].v, v[i].v + kLanes); });
}
inline Floats greatest_of_each(const Floats* v) {
  return lanes_of<Floats>([&](int64_t i) { return *std::max_element(v[i].v, v[i].v + kLanes); });
}

template <DType kType>
struct Elements;

template <typename Item>
struct ElementsOf {
  static constexpr int64_t kBytes = sizeof(Item);
  static constexpr bool kHasPairs = false;
  static constexpr int kLineVectors = 0;  // nothing is streamed
  static Floats read(const std::byte* from, int64_t count) {
    Item items[kLanes] = {};
    std::memcpy(items, from, std::min(count, kLanes) * sizeof(Item));
    return lanes_of<Floats>([&](int64_t i) { return to_float(items[i]); });
  }
  static void write(std::byte* to, Floats v, int64_t count) {
    Item items[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) from_float(v.v[i], items[i]);
    std::memcpy(to, items, std::min(count, kLanes) * sizeof(Item));
  }
  static Floats round(Floats v) {
    return lanes_of<Floats>([&](int64_t i) {
      Item item;
      from_float(v.v[i], item);
      return to_float(item);
    });
  }

  using Range = Floats;
  static constexpr bool kRangesSeeAll = false;
  static Range read_range(const std::byte* from, int64_t count) { return read(from, count); }
  static Range least(Range a, Range b) { return min(a, b); }
  static Range greatest(Range a, Range b) { return max(a, b); }
  static Range repeat_first(Range v, int64_t count) {
    return lanes_of<Range>([&](int64_t i) { return v.v[i < count ? i : 0]; });
  }
  static Floats floats(Range v) { return v; }
};
template <>
struct Elements<DType::kFloat32> : ElementsOf<float> {};
template <>
struct Elements<DType::kFloat16> : ElementsOf<Float16> {};
template <>
struct Elements<DType::kBFloat16> : ElementsOf<BFloat16> {};

}  // namespace
}  // namespace kvkernels
