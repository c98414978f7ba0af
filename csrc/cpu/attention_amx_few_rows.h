// The matrix-tile attention for one group of up to 16 rows, as decoding has them. In an anonymous
// namespace, as are all of its parts.
//
// Each tile of keys is used once, so what counts is that memory never rests: each step prefetches
// as many bytes of the next tile of keys as it reads of this one. Loading a tile register appears
// to wait for the products that read it before (a load and a product in turns took twice the longer
// of the two). So what many products share, the query and then the weights, stays in tiles 4 to 7.
#pragma once

#include "cpu/attention_amx_keys.h"
#include "cpu/attention_amx_softmax.h"

namespace kvkernels {
namespace {

// Loads the first kCount of them into tiles 4 to 7.
template <int kCount, typename Tiles>
void load_shared(Tiles& tiles, const uint16_t* shared) {
  tiles.template load<4>(shared, kTileBytes);
  if constexpr (kCount > 1) tiles.template load<5>(shared + kLanes * kStep, kTileBytes);
  if constexpr (kCount > 2) tiles.template load<6>(shared + 2 * kLanes * kStep, kTileBytes);
  if constexpr (kCount > 3) tiles.template load<7>(shared + 3 * kLanes * kStep, kTileBytes);
}

// Scores 16 keys of kSteps * kStep channels, in tile kC.
template <int kSteps, int kC, typename Tiles>
void score_part(Tiles& tiles, const KeyRows& keys, ReadAhead& next, float* scores) {
  tiles.template zero<kC>();
  tiles.template load<2>(keys.first, keys.stride);
  tiles.template dot<kC, 2, 4>();
  next.advance(kLanes * kTileBytes);
  if constexpr (kSteps > 1) {
    tiles.template load<3>(keys.first + kStep, keys.stride);
    tiles.template dot<kC, 3, 5>();
    next.advance(kLanes * kTileBytes);
  }
  if constexpr (kSteps > 2) {
    tiles.template load<2>(keys.first + 2 * kStep, keys.stride);
    tiles.template dot<kC, 2, 6>();
    next.advance(kLanes * kTileBytes);
  }
  if constexpr (kSteps > 3) {
    tiles.template load<3>(keys.first + 3 * kStep, keys.stride);
    tiles.template dot<kC, 3, 7>();
    next.advance(kLanes * kTileBytes);
  }
  tiles.template store<kC>(scores, kTileBytes);
}

template <int kSteps, typename Tiles>
void score_narrow(Tiles& tiles, const Work& work, const KeyRows* keys, ReadAhead& next) {
  load_shared<kSteps>(tiles, work.query);
  for (int64_t part = 0; part < kParts; part += 2) {
    float* scores = work.scores + part * kLanes * kLanes;
    score_part<kSteps, 0>(tiles, keys[part], next, scores);
    score_part<kSteps, 1>(tiles, keys[part + 1], next, scores + kLanes * kLanes);
  }
}

// For a query that fills more than four tiles.
template <typename Tiles>
void score_wide(Tiles& tiles, const Work& work, const KeyRows* keys, ReadAhead& next) {
  for (int64_t part = 0; part < kParts; part += 2) {
    tiles.template zero<0>();
    tiles.template zero<1>();
    for (int64_t i = 0; i < work.head_dim; i += kStep) {
      tiles.template load<4>(work.query + i * kLanes, kTileBytes);
      tiles.template load<2>(keys[part].first + i, keys[part].stride);
      tiles.template dot<0, 2, 4>();
      tiles.template load<3>(keys[part + 1].first + i, keys[part + 1].stride);
      tiles.template dot<1, 3, 4>();
      next.advance(2 * kLanes * kTileBytes);
    }
    float* scores = work.scores + part * kLanes * kLanes;
    tiles.template store<0>(scores, kTileBytes);
    tiles.template store<1>(scores + kLanes * kLanes, kTileBytes);
  }
}

template <typename Tiles>
void score(Tiles& tiles, const Work& work, const KeyRows* keys, ReadAhead& next) {
  switch (work.head_dim / kStep) {
    case 1:
      return score_narrow<1>(tiles, work, keys, next);
    case 2:
      return score_narrow<2>(tiles, work, keys, next);
    case 3:
      return score_narrow<3>(tiles, work, keys, next);
    case 4:
      return score_narrow<4>(tiles, work, keys, next);
    default:
      return score_wide(tiles, work, keys, next);
  }
}

// Adds 32 channels of the values, which lie interleaved at `ready`, by the weights in tiles 4 to 7.
// Calls between(j) for j = 0 to 7 among the products, since each product waits for the one before:
// with nothing between them, all of their latency is lost (memory was read at 13 GB/s, not at 18).
template <typename Tiles, typename Between>
void add_channels(Tiles& tiles, const uint16_t* ready, float* out, const Between& between) {
  constexpr int64_t kTileSize = kLanes * kLanes, kPairs = kLanes * kStep;
  const uint16_t* others = ready + kKeys * kLanes;
  tiles.template load<0>(out, kTileBytes);
  tiles.template load<1>(out + kTileSize, kTileBytes);
  tiles.template load<2>(ready, kTileBytes);
  tiles.template dot<0, 4, 2>();
  between(0);
  tiles.template load<3>(others, kTileBytes);
  tiles.template dot<1, 4, 3>();
  between(1);
  tiles.template load<2>(ready + kPairs, kTileBytes);
  tiles.template dot<0, 5, 2>();
  between(2);
  tiles.template load<3>(others + kPairs, kTileBytes);
  tiles.template dot<1, 5, 3>();
  between(3);
  tiles.template load<2>(ready + 2 * kPairs, kTileBytes);
  tiles.template dot<0, 6, 2>();
  between(4);
  tiles.template load<3>(others + 2 * kPairs, kTileBytes);
  tiles.template dot<1, 6, 3>();
  between(5);
  tiles.template load<2>(ready + 3 * kPairs, kTileBytes);
  tiles.template dot<0, 7, 2>();
  between(6);
  tiles.template load<3>(others + 3 * kPairs, kTileBytes);
  tiles.template dot<1, 7, 3>();
  between(7);
  tiles.template store<0>(out, kTileBytes);
  tiles.template store<1>(out + kTileSize, kTileBytes);
}

// Adds the values by the weights, 32 channels at a time. The next channels are interleaved while
// the ones before are multiplied, in two alternating buffers, small enough to stay in the L1 cache.
template <typename Tiles>
void add_values(Tiles& tiles, const Work& work, const ValueRows& values, ReadAhead& next) {
  constexpr int64_t kKeysBetween = kKeys / 8;
  static_assert(kHalves == 4);
  load_shared<kHalves>(tiles, work.weights);
  const uint16_t* ready = nullptr;
  float* out = work.out;
  for (int64_t i = 0; i < work.value_dim; i += kStep) {
    uint16_t* pairs = work.values + i / kStep % 2 * kKeys * kStep;
    const auto interleave_some = [&](int64_t j) {
      for (int64_t t = j * kKeysBetween; t < (j + 1) * kKeysBetween; t += 8) {
#pragma GCC unroll 4
        for (int64_t n = 0; n < 8; n += 2) interleave(values, t + n, i, pairs);
        next.advance(8 * kTileBytes);
      }
    };
    if (ready == nullptr) {
      for (int64_t j = 0; j < 8; ++j) interleave_some(j);
    } else {
      add_channels(tiles, ready, out, interleave_some);
      out += kLanes * kStep;
    }
    ready = pairs;
  }
  add_channels(tiles, ready, out, [](int64_t) {});
}

// Attends the rows to the tile of keys [begin, end).
template <typename Tiles>
void attend_few_rows(Tiles& tiles, Work& work, int64_t begin, int64_t end, const KeyRows* keys,
                     const ValueRows& values, ReadAhead& next) {
  score(tiles, work, keys, next);
  if (work.adjusts) adjust_group(work, 0, begin, end - begin, work.scores);
  weigh(work, 0, begin, work.scores, work.weights);
  add_values(tiles, work, values, next);
}

}  // namespace
}  // namespace kvkernels
