// Lossless codes (see codec_lossless.h) with AVX-512, 64 channels at a time as bytes. For rows of
// whole vectors.
//
// Two vectors of bfloat16 are packed to one of bytes lane by lane ("packed" below): its quadwords
// 0, 2, 4 and 6 are of the first 32 channels, the others of the last 32. It is put in order when it
// is stored.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/codec_paths.h"
#include "cpu/intrinsics_avx512.h"

namespace kvkernels {
namespace {

constexpr int64_t kVectorChannels = 64, kVectorBytes = 64;

// Whether vectors can be written there past the cache (streaming stores), so that no line is read
// only to be overwritten. What is written is not read soon: payloads leave the processor, and a
// restored pool is larger than its caches.
inline bool can_stream(const void* target) {
  return reinterpret_cast<std::uintptr_t>(target) % kVectorBytes == 0;
}

template <bool kStreams>
void put(void* target, __m512i v) {
  if constexpr (kStreams) {
    _mm512_stream_si512(static_cast<__m512i*>(target), v);
  } else {
    _mm512_storeu_si512(target, v);
  }
}
template <bool kStreams>
void put(void* target, __m256i v) {
  if constexpr (kStreams) {
    _mm256_stream_si256(static_cast<__m256i*>(target), v);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(target), v);
  }
}

// Puts packed quadwords in the order of channels, and back.
inline __m512i in_order(__m512i packed) {
  return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), packed);
}
inline __m512i out_of_order(__m512i bytes) {
  return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), bytes);
}

// a where the mask's bits are set, else b.
inline __m512i select(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi64(mask, a, b, 0xca);
}

// The low, or the high, bytes of 64 numbers, packed.
inline __m512i low_bytes(__m512i first, __m512i last) {
  const __m512i mask = _mm512_set1_epi16(0xff);
  return _mm512_packus_epi16(_mm512_and_si512(first, mask), _mm512_and_si512(last, mask));
}
inline __m512i high_bytes(__m512i first, __m512i last) {
  return _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(last, 8));
}

// Finds the largest exponent of every channel, packed. Prefetches what comes after the tile.
template <int kVectors>
void find_tops(const uint16_t* items, const Tile& tile, __m512i* tops) {
  constexpr int kHalves = 2 * kVectors;
  __m512i largest[kHalves];  // of doubled numbers, so that the exponent is the high byte
  for (int v = 0; v < kHalves; ++v) largest[v] = _mm512_setzero_si512();
  const int64_t num_items = tile.size * tile.dim;
  for (int64_t i = 0; i < num_items; i += tile.dim) {
    for (int v = 0; v < kHalves; ++v) {
      const uint16_t* from = items + i + 32 * v;
      __builtin_prefetch(from + num_items, 0, 2);
      const __m512i numbers = _mm512_loadu_si512(from);
      largest[v] = _mm512_max_epu16(largest[v], _mm512_add_epi16(numbers, numbers));
    }
  }
  for (int v = 0; v < kVectors; ++v) tops[v] = high_bytes(largest[2 * v], largest[2 * v + 1]);
}

// What is written of 64 channels, packed: signs and mantissas, distances, and which of these are
// too far.
struct Split {
  __m512i low, deltas;
  __mmask64 is_far;
};

inline Split split(const uint16_t* items, __m512i tops) {
  const __m512i first = _mm512_loadu_si512(items), last = _mm512_loadu_si512(items + 32);
  const __m512i low = low_bytes(first, last), high = high_bytes(first, last);
  const __m512i furthest = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
  // Doubling the high byte drops the sign; the exponent's last bit is the first one of the low
  // byte.
  const __m512i last_bit = _mm512_and_si512(_mm512_srli_epi16(low, 7), _mm512_set1_epi8(1));
  const __m512i exponents = _mm512_or_si512(_mm512_add_epi8(high, high), last_bit);
  const __m512i deltas = _mm512_sub_epi8(tops, exponents);
  const __mmask64 is_far =
      _mm512_mask_cmpge_epu8_mask(_mm512_test_epi8_mask(exponents, exponents), deltas, furthest);
  return {select(sign, high, low), _mm512_min_epu8(deltas, furthest), is_far};
}

inline __m512i join_nibbles(__m512i first, __m512i second) {
  return _mm512_or_si512(first, _mm512_slli_epi16(second, 4));
}

// Adds the exponents of a row that lie too far away, in the order of channels. False if there are
// too many for the list.
inline bool add_escapes(const uint16_t* row, int64_t first_item, __mmask64 is_far,
                        uint32_t* escapes, int64_t& num_escapes) {
  for (int quad = 0; quad < 8; ++quad) {
    const int packed = quad < 4 ? 2 * quad : 2 * quad - 7;
    for (uint32_t rest = (is_far >> (8 * packed)) & 0xff; rest != 0; rest &= rest - 1) {
      const int64_t c = 8 * quad + std::countr_zero(rest);
      if (num_escapes == kNumEscapes) return false;
      escapes[num_escapes++] = static_cast<uint32_t>(first_item + c) | ((row[c] >> 7) & 255u) << 24;
    }
  }
  return true;
}

// A Sums that takes none: for a caller that sums the bytes afterwards, out of the cache.
struct NoSums {
  static constexpr bool kMayStream = false;
  void begin_row() {}
  void take_low(__m512i, int) {}
  void take_nibbles(__m512i, int) {}
};

