// Products with 4-bit codes on matrix tiles of bytes, for few query rows: how numbers become bytes.
// In an anonymous namespace: each file that includes this gets its own copy, compiled with that
// file's flags.
//
// As in attention_codes_avx512_vnni.cpp the float factor of a product is multiplied by the scales
// and rounded to 16-bit integers x. Here x = 256 * high + low becomes two signed bytes, each a row
// of its own, and the sums of both are combined again, exactly. Codes are not taken around their
// middle: rounding x then costs twice the error, but the sum of x is not needed.
//
// Two properties of these processors (Emerald Rapids) shape the code. First, the unit for products
// of tiles goes to sleep when it has had nothing to do for 400 ns, and takes 300 ns to wake: so it
// is given a product now and then, whose result nobody reads. Second, loading a tile waits for all
// stores to its memory that are still under way: so the source of a tile is written long before it
// is loaded, and a stored result is read long after, while the numbers of the next keys or values
// are made.
//
// Tiles is a class as in tiles_amx.h, whose registers the caller has configured.
#pragma once

#include "cpu/attention_codes_rounding_avx512.h"

namespace kvkernels {
namespace {

constexpr int64_t kTileRow = 64;  // bytes
constexpr int64_t kTile = 16 * kTileRow;
constexpr int64_t kMaxPieces =
    2;  // pieces per row; with more, values and their products would fill the L1 cache
constexpr int64_t kMaxBatches = kMaxCodeRows / kMaxBatch;

// Prefetches what is read next in steps, one by one while numbers are made: many requests together
// fill the buffers for misses, and what is read then waits for one.
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

// With this bound x + 128 stays within 16 bits, and sums of 256 products with codes up to 255
// within 32.
constexpr float kLargestNumber = 127 * 256 + 127;

// Rounds a / unit to an integer x; returns x + 128 in the low half of each lane. Its high byte is
// that of x; its low byte is the low one of x, plus 128.
__m512i round_number(__m512 a, __m512 inverse) {
  return _mm512_castps_si512(_mm512_fmadd_ps(a, inverse, _mm512_set1_ps(0x1.8p23f + 128)));
}

// mask ? a : b, bit by bit.
__m512i select(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
}

// The low halves of a's and b's lanes, side by side.
__m512i join_halves(__m512i a, __m512i b) {
  return select(_mm512_set1_epi32(0xffff), a, _mm512_slli_epi32(b, 16));
}

// Takes the 128 off low bytes again, which makes them signed.
__m512i center_low(__m512i bytes) {
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
}

__m512i join_sums(__m512i low, __m512i high) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// ---- codes ---------------------------------------------------------------------------------

// A row of codes becomes pieces of 64 neighbouring channels, one code a byte. The channels of its
// first half lie in the low halves of its bytes, the others in the high halves.
constexpr int64_t kPieceBytes = 32;  // of a row of codes

// The codes in the low halves of bytes.
__m512i low_codes(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }

// 16 times the codes in the high halves of bytes.
__m512i high_codes(__m512i bytes) { return _mm512_andnot_si512(_mm512_set1_epi8(15), bytes); }

// Loads a row that is a single piece.
__m512i load_piece(const uint8_t* row) {
  const __m512i shifts = _mm512_set_epi64(0x4000400040004, 0x4000400040004, 0x4000400040004,
                                          0x4000400040004, 0, 0, 0, 0);
  const __m512i twice =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  return low_codes(_mm512_srlv_epi16(twice, shifts));
}

}  // namespace
}  // namespace kvkernels
