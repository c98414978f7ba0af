// Finds the scales of sets of elements. Written in terms of the lanes of an instruction set: to be
// included after one of the codec_lanes_*.h. Every lane works on one set.
#pragma once

#include <cstdint>

#include "kvkernels/attention.h"

namespace kvkernels {
namespace {

// What turns numbers into codes; one set of codes per lane.
struct Steps {
  Floats low, inverse;
  Floats top;    // the greatest code
  bool has_top;  // whether it may be less than the largest code of these bits, in any lane
};

// The code of a number, before rounding and bounding. Rounded it is never below zero: a minimum is
// rounded down, or up by at most half of the smallest scale.
inline Floats find_code(Floats v, const Steps& steps) {
  return mul(sub(v, steps.low), steps.inverse);
}

template <int kBits, bool kHasTop>
inline Words to_code(Floats v, const Steps& steps, int part) {
  const Floats code = find_code(v, steps);
  return code_at<kBits>(kHasTop ? min(code, steps.top) : code, part);
}

// A scale, the code of the greatest element, and the number which that code restores.
struct Fit {
  Floats scale, top, restored;
};

template <DType kType>
inline Fit fit_scale(Floats low, Floats highest, Floats levels, Floats step) {
  const auto code_of_highest = [&](Floats scale) {
    const Floats code = max(mul(sub(highest, low), inverse_of(scale)), all(0.0f));
    const Floats to_whole = all(0x1.8p23f);  // floats of this size are integers
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

// All steps of kvkernels/reference/quantize.py. Needed only for sets with tiny scales or minimums,
// which are rare.
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
  lowest = add(lowest, all(0.0f));  // turns minus zero into zero
  const Words minimum = half_below(lowest);
  const Floats low = from_half(minimum);
  const Floats first = from_half(half_nearest(mul(sub(highest, low), step)));
  // The threshold leaves room: the final scale may come out a little smaller than the first.
  if (any_small(lowest, first)) {
    return find_small_scales<kType>(lowest, highest, levels, step, pairs, count);
  }
  // Again for the range that the codes will restore: encoding restored numbers then gives the same
  // scale.
  const Floats restored = Elements<kType>::round(add(low, mul(first, levels)));
  const Words scale = half_nearest(mul(sub(restored, low), step));
  store_pairs(pairs, scale, minimum, count);
  return {low, inverse_of(from_half(scale)), levels, false};
}

}  // namespace
}  // namespace kvkernels
