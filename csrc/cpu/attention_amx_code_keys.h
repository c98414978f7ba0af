// Scores of keys held as 4-bit codes, on matrix tiles of bytes (see attention_amx_code_numbers.h):
//
//   S^T [16 keys, 16] = codes [16 keys, 64 channels] * x^T
//
// Columns 0 to 3 hold the low bytes of x for a batch of up to four query rows, columns 4 to 7 their
// high bytes; columns 8 to 15 hold those of a second batch.
#pragma once

#include "cpu/attention_amx_code_numbers.h"

namespace kvkernels {
namespace {

// Query rows, multiplied by the scales of a group of keys and rounded to integers, as tiles:
// [pieces, 16 fours of channels, 16 columns, 4].
struct alignas(64) QueryTiles {
  uint8_t bytes[kMaxPieces][kTile];
};

// score = sum of products * unit + base; quarter r is for row r of a batch.
struct alignas(64) QueryUnits {
  float unit[kMaxBatches][16], base[kMaxBatches][16];
};

// Stores four rows' integers for 16 channels as bytes, in the columns of a batch.
void store_columns(const __m512i* numbers, uint8_t* tile_rows) {
  // Within a quarter (four channels): the bytes of one kind, low or high, side by side.
  const __m512i kinds =
      _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 13, 9, 5, 1, 14, 10, 6, 2, 12, 8, 4, 0));
  const __m512i first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const __m512i second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  const __m512i low_bytes = _mm512_set1_epi16(0x80);
  const auto by_kind = [&](__m512i a, __m512i b) {
    return _mm512_shuffle_epi8(_mm512_xor_si512(join_halves(a, b), low_bytes), kinds);
  };
  const __m512i a = by_kind(numbers[0], numbers[1]), b = by_kind(numbers[2], numbers[3]);
  const auto store = [&](int64_t four, __m256i columns) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(tile_rows + four * kTileRow), columns);
  };
  const __m512i front = _mm512_permutex2var_epi64(a, first, b);
  const __m512i back = _mm512_permutex2var_epi64(a, second, b);
  store(0, _mm512_castsi512_si256(front));
  store(1, _mm512_extracti64x4_epi64(front, 1));
  store(2, _mm512_castsi512_si256(back));
  store(3, _mm512_extracti64x4_epi64(back, 1));
}

template <int kPieces, int kRows>
void fold_query(const float* query, const uint16_t* pairs, int64_t batch, QueryTiles& tiles,
                QueryUnits& rounded, const AheadInSteps& next) {
  constexpr int64_t kDim = 64 * kPieces;
  __m512 largest[kRows], base[kRows];
  alignas(64) float folded[4 * kPieces][kRows][16];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) largest[r] = base[r] = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int64_t part = 0; part < 4 * kPieces; ++part) {
    if (part % 2 == 0) next();
    const Scales scales = load_scales(pairs + 32 * part, 0xffff, 0);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512 q = _mm512_loadu_ps(query + r * kDim + 16 * part);
      const __m512 x = _mm512_mul_ps(q, scales.scale);
      _mm512_store_ps(folded[part][r], x);
      largest[r] = larger_magnitude(largest[r], x);
      base[r] = _mm512_fmadd_ps(q, scales.middle, base[r]);
    }
  }
  const Units units = units_of(combine_rows<kRows>(largest, MaxOf()), kLargestNumber);
  _mm512_store_ps(rounded.unit[batch], units.unit);
  _mm512_store_ps(rounded.base[batch], combine_rows<kRows>(base, SumOf()));
  __m512 inverse[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    inverse[r] = _mm512_permutexvar_ps(_mm512_set1_epi32(4 * r), units.inverse);
  }
  for (int64_t part = 0; part < 4 * kPieces; ++part) {
    if (part % 2 == 0) next();
    __m512i numbers[kMaxBatch];
#pragma GCC unroll 4
    for (int r = 0; r < kMaxBatch; ++r) {
      // Columns past the last row repeat it; what comes of them is not read.
      numbers[r] = r < kRows ? round_number(_mm512_load_ps(folded[part][r]), inverse[r])
                             : numbers[kRows - 1];
    }
    store_columns(numbers, tiles.bytes[part / 4] + part % 4 * 4 * kTileRow + 32 * batch);
  }
}

