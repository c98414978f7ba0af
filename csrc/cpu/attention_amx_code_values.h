// Sums of values held as 4-bit codes, on matrix tiles of bytes (see attention_amx_code_numbers.h):
//
//   O [16, 16 channels] += x [16, 64 keys] * codes, four keys of a channel side by side
//
// Rows 0 to 3 hold the low bytes of x for a batch of up to four rows of weights, rows 4 to 7 their
// high bytes, for the first half of a piece's channels; rows 8 to 15 hold those for the second
// half, whose scales may be others.
#pragma once

#include "cpu/attention_amx_code_numbers.h"

namespace kvkernels {
namespace {

// Rows of weights, multiplied by the scales of a tile's values and rounded to integers. Set r *
// groups + g is row r's for group g of channels. The four keys that lie side by side are t, t + 32,
// t + 16 and t + 48.
struct alignas(64) FoldedWeights {
  uint8_t low[kMaxSets][kMaxKeys], high[kMaxSets][kMaxKeys];
};

// What is added to a row = sum of products * unit + base, per set.
struct alignas(64) WeightUnits {
  float unit[kMaxSets], base[kMaxSets];
};

// A row of numbers for 64 keys; those outside `masks` are 0. kIsWhole: all 64 are there.
template <bool kIsWhole>
struct KeyVectors {
  __m512 v[4];

  KeyVectors(const KeyMasks& masks, const float* keys) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = kIsWhole ? _mm512_loadu_ps(keys + 16 * i) : masks.load(keys, 16 * i);
    }
  }

  // 16 candidates for the largest magnitude of a product with another row's number.
  __m512 largest_product(const KeyVectors& other) const {
    __m512 products[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) products[i] = _mm512_mul_ps(v[i], other.v[i]);
    return larger_magnitude(larger_magnitude(products[0], products[1]),
                            larger_magnitude(products[2], products[3]));
  }
};

template <bool kIsWhole>
void fold_weights(const float* weights, int64_t num_rows, const CodeRun& run,
                  const KeyScales& scales, FoldedWeights& folded, WeightUnits& rounded,
                  const AheadInSteps& next) {
  using Keys = KeyVectors<kIsWhole>;
  const int64_t groups = run.groups, num_sets = num_rows * groups;
  const KeyMasks masks(run.count);
  alignas(64) float largest[kMaxSets][16], inverse[kMaxSets], base[kMaxSets][16];
  int64_t set = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    const Keys row(masks, weights + r * kCodeRowStride);
    for (int64_t group = 0; group < groups; ++group, ++set) {
      _mm512_store_ps(largest[set], row.largest_product(Keys(masks, scales.scale[group])));
    }
  }
  for (; set % 16 != 0; ++set) _mm512_store_ps(largest[set], _mm512_setzero_ps());
  for (int64_t first = 0; first < num_sets; first += 16) {
    __m512 lanes[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) lanes[i] = _mm512_load_ps(largest[first + i]);
    const Units units = units_of(max_lanes_of_16(lanes), kLargestNumber);
    _mm512_store_ps(inverse + first, units.inverse);
    _mm512_store_ps(rounded.unit + first, units.unit);
  }
  set = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    next();
    const Keys row(masks, weights + r * kCodeRowStride);
    for (int64_t group = 0; group < groups; ++group, ++set) {
      const Keys scale(masks, scales.scale[group]), minimum(masks, scales.middle[group]);
      const __m512 to_numbers = _mm512_set1_ps(inverse[set]);
      __m512i numbers[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        numbers[i] = round_number(_mm512_mul_ps(row.v[i], scale.v[i]), to_numbers);
      }
      const __m512i a = join_halves(numbers[0], numbers[1]);
      const __m512i b = join_halves(numbers[2], numbers[3]);
      const __m512i evens = _mm512_set1_epi16(0xff);
      _mm512_store_si512(folded.low[set], center_low(select(evens, a, _mm512_slli_epi16(b, 8))));
      _mm512_store_si512(folded.high[set], select(evens, _mm512_srli_epi16(a, 8), b));
      const __m512 front =
          _mm512_fmadd_ps(row.v[1], minimum.v[1], _mm512_mul_ps(row.v[0], minimum.v[0]));
      const __m512 back =
          _mm512_fmadd_ps(row.v[3], minimum.v[3], _mm512_mul_ps(row.v[2], minimum.v[2]));
      _mm512_store_ps(base[set], _mm512_add_ps(front, back));
    }
  }
  for (; set % 16 != 0; ++set) _mm512_store_ps(base[set], _mm512_setzero_ps());
  for (int64_t first = 0; first < num_sets; first += 16) {
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_load_ps(base[first + i]);
    _mm512_store_ps(rounded.base + first, sum_lanes_of_16(sums));
  }
}