// Encodes rows of kVectors * 64 channels. False if the codec cannot hold them. `sums` takes every
// vector that is written of a row; where nibbles fill only half a vector, zeros follow.
template <int kVectors, bool kStreams, typename Sums>
bool encode_rows(const uint16_t* items, const Tile& tile, const Lossless& out, Sums& sums) {
  __m512i tops[kVectors];
  find_tops<kVectors>(items, tile, tops);
  for (int v = 0; v < kVectors; ++v) {
    _mm512_storeu_si512(out.tops + kVectorChannels * v, in_order(tops[v]));
  }
  _mm512_storeu_si512(out.escapes, _mm512_set1_epi32(-1));
  static_assert(kNumEscapes * sizeof(uint32_t) == 64 && kUnusedEscape == 0xffffffff);
  int64_t num_escapes = 0;
  const int64_t num_items = tile.size * tile.dim;
  for (int64_t i = 0; i < num_items; i += tile.dim) {
    Split parts[kVectors];
    __mmask64 any_far = 0;
    sums.begin_row();
    for (int v = 0; v < kVectors; ++v) {
      parts[v] = split(items + i + kVectorChannels * v, tops[v]);
      any_far |= parts[v].is_far;
      const __m512i low = in_order(parts[v].low);
      put<kStreams>(out.low + i + kVectorChannels * v, low);
      sums.take_low(low, v);
    }
    // A byte holds the distances of a channel and of the one half a row further.
    uint8_t* nibbles = out.exponents + i / 2;
    if constexpr (kVectors == 1) {
      const __m512i half_behind = _mm512_bsrli_epi128(parts[0].deltas, 8);
      const __m512i pairs = in_order(join_nibbles(parts[0].deltas, half_behind));
      const __m256i packed = _mm512_castsi512_si256(pairs);
      put<kStreams>(nibbles, packed);
      sums.take_nibbles(_mm512_zextsi256_si512(packed), 0);
    } else {
      for (int v = 0; v < kVectors / 2; ++v) {
        const __m512i half_behind = parts[v + kVectors / 2].deltas;
        const __m512i pairs = in_order(join_nibbles(parts[v].deltas, half_behind));
        put<kStreams>(nibbles + kVectorChannels * v, pairs);
        sums.take_nibbles(pairs, v);
      }
    }
    if (any_far == 0) continue;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = i + kVectorChannels * v;
      if (!add_escapes(items + first, first, parts[v].is_far, out.escapes, num_escapes)) {
        return false;
      }
    }
  }
  return true;
}

template <int kVectors, typename Sums>
bool encode_vectors(const uint16_t* items, const Tile& tile, const Lossless& out, Sums& sums) {
  if constexpr (Sums::kMayStream) {
    if (can_stream(out.low) && can_stream(out.exponents)) {
      return encode_rows<kVectors, true>(items, tile, out, sums);
    }
  }
  return encode_rows<kVectors, false>(items, tile, out, sums);
}

// Joins 64 numbers from their signs and mantissas and their distances, both packed.
template <bool kStreams>
void join(__m512i low, __m512i deltas, __m512i tops, uint16_t* items) {
  const __mmask64 is_near = _mm512_cmpneq_epi8_mask(deltas, _mm512_set1_epi8(15));
  const __m512i exponents = _mm512_maskz_sub_epi8(is_near, tops, deltas);
  const __m512i sign = _mm512_set1_epi8(-128);
  // Shifts of 16-bit words carry bits across bytes, but only from or to bits that the sign
  // replaces.
  const __m512i high = select(sign, low, _mm512_srli_epi16(exponents, 1));
  const __m512i rest = select(sign, _mm512_slli_epi16(exponents, 7), low);
  put<kStreams>(items, _mm512_unpacklo_epi8(rest, high));
  put<kStreams>(items + 32, _mm512_unpackhi_epi8(rest, high));
}

// Decodes rows of kVectors * 64 channels, except for escapes.
template <int kVectors, bool kStreams>
void decode_rows(const Lossless& in, const Tile& tile, uint16_t* items) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i tops[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    tops[v] = out_of_order(_mm512_loadu_si512(in.tops + kVectorChannels * v));
  }
  const int64_t num_items = tile.size * tile.dim;
  for (int64_t i = 0; i < num_items; i += tile.dim) {
    const uint8_t* nibbles = in.exponents + i / 2;
    __m512i deltas[kVectors];
    if constexpr (kVectors == 1) {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles));
      const __m512i both =
          _mm512_inserti64x4(_mm512_castsi256_si512(pairs), _mm256_srli_epi16(pairs, 4), 1);
      deltas[0] = out_of_order(_mm512_and_si512(both, nibble));
    } else {
      for (int v = 0; v < kVectors / 2; ++v) {
        const __m512i pairs = out_of_order(_mm512_loadu_si512(nibbles + kVectorChannels * v));
        deltas[v] = _mm512_and_si512(pairs, nibble);
        deltas[v + kVectors / 2] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = i + kVectorChannels * v;
      join<kStreams>(out_of_order(_mm512_loadu_si512(in.low + first)), deltas[v], tops[v],
                     items + first);
    }
  }
}

template <int kVectors>
void decode_vectors(const Lossless& in, const Tile& tile, uint16_t* items) {
  can_stream(items) ? decode_rows<kVectors, true>(in, tile, items)
                    : decode_rows<kVectors, false>(in, tile, items);
}

}  // namespace
}  // namespace kvkernels
