// Tiles of keys as decoding, with few query rows, goes through them: where the keys and values lie,
// and the memory to prefetch for them.
#pragma once

#include <algorithm>

#include "cpu/attention_code_runs.h"

namespace kvkernels {
namespace {

// How a tile's keys and values are used. kPlain: where they lie, being of the query's dtype.
// kCodes: as codes, where all blocks hold codes of one kind that suit the kernels. kUnpacked: after
// unpacking to dense rows of one element type.
enum class Form { kPlain, kCodes, kUnpacked };

// Up to kSize keys: where their rows start, for the first head, and the memory they occupy.
template <int64_t kSize>
struct KeyTile {
  int64_t begin, end;  // positions in the sequence; equal: no keys are left
  Form form;
  CodeRuns codes;
  int64_t keys[kSize], values[kSize];  // offsets of rows, in elements; unused for codes
  Spans key_spans, value_spans;

  int64_t num_keys() const { return end - begin; }
};

// Finds the keys and values from `begin` on. Unused offsets repeat the last row, so that loops over
// a fixed number of rows read nothing outside the sequence.
template <int64_t kSize>
void find_tile(const AttentionTile& tile, int64_t begin, FindCodeKernels kernels_of,
               KeyTile<kSize>& found) {
  found.begin = begin;
  found.end = begin < tile.key_end ? key_tile_end(tile, begin, kSize) : begin;
  const int64_t num_keys = found.num_keys();
  find_spans(tile, found.begin, found.end, found.key_spans, found.value_spans);
  if (num_keys == 0) return;
  if (lies_plain(tile, begin, found.end)) {
    found.form = Form::kPlain;
    find_rows(tile, begin, found.end, found.keys, found.values);
  } else {
    find_code_runs(tile, begin, found.end, kernels_of, found.codes);
    found.form = found.codes.count > 0 ? Form::kCodes : Form::kUnpacked;
    if (found.form == Form::kCodes) return;
    for (int64_t token = 0; token < num_keys; ++token) {
      found.keys[token] = token * tile.args->head_dim;
      found.values[token] = token * tile.args->value_dim;
    }
  }
  std::fill(found.keys + num_keys, found.keys + kSize, found.keys[num_keys - 1]);
  std::fill(found.values + num_keys, found.values + kSize, found.values[num_keys - 1]);
}

}  // namespace
}  // namespace kvkernels