// A piece of the values. Tile j holds the channels 16 l + 4 j to 16 l + 4 j + 3 for l = 0 to 3.
struct alignas(64) ValueTiles {
  uint8_t bytes[4][kTile];
};

// What one code is in the bytes of a piece: those of the second are 16 times the codes.
constexpr float kCodeUnits[kMaxPieces] = {1, 0.0625f};

// Interleaves the rows of four keys: each 4 bytes of the vectors are of one channel.
void interleave_rows(const __m512i* rows, __m512i* fours) {
  const __m512i a = _mm512_unpacklo_epi8(rows[0], rows[1]);
  const __m512i b = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi8(rows[2], rows[3]);
  const __m512i d = _mm512_unpackhi_epi8(rows[2], rows[3]);
  fours[0] = _mm512_unpacklo_epi16(a, c);
  fours[1] = _mm512_unpackhi_epi16(a, c);
  fours[2] = _mm512_unpacklo_epi16(b, d);
  fours[3] = _mm512_unpackhi_epi16(b, d);
}

// Writes values, four keys side by side. Keys past the last have weight 0, so they may hold any
// codes. kIsWhole: there are none.
template <int kPieces, bool kIsWhole>
void interleave_values(const CodeRun& run, ValueTiles* pieces, const AheadInSteps& next) {
  constexpr int64_t kRowBytes = kPieces * kPieceBytes;
  const uint8_t* codes = run.codes + run.slot * kRowBytes;
  for (int64_t t = 0; t < 16; ++t) {
    if (t % 2 == 0) next();
    const auto row_of = [&](int64_t key) {
      if (!kIsWhole) key = std::min(key, run.count - 1);
      const uint8_t* row = codes + key * kRowBytes;
      return kPieces == 1 ? load_piece(row) : _mm512_loadu_si512(row);
    };
    const __m512i rows[4] = {row_of(t), row_of(t + 32), row_of(t + 16), row_of(t + 48)};
    __m512i fours[4];
    interleave_rows(rows, fours);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if constexpr (kPieces == 1) {
        _mm512_store_si512(pieces[0].bytes[j] + t * kTileRow, fours[j]);
      } else {
        _mm512_store_si512(pieces[0].bytes[j] + t * kTileRow, low_codes(fours[j]));
        _mm512_store_si512(pieces[1].bytes[j] + t * kTileRow, high_codes(fours[j]));
      }
    }
  }
}

// Writes the bytes of a batch's weights, for both halves of a piece.
void pack_weights(const FoldedWeights& folded, const int64_t* groups, int64_t num_groups,
                  int64_t num_rows, uint8_t* tile) {
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t set = r * num_groups + groups[half];
      uint8_t* const row = tile + (8 * half + r) * kTileRow;
      _mm512_store_si512(row, _mm512_load_si512(folded.low[set]));
      _mm512_store_si512(row + kMaxBatch * kTileRow, _mm512_load_si512(folded.high[set]));
    }
  }
}

// Sums of products: [tile of values, row, channel].
struct alignas(64) ValueSums {
  int32_t sums[4][16][16];
};

template <typename Tiles>
void multiply_values(const uint8_t* weights, const ValueTiles& values, ValueSums& sums) {
  Tiles::template load<4>(weights, kTileRow);
  Tiles::template zero<0>();
  Tiles::template load<5>(values.bytes[0], kTileRow);
  Tiles::template dot_signed_unsigned<0, 4, 5>();
  Tiles::template zero<1>();
  Tiles::template load<6>(values.bytes[1], kTileRow);
  Tiles::template dot_signed_unsigned<1, 4, 6>();
  Tiles::template zero<2>();
  Tiles::template load<7>(values.bytes[2], kTileRow);
  Tiles::template dot_signed_unsigned<2, 4, 7>();
  Tiles::template zero<3>();
  Tiles::template load<5>(values.bytes[3], kTileRow);
  Tiles::template dot_signed_unsigned<3, 4, 5>();
  Tiles::template store<0>(sums.sums[0], kTileRow);
  Tiles::template store<1>(sums.sums[1], kTileRow);
  Tiles::template store<2>(sums.sums[2], kTileRow);
  Tiles::template store<3>(sums.sums[3], kTileRow);
}