// The codes of keys that share their scales, unpacked to a byte each.
template <int kPieces>
struct KeyRows {
  static constexpr int64_t kRowBytes = 64 * kPieces;

  int64_t num_parts;
  alignas(64) uint8_t parts[kMaxKeys / 16][16 * kRowBytes];

  void unpack(const uint8_t* codes, int64_t count, const AheadInSteps& next) {
    num_parts = (count + 15) / 16;
    for (int64_t part = 0; part < num_parts; ++part) {
      next();
      uint8_t* rows = parts[part];
      for (int64_t t = 16 * part; t < 16 * part + 16; ++t, rows += kRowBytes) {
        const uint8_t* row = codes + std::min(t, count - 1) * kPieces * kPieceBytes;
        if constexpr (kPieces == 1) {
          _mm512_store_si512(rows, load_piece(row));
        } else {
          const __m512i both = _mm512_loadu_si512(row);
          _mm512_store_si512(rows, low_codes(both));
          _mm512_store_si512(rows + 64, low_codes(_mm512_srli_epi16(both, 4)));
        }
      }
    }
  }
};

// Sums of products of up to 64 keys: [part of 16 keys, key, column].
struct alignas(64) KeySums {
  int32_t sums[kMaxKeys / 16][16][16];
};

// Multiplies one part of 16 keys by the query in tiles 4 and 5; sums in tile kC.
template <int kPieces, int kC, typename Tiles>
void multiply_part(const KeyRows<kPieces>& keys, int64_t part) {
  constexpr int64_t kStride = KeyRows<kPieces>::kRowBytes;
  Tiles::template zero<kC>();
  Tiles::template load<6>(keys.parts[part], kStride);
  Tiles::template dot_unsigned_signed<kC, 6, 4>();
  if constexpr (kPieces > 1) {
    Tiles::template load<7>(keys.parts[part] + 64, kStride);
    Tiles::template dot_unsigned_signed<kC, 7, 5>();
  }
}

template <int kPieces, typename Tiles>
void multiply_keys(const KeyRows<kPieces>& keys, const QueryTiles& query, KeySums& sums) {
  Tiles::template load<4>(query.bytes[0], kTileRow);
  if constexpr (kPieces > 1) Tiles::template load<5>(query.bytes[1], kTileRow);
  if (keys.num_parts == 4) {  // all products are started before the first result is stored
    multiply_part<kPieces, 0, Tiles>(keys, 0);
    multiply_part<kPieces, 1, Tiles>(keys, 1);
    multiply_part<kPieces, 2, Tiles>(keys, 2);
    multiply_part<kPieces, 3, Tiles>(keys, 3);
    Tiles::template store<0>(sums.sums[0], kTileRow);
    Tiles::template store<1>(sums.sums[1], kTileRow);
    Tiles::template store<2>(sums.sums[2], kTileRow);
    Tiles::template store<3>(sums.sums[3], kTileRow);
    return;
  }
  int64_t part = 0;
  for (; part + 2 <= keys.num_parts; part += 2) {
    multiply_part<kPieces, 0, Tiles>(keys, part);
    multiply_part<kPieces, 1, Tiles>(keys, part + 1);
    Tiles::template store<0>(sums.sums[part], kTileRow);
    Tiles::template store<1>(sums.sums[part + 1], kTileRow);
  }
  if (part == keys.num_parts) return;
  multiply_part<kPieces, 0, Tiles>(keys, part);
  Tiles::template store<0>(sums.sums[part], kTileRow);
}

// Four columns of the keys t, 4 + t, 8 + t and 12 + t, one key per quarter.
__m512i load_quarters(const int32_t (*sums)[16], int64_t t, int64_t column) {
  const auto quarter = [&](int64_t i) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(sums[4 * i + t] + column));
  };
  __m512i all = _mm512_castsi128_si512(quarter(0));
  all = _mm512_mask_broadcast_i32x4(all, 0x00f0, quarter(1));
  all = _mm512_mask_broadcast_i32x4(all, 0x0f00, quarter(2));
  return _mm512_mask_broadcast_i32x4(all, 0xf000, quarter(3));
}

// Transposes four rows of 16 integers: fours[i] holds those at i, 4 + i, 8 + i and 12 + i of all
// four rows.
void transpose_fours(const __m512i* rows, __m512i* fours) {
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]);
  const __m512i b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  fours[0] = _mm512_unpacklo_epi64(a, c);
  fours[1] = _mm512_unpackhi_epi64(a, c);
  fours[2] = _mm512_unpacklo_epi64(b, d);
  fours[3] = _mm512_unpackhi_epi64(b, d);
}

