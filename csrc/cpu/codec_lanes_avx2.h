// The lanes of the codecs' kernels for AVX2: eight numbers at a time. Comments are in
// codec_lanes_avx512.h, which has the same functions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "cpu/simd_avx2.h"
#include "kvkernels/attention.h"

namespace kvkernels {
namespace {

constexpr int64_t kLanes = 8;
using Floats = __m256;
using Words = __m256i;

inline Floats all(float value) { return _mm256_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats inverse_of(Floats v) {
  const Floats is_positive = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ);
  return _mm256_and_ps(is_positive, _mm256_div_ps(_mm256_set1_ps(1.0f), v));
}

inline Floats where_small(Floats test, Floats a, Floats b) {
  const Floats limit = _mm256_set1_ps(0x1p-14f);
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(abs_lanes(test), limit, _CMP_LT_OQ));
}
inline bool any_small(Floats a, Floats b) {
  const Words one = _mm256_set1_epi32(1);
  const Words least = _mm256_min_epu32(_mm256_sub_epi32(_mm256_castps_si256(abs_lanes(a)), one),
                                       _mm256_sub_epi32(_mm256_castps_si256(abs_lanes(b)), one));
  const Words limit = _mm256_castps_si256(all(0x1.1p-14f));
  const Words is_small = _mm256_cmpeq_epi32(_mm256_min_epu32(least, limit), least);
  return _mm256_movemask_epi8(is_small) != 0;
}

// `count` items, up to kLanes, padded with zeros.
template <typename Item>
struct Padded {
  Padded(const void* from, int64_t count) { std::memcpy(items, from, count * sizeof(Item)); }
  alignas(32) Item items[kLanes] = {};
};

inline Floats load_floats(const float* from, int64_t count) {
  if (count >= kLanes) return _mm256_loadu_ps(from);
  return _mm256_load_ps(Padded<float>(from, count).items);
}
inline void store_floats(float* to, Floats v) { _mm256_storeu_ps(to, v); }

inline Words half_nearest(Floats v) {
  return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Words half_below(Floats v) {
  return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
// The low 16 bits of each word.
inline __m128i low_halves(Words v) {
  const Words low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
inline Floats from_half(Words half) { return _mm256_cvtph_ps(low_halves(half)); }

inline void store_pairs(uint16_t* to, Words first, Words second, int64_t count) {
  alignas(32) uint32_t pairs[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(pairs),
                     _mm256_or_si256(first, _mm256_slli_epi32(second, 16)));
  std::memcpy(to, pairs, std::min(count, kLanes) * sizeof(uint32_t));
}
inline void load_pairs(const uint16_t* from, int64_t count, Floats& first, Floats& second) {
  const Padded<uint32_t> pairs(from, std::min(count, kLanes));
  const Words both = _mm256_load_si256(reinterpret_cast<const __m256i*>(pairs.items));
  first = from_half(both);
  second = from_half(_mm256_srli_epi32(both, 16));
}

template <int kBits>
inline Words code_at(Floats code, int part) {
  const Floats bounded = _mm256_min_ps(code, _mm256_set1_ps((1 << kBits) - 1));
  // In a float of this size the last bit counts units.
  const Words bits = _mm256_castps_si256(_mm256_add_ps(bounded, _mm256_set1_ps(0x1.8p23f)));
  const Words low = _mm256_and_si256(bits, _mm256_set1_epi32((1 << kBits) - 1));
  return part == 0 ? low : _mm256_slli_epi32(low, kBits * part);
}
inline Words either(Words a, Words b) { return _mm256_or_si256(a, b); }
inline Words no_words() { return _mm256_setzero_si256(); }
inline void store_bytes(uint8_t* to, Words v, int64_t count) {
  const __m128i halves = low_halves(v);
  const uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves)));
  std::memcpy(to, &bytes, std::min(count, kLanes));
}
inline Words load_bytes(const uint8_t* from, int64_t count) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, from, std::min(count, kLanes));
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
}
template <int kBits>
inline Floats code_from(Words packed, int part) {
  const Words shifted = part == 0 ? packed : _mm256_srli_epi32(packed, kBits * part);
  if (kBits == 8) return _mm256_cvtepi32_ps(shifted);
  return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32((1 << kBits) - 1)));
}
inline Floats restore(Floats low, Floats scale, Floats code) {
  return _mm256_fmadd_ps(scale, code, low);
}

inline Words larger_magnitude(Words largest, Floats v) {
  return _mm256_max_epu32(largest,
                          _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
}
inline uint32_t largest_lane(Words v) {
  alignas(32) uint32_t lanes[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  return *std::max_element(lanes, lanes + kLanes);
}

template <typename Combine>
inline Floats combine_each(const Floats* v, const Combine& combine) {
  Floats lanes[kLanes];
  std::copy_n(v, kLanes, lanes);
  transpose_8x8(lanes);
  for (int i = 1; i < kLanes; ++i) lanes[0] = combine(lanes[0], lanes[i]);
  return lanes[0];
}
inline Floats least_of_each(const Floats* v) {
  return combine_each(v, [](Floats a, Floats b) { return _mm256_min_ps(a, b); });
}
inline Floats greatest_of_each(const Floats* v) {
  return combine_each(v, [](Floats a, Floats b) { return _mm256_max_ps(a, b); });
}

template <DType kType>
struct Elements;

template <typename E, int64_t kSize>
struct ElementsOf {
  static constexpr int64_t kBytes = kSize;
  static constexpr bool kHasPairs = false;
  static constexpr int kLineVectors = 0;  // nothing is streamed
  using Item = typename E::Item;
  static Floats read(const std::byte* from, int64_t count) {
    if (count >= kLanes) return E::load(reinterpret_cast<const Item*>(from));
    return E::load(Padded<Item>(from, count).items);
  }
  static void write(std::byte* to, Floats v, int64_t count) {
    if (count >= kLanes) return E::store(reinterpret_cast<Item*>(to), v);
    alignas(32) Item items[kLanes];
    E::store(items, v);
    std::memcpy(to, items, count * kSize);
  }
  static Floats round(Floats v) {
    alignas(32) Item items[kLanes];
    E::store(items, v);
    return E::load(items);
  }

  using Range = Floats;
  static constexpr bool kRangesSeeAll = false;
  static Range read_range(const std::byte* from, int64_t count) { return read(from, count); }
  static Range least(Range a, Range b) { return min(a, b); }
  static Range greatest(Range a, Range b) { return max(a, b); }
  static Range repeat_first(Range v, int64_t count) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, v);
    std::fill(lanes + count, lanes + kLanes, lanes[0]);
    return _mm256_load_ps(lanes);
  }
  static Floats floats(Range v) { return v; }
};
template <>
struct Elements<DType::kFloat32> : ElementsOf<Float32, 4> {};
template <>
struct Elements<DType::kFloat16> : ElementsOf<Float16, 2> {};
template <>
struct Elements<DType::kBFloat16> : ElementsOf<BFloat16, 2> {};

}  // namespace
}  // namespace kvkernels