// Turns sums of integers into floats and adds them to a batch's rows of sums.
void add_sums(const ValueSums& products, const WeightUnits& rounded, const int64_t* groups,
              int64_t num_groups, int64_t dim, int64_t piece, int64_t num_rows, const float* decay,
              float* sums, const AheadInSteps& next) {
  for (int64_t r = 0; r < num_rows; ++r) {
    next();
    __m512 channels[4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const int32_t (*tile)[16] = products.sums[j];
      const auto both_halves = [&](int64_t row) {
        return _mm512_mask_load_epi32(_mm512_load_si512(tile[row]), 0xff00, tile[8 + row]);
      };
      channels[j] = _mm512_cvtepi32_ps(join_sums(both_halves(r), both_halves(kMaxBatch + r)));
    }
    transpose_quarters(channels);
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t set = r * num_groups + groups[half];
      const __m512 unit = _mm512_set1_ps(rounded.unit[set] * kCodeUnits[piece]);
      const __m512 base = _mm512_set1_ps(rounded.base[set]);
      const __m512 before = _mm512_set1_ps(decay[r]);
      float* const row = sums + r * dim + 64 * piece + 32 * half;
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i) {
        const __m512 added = _mm512_fmadd_ps(channels[2 * half + i], unit, base);
        _mm512_storeu_ps(row + 16 * i,
                         _mm512_fmadd_ps(_mm512_loadu_ps(row + 16 * i), before, added));
      }
    }
  }
}

// The group of channels of each half of a row's pieces.
struct PieceGroups {
  int64_t of[kMaxPieces][2];

  PieceGroups(int64_t num_pieces, int64_t group_size) {
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
      for (int64_t half = 0; half < 2; ++half) {
        of[piece][half] = (64 * piece + 32 * half) / group_size;
      }
    }
  }
};

// Adds the values of all jobs. While the products of one job are made, the next job is prepared.
template <int kPieces, typename Tiles>
void add_jobs(const ValueJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& ahead) {
  constexpr int64_t kDim = 64 * kPieces;
  const CodeRun& any = jobs->values;
  const PieceGroups groups(kPieces, kDim / any.groups);
  KeyScales scales;
  FoldedWeights folded;
  WeightUnits rounded[2][kMaxBatches];
  alignas(64) uint8_t weights[kMaxBatches][kPieces][kTile];
  ValueTiles values[kPieces];
  ValueSums products[kMaxBatches][kPieces];
  // next() is called once for each row folded, once for each row and piece added, and 8 times while
  // values are interleaved.
  const int64_t num_steps = num_rows * (1 + kPieces) + 8;
  const auto prepare = [&](const ValueJob& job, WeightUnits* units, const AheadInSteps& next) {
    const CodeRun& run = job.values;
    Tiles::keep_awake();
    spread_scales(run, 0, scales);
    int64_t batch = 0;
    for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t count) {
      (run.count == kMaxKeys ? fold_weights<true>
                             : fold_weights<false>)(job.weights + first * kCodeRowStride, count,
                                                    run, scales, folded, units[batch], next);
      for (int64_t piece = 0; piece < kPieces; ++piece) {
        pack_weights(folded, groups.of[piece], run.groups, count, weights[batch][piece]);
      }
      ++batch;
    });
    Tiles::keep_awake();
    (run.count == kMaxKeys ? interleave_values<kPieces, true>
                           : interleave_values<kPieces, false>)(run, values, next);
  };
  const auto multiply = [&] {
    for (int64_t batch = 0; batch * kMaxBatch < num_rows; ++batch) {
      for (int64_t piece = 0; piece < kPieces; ++piece) {
        multiply_values<Tiles>(weights[batch][piece], values[piece], products[batch][piece]);
      }
    }
  };
  const auto finish = [&](const ValueJob& job, const WeightUnits* units, const AheadInSteps& next) {
    int64_t batch = 0;
    for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t count) {
      for (int64_t piece = 0; piece < kPieces; ++piece) {
        add_sums(products[batch][piece], units[batch], groups.of[piece], any.groups, kDim, piece,
                 count, job.decay + first, job.sums + first * kDim, next);
      }
      ++batch;
    });
  };
  for (int64_t i = 0; i < num_jobs; ++i) {
    const int64_t num_bytes = jobs[i].values.count * kPieces * kPieceBytes;
    const AheadInSteps next(ahead, num_bytes, num_steps);
    prepare(jobs[i], rounded[i % 2], next);
    if (i > 0) finish(jobs[i - 1], rounded[(i - 1) % 2], next);
    multiply();
  }
  finish(jobs[num_jobs - 1], rounded[(num_jobs - 1) % 2], AheadInSteps(ahead, 0, 1));
}

template <typename Tiles>
void add_on_tiles(const ValueJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& next) {
  (jobs->values.dim == 64 ? add_jobs<1, Tiles> : add_jobs<2, Tiles>)(jobs, num_jobs, num_rows,
                                                                     next);
}

}  // namespace
}  // namespace kvkernels
