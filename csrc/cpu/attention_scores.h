// What happens to a score between the product and the softmax beside scaling: soft cap, ALiBi, tree
// mask. All static, because files compiled for different instruction sets include this.
#pragma once

#include <cmath>

#include "cpu/attention_kernel.h"
#include "cpu/float_bits.h"

namespace kvkernels {

// Whether scores need more than a factor and a range of visible keys.
static inline bool adjusts_scores(const PagedAttentionArgs& args) {
  return args.soft_cap > 0 || args.alibi_slopes != nullptr || args.tree_mask != nullptr;
}

// scores = cap * tanh(scores / cap). With x = score / cap and e = exp(-2 |x|), tanh |x| is (1 - e)
// / (1 + e). Scores may be small beside the cap, so 1 - e is computed in one function that keeps
// its last places.
static inline void cap_scores(float cap, int64_t count, float* scores) {
  const float factor = -2.0f * kLog2E / cap;
  for (int64_t t = 0; t < count; ++t) {
    const float score = scores[t];
    const float missing = one_minus_exp2(std::fabs(score) * factor);
    const float bounded = cap * missing / (2.0f - missing);
    scores[t] = score < 0 ? -bounded : bounded;
  }
}

// One query of a tree of new tokens: its position, and which new tokens it sees.
struct TreeRow {
  int64_t position;
  uint32_t sees;  // bit j: the j-th new token
};

static inline TreeRow tree_row(const AttentionTile& tile, int64_t index) {
  const int64_t num_queries = tile.seq_len - tile.first_position;
  const uint32_t all = (uint32_t{1} << num_queries) - 1;
  const uint32_t sees = static_cast<uint32_t>(tile.args->tree_mask[tile.first_token + index]) & all;
  const uint32_t others = sees & ~(uint32_t{1} << index);
  return {tile.first_position + __builtin_popcount(others), sees};
}

// Masks the keys that a row of a tree does not see, and applies ALiBi, which goes by positions in
// the tree.
static inline void adjust_tree_row(const AttentionTile& tile, const TreeRow& row, float slope,
                                   int64_t begin, int64_t count, float* scores) {
  const int64_t window = tile.args->window;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t index = begin + t - tile.first_position;  // among the new tokens
    int64_t position = begin + t;
    bool is_seen = true;
    if (index >= 0) {
      position = tree_row(tile, index).position;
      is_seen = (row.sees >> index) & 1;
    }
    is_seen = is_seen && (window == 0 || position > row.position - window);
    const float distance = static_cast<float>(std::abs(row.position - position));
    scores[t] = is_seen ? scores[t] - slope * distance : -kInfinity;
  }
}

// Turns the products of one row with the `count` keys from `begin` on into scores in units of log2,
// in place. `head` counts within the tile. Scores of keys outside the row's range stay arbitrary.
static inline void adjust_scores(const AttentionTile& tile, int64_t row, int64_t head,
                                 int64_t begin, int64_t count, float* scores) {
  const PagedAttentionArgs& args = *tile.args;
  const int64_t group = args.num_heads / args.num_kv_heads;
  const int64_t index = row / group;
  for (int64_t t = 0; t < count; ++t) scores[t] *= args.sm_scale;
  if (args.soft_cap > 0) cap_scores(args.soft_cap, count, scores);
  float slope = 0;
  if (args.alibi_slopes != nullptr) {
    slope = args.alibi_slopes[(tile.kv_head + head) * group + row % group];
  }
  if (args.tree_mask != nullptr) {
    // Positions may be negative here, in a sequence with more queries than tokens.
    adjust_tree_row(tile, tree_row(tile, index), slope, begin, count, scores);
  } else if (slope != 0) {
    const auto first = static_cast<int32_t>(begin - tile.first_position - index);
    for (int32_t t = 0; t < static_cast<int32_t>(count); ++t) {
      scores[t] -= slope * std::fabs(static_cast<float>(first + t));
    }
  }
  for (int64_t t = 0; t < count; ++t) scores[t] *= kLog2E;
}

}  // namespace kvkernels
