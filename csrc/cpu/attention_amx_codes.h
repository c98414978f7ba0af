// Attention for few rows of bfloat16 where blocks may hold codes: 4-bit codes on matrix tiles,
// everything else by the AVX-512 kernels. In an anonymous namespace: each file that includes this
// gets its own copy, compiled with that file's flags.
#pragma once

#include "cpu/attention_amx_code_keys.h"
#include "cpu/attention_amx_code_values.h"
#include "cpu/attention_kernel.h"

namespace kvkernels {
namespace {

inline bool suits_tiles(const CodeShape& shape) {
  const auto suits = [](int64_t dim) { return dim % 64 == 0 && dim / 64 <= kMaxPieces; };
  // Smaller blocks would leave most of a tile of values empty. 8-bit codes were no faster than by
  // integer dot products.
  return shape.is_int4 && suits_vectors(shape) && suits(shape.head_dim) && suits(shape.value_dim) &&
         shape.block_size % kMaxKeys == 0;
}

template <typename Tiles>
constexpr CodeKernels kTileCodes = {suits_tiles, kMaxTileHeads, score_on_tiles<Tiles>,
                                    add_on_tiles<Tiles>};

template <typename Tiles>
const CodeKernels* find_code_kernels(const CodeShape& shape) {
  const CodeKernels* const others = avx512_vnni_code_kernels();
  return others != nullptr && suits_tiles(shape) ? &kTileCodes<Tiles> : others;
}

template <typename Tiles>
void attend_codes(const AttentionTile& tile, const TileResult* results) {
  [[maybe_unused]] const Tiles tiles;  // configures the registers, and releases them at the end
  attend_few_rows_avx512(tile, results, find_code_kernels<Tiles>);
}

}  // namespace
}  // namespace kvkernels
