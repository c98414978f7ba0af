// Reads a row's items while scales and codes are found, one or two vectors of lanes at a time. In
// terms of the lanes of an instruction set, like codec_scales.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/codec_scales.h"

namespace kvkernels {
namespace {

template <typename E, int kVectors>
struct Items;

// One vector; `count` may be less than kLanes.
template <typename E>
struct Items<E, 1> {
  using Range = typename E::Range;
  static Range read_range(const std::byte* from, int64_t count) {
    return E::read_range(from, count);
  }
  static void to_floats(Range v, Floats* out) { out[0] = E::floats(v); }
  static void read(const std::byte* from, int64_t count, Floats* out) {
    out[0] = E::read(from, count);
  }
  static void arrange(Steps*) {}
  static void store_codes(uint8_t* to, const Words* v, int64_t count) {
    store_bytes(to, v[0], count);
  }
};

// Two vectors of 16-bit numbers, in the order in which `Elements16` reads pairs of vectors.
template <typename E>
struct Items<E, 2> {
  using Range = typename E::PairRange;
  static Range read_range(const std::byte* from, int64_t) { return E::read_pair_range(from); }
  static void to_floats(Range v, Floats* out) {
    out[0] = E::floats(E::first_half(v));
    out[1] = E::floats(E::last_half(v));
  }
  static void read(const std::byte* from, int64_t, Floats* out) {
    E::read_pair(from, out[0], out[1]);
  }
  // Brings steps of neighbouring channels into that order.
  static void arrange(Steps* steps) {
    E::arrange(steps[0].low, steps[1].low);
    E::arrange(steps[0].inverse, steps[1].inverse);
    E::arrange(steps[0].top, steps[1].top);
  }
  static void store_codes(uint8_t* to, const Words* v, int64_t) { E::store_codes(to, v[0], v[1]); }
};

// The most vectors read together, where neighbouring items fill as many.
template <typename E>
constexpr int kMostVectors = E::kHasPairs ? 2 : 1;

}  // namespace
}  // namespace kvkernels