// Turns sums of integers into the scores of a batch's rows.
void write_scores(const KeySums& sums, const QueryUnits& query, int64_t batch, int64_t num_rows,
                  int64_t count, float* scores, const AheadInSteps& next) {
  const float *unit = query.unit[batch], *base = query.base[batch];
  for (int64_t first = 0; first < count; first += 16) {
    next();
    __m512i keys[4], rows[4];
#pragma GCC unroll 4
    for (int64_t t = 0; t < 4; ++t) {
      keys[t] = join_sums(load_quarters(sums.sums[first / 16], t, 8 * batch),
                          load_quarters(sums.sums[first / 16], t, 8 * batch + 4));
    }
    transpose_fours(keys, rows);
    for (int64_t r = 0; r < num_rows; ++r) {
      const __m512 score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(rows[r]), _mm512_set1_ps(unit[4 * r]),
                                           _mm512_set1_ps(base[4 * r]));
      _mm512_storeu_ps(scores + r * kCodeRowStride + first, score);
    }
  }
}

// Keys that share their scales, whose products have been started and not been read.
struct KeysUnderWay {
  const KeyJob* job;
  int64_t slot, count;  // 0: none
  QueryUnits query;
};

void write_scores(const KeysUnderWay& keys, const KeySums& sums, int64_t num_rows,
                  const AheadInSteps& next) {
  int64_t batch = 0;
  for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t count) {
    write_scores(sums, keys.query, batch++, count, keys.count,
                 keys.job->scores + first * kCodeRowStride + keys.slot - keys.job->keys.slot, next);
  });
}

// Scores all jobs. While the products of one set of keys are made, the query is folded for the
// next.
template <int kPieces, typename Tiles>
void score_jobs(const KeyJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& ahead) {
  constexpr void (*kFoldQuery[])(const float*, const uint16_t*, int64_t, QueryTiles&, QueryUnits&,
                                 const AheadInSteps&) = {
      nullptr, fold_query<kPieces, 1>, fold_query<kPieces, 2>, fold_query<kPieces, 3>,
      fold_query<kPieces, 4>};
  constexpr int64_t kKeyBytes = kPieceBytes * kPieces;
  QueryTiles tiles;
  KeyRows<kPieces> rows;
  KeySums sums;
  KeysUnderWay under_way[2];
  int now = 0;
  under_way[1].count = 0;
  Tiles::keep_awake();  // once: from then on products follow each other soon enough
  for (const KeyJob* job = jobs; job < jobs + num_jobs; ++job) {
    for_each_key_group(job->keys, [&](int64_t slot, int64_t count, const uint16_t* pairs) {
      KeysUnderWay& keys = under_way[now];
      now = 1 - now;
      // next() is called 4 * kPieces times for folding a batch, once per 16 keys unpacked, and as
      // often for the keys under way.
      const int64_t num_batches = (num_rows + kMaxBatch - 1) / kMaxBatch,
                    num_parts = count / 16 + 1;
      const AheadInSteps next(ahead, count * kKeyBytes,
                              num_batches * (4 * kPieces + num_parts) + num_parts);
      int64_t batch = 0;
      for_each_batch(num_rows, kMaxBatch, [&](int64_t first, int64_t num_some) {
        kFoldQuery[num_some](job->query + first * 64 * kPieces, pairs, batch++, tiles, keys.query,
                             next);
      });
      rows.unpack(job->keys.codes + slot * kKeyBytes, count, next);
      if (under_way[now].count > 0) write_scores(under_way[now], sums, num_rows, next);
      multiply_keys<kPieces, Tiles>(rows, tiles, sums);
      keys.job = job;
      keys.slot = slot;
      keys.count = count;
    });
  }
  write_scores(under_way[1 - now], sums, num_rows, AheadInSteps(ahead, 0, 1));
}

template <typename Tiles>
void score_on_tiles(const KeyJob* jobs, int64_t num_jobs, int64_t num_rows, ReadAhead& next) {
  (jobs->keys.dim == 64 ? score_jobs<1, Tiles> : score_jobs<2, Tiles>)(jobs, num_jobs, num_rows,
                                                                       next);
}

}  // namespace
}  // namespace kvkernels
