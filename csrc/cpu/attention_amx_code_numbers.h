// Products with 4-bit codes on matrix tiles of bytes, for few query rows: numbers as bytes. In an
// anonymous namespace: each file that includes this gets its own copy, compiled with that file's
// flags.
//
// As in attention_codes_avx512_vnni.cpp the float side of a product is folded with the scales and
// rounded to whole numbers x of 16 bits. Here x = 256 * high + low goes as two signed bytes, each a
// row of its own, and the sums of both are put together again, exactly. Codes are not taken around
// their middle: what a rounded x is off by then counts twice, and the sum of x is not needed.
//
// Two things of these processors (Emerald Rapids) shape this. The unit for products of tiles goes
// to sleep when it has had nothing to do for 400 ns, and takes 300 ns to wake: so it is given a
// product now and then, whose result nobody reads. And a tile is not loaded from stores that are
// still under way, it waits for all of them: so what one is loaded from is written well before, and
// what one was stored to is read well after, the next keys' or values' numbers being made
// meanwhile.
//
// Tiles is a class as in tiles_amx.h, whose registers are configured.
#pragma once

#include "cpu/attention_codes_rounding_avx512.h"

namespace kvkernels {
namespace {

constexpr int64_t kTileRow = 64;  // bytes
constexpr int64_t kTile = 16 * kTileRow;
constexpr int64_t kMaxPieces = 2;  // with more, values and their products fill the L1 cache
constexpr int64_t kMaxBatches = kMaxCodeRows / kMaxBatch;

// Asks for what is read next in steps: requests come one by one while numbers are made, for many
// together fill the buffers for misses, and what is read then waits for one.
class AheadInSteps {
 public:
  AheadInSteps(ReadAhead& next, int64_t num_bytes, int64_t num_steps)
      : next_(next), step_bytes_((num_bytes / num_steps + 63) / 64 * 64) {}

  void operator()() const { next_.advance(step_bytes_); }

 private:
  ReadAhead& next_;
  int64_t step_bytes_;
};

// ---- numbers of 16 bits as bytes -----------------------------------------------------------

// x + 128 stays within 16 bits, and 256 products with codes up to 255 within 32.
constexpr float kLargestNumber = 127 * 256 + 127;

// x + 128, for a = x * unit, in the low halves of lanes: the high byte of x, and above 128 the low
// one.
__m512i round_number(__m512 a, __m512 inverse) {
  return _mm512_castps_si512(_mm512_fmadd_ps(a, inverse, _mm512_set1_ps(0x1.8p23f + 128)));
}

// mask ? a : b, bit by bit.
__m512i select(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
}

// The low halves of lanes, side by side.
__m512i join_halves(__m512i a, __m512i b) {
  return select(_mm512_set1_epi32(0xffff), a, _mm512_slli_epi32(b, 16));
}

// Below 128 again, as signed bytes.
__m512i center_low(__m512i bytes) {
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
}

__m512i join_sums(__m512i low, __m512i high) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// ---- codes ---------------------------------------------------------------------------------

constexpr int64_t kPieceBytes = 32;  // of a row of codes: 64 channels

// One piece of a row, a byte each, in the order of Pieces.
__m512i load_codes(const uint8_t* row, int64_t piece) {
  const __m512i shifts = _mm512_set_epi64(0x4000400040004, 0x4000400040004, 0x4000400040004,
                                          0x4000400040004, 0, 0, 0, 0);
  const __m512i twice = _mm512_broadcast_i64x4(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + kPieceBytes * piece)));
  return _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi8(15));
}

}  // namespace
}  // namespace kvkernels
