// Vectors of 16 floats: loads of every dtype, exp2, reductions. Only for files compiled for
// AVX-512.
#pragma once

#include <algorithm>

#include "cpu/float_bits.h"
#include "cpu/intrinsics_avx512.h"

namespace kvkernels {
namespace {

// Element types. `load` widens 16 neighbours to floats, in order. `load_pair` widens 32 in the
// cheapest order, the same at every call: for bfloat16 those at even indices, then those at odd
// ones, which costs a shift and a mask instead of two shuffles. `arrange` brings two vectors of
// neighbours into that order, `restore` out of it. kExp2Degree: of exp2_lanes, as exact as results
// of the type can show.
struct Float32 {
  using Item = float;
  static constexpr int kExp2Degree = 6;
  static __m512 load(const Item* p) { return _mm512_loadu_ps(p); }
  static void load_pair(const Item* p, __m512& a, __m512& b) {
    a = load(p);
    b = load(p + 16);
  }
  static void restore(__m512&, __m512&) {}
  static void arrange(__m512&, __m512&) {}
  static void store(Item* p, __m512 v, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, v); }
  static __m512 masked_load(const Item* p, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, p);
  }
};

struct Float16 {
  using Item = uint16_t;
  static constexpr int kExp2Degree = 4;
  static __m512 widen(__m256i bits) { return _mm512_cvtph_ps(bits); }
  static __m512 load(const Item* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void load_pair(const Item* p, __m512& a, __m512& b) {
    a = load(p);
    b = load(p + 16);
  }
  static void restore(__m512&, __m512&) {}
  static void arrange(__m512&, __m512&) {}
  static void store(Item* p, __m512 v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(p, mask,
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static __m512 masked_load(const Item* p, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
  }
};

struct BFloat16 {
  using Item = uint16_t;
  static constexpr int kExp2Degree = 4;
  static __m512 widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static __m512 load(const Item* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void load_pair(const Item* p, __m512& a, __m512& b) {
    const __m512i bits = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)));
  }
  static void restore(__m512& a, __m512& b) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 even = a;
    a = _mm512_permutex2var_ps(even, low, b);
    b = _mm512_permutex2var_ps(even, high, b);
  }
  static void arrange(__m512& a, __m512& b) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 first = a;
    a = _mm512_permutex2var_ps(first, even, b);
    b = _mm512_permutex2var_ps(first, odd, b);
  }
  // The nearest bfloat16 in the upper half of each lane; the lower half is arbitrary.
  static __m512i nearest(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(tie, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  }
  static void store(Item* p, __m512 v, __mmask16 mask) {
    const __m512i words = _mm512_srli_epi32(nearest(v), 16);
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(words));
  }
  static __m512 round(__m512 v) {
    return _mm512_castsi512_ps(_mm512_and_si512(nearest(v), _mm512_set1_epi32(-65536)));
  }
  static __m512 masked_load(const Item* p, __mmask16 mask) {
    return widen(_mm256_maskz_loadu_epi16(mask, p));
  }
};

// A mask of the first `count` lanes: none below 0, all from 16 on. Clamped because the instruction
// looks at 8 bits of a count only.
inline __mmask16 first_lanes(int64_t count) {
  const auto num_lanes = static_cast<uint32_t>(std::clamp<int64_t>(count, 0, 16));
  return static_cast<__mmask16>(_bzhi_u32(0xffff, num_lanes));
}

// a * b, rounded. Compilers fuse a product with what is subtracted from it, and keep digits that
// the other side, the largest of such products, has lost: of numbers beyond 2^31 that is more than
// 2^x can take.
inline __m512 rounded_product(__m512 a, __m512 b) {
  __m512 product = _mm512_mul_ps(a, b);
  asm("" : "+v"(product));
  return product;
}

// 2^x for x <= 0, minus infinity included; NaN stays NaN. As exact as kExp2Poly<kDegree>.
template <int kDegree = 6>
inline __m512 exp2_lanes(__m512 x) {
  // vmaxps returns its second operand if either is NaN.
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  constexpr auto& kPoly = kExp2Poly<kDegree>;
  __m512 poly = _mm512_set1_ps(kPoly[kDegree]);
  for (int i = kDegree - 1; i >= 0; --i) {
    poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(kPoly[i]));
  }
  return _mm512_scalef_ps(poly, whole);
}

// exp2_lanes for results of the element type E.
template <typename E>
inline __m512 exp2_of(__m512 x) {
  return exp2_lanes<E::kExp2Degree>(x);
}

// Lane i of each quarter (128 bits) of the result combines the lanes of that quarter of v[i].
template <typename Combine>
[[gnu::always_inline]] inline __m512 combine_within_quarters(const __m512* v,
                                                             const Combine& combine) {
  const __m512d ab =
      _mm512_castps_pd(combine(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1])));
  const __m512d cd =
      _mm512_castps_pd(combine(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3])));
  return combine(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                 _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}

// Quarter i of the result combines the four quarters of v[i], lane by lane.
template <typename Combine>
[[gnu::always_inline]] inline __m512 combine_quarters(const __m512* v, const Combine& combine) {
  const __m512 low =
      combine(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
  const __m512 high =
      combine(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
  return combine(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// Lane i of the result combines all lanes of v[i]. Unpacks come first, while there are many
// vectors: shuffles of quarters run on fewer ports (on Zen 4 on one, beside products).
template <typename Combine>
[[gnu::always_inline]] inline __m512 combine_lanes_of_16(const __m512* v, const Combine& combine) {
  __m512 quarters[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) quarters[i] = combine_within_quarters(v + 4 * i, combine);
  return combine_quarters(quarters, combine);
}

// Each lane of quarter i of the result combines all lanes of v[i].
template <typename Combine>
[[gnu::always_inline]] inline __m512 combine_lanes_of_4(const __m512* v, const Combine& combine) {
  const __m512 quarters = combine_quarters(v, combine);
  const __m512 pairs = combine(quarters, _mm512_permute_ps(quarters, 0xb1));
  return combine(pairs, _mm512_permute_ps(pairs, 0x4e));
}

struct SumOf {
  [[gnu::always_inline]] __m512 operator()(__m512 a, __m512 b) const { return _mm512_add_ps(a, b); }
};

struct MaxOf {
  [[gnu::always_inline]] __m512 operator()(__m512 a, __m512 b) const { return _mm512_max_ps(a, b); }
};

// For 32-bit integers in the bits of floats.
struct IntegerSumOf {
  [[gnu::always_inline]] __m512 operator()(__m512 a, __m512 b) const {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

[[gnu::always_inline]] inline __m512 sum_lanes_of_16(const __m512* v) {
  return combine_lanes_of_16(v, SumOf());
}

[[gnu::always_inline]] inline __m512 max_lanes_of_16(const __m512* v) {
  return combine_lanes_of_16(v, MaxOf());
}

// Combines the lanes of one vector per row and column, for kRows rows and 16 columns. The vectors
// come kColumns columns at a time: as many as can be summed up at once in registers. The last steps
// wait until all vectors are there: done one by one they would hold up the products that follow.
template <int kRows, typename Combine = SumOf>
class SixteenColumns {
 public:
  static constexpr int kColumns = kRows == 1 ? 16 : kRows == 2 ? 8 : 4;

  // v: [kRows, kColumns], the columns from part * kColumns on.
  [[gnu::always_inline]] void take(int part, const __m512* v) {
    constexpr int kVectors = kColumns / 4;
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kVectors; ++i) {
      quarters_[i / kVectors][part * kVectors + i % kVectors] =
          combine_within_quarters(v + 4 * i, Combine());
    }
  }

  [[gnu::always_inline]] void take(int part, const __m512i* v) {
    __m512 bits[kRows * kColumns];
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kColumns; ++i) bits[i] = _mm512_castsi512_ps(v[i]);
    take(part, bits);
  }

  [[gnu::always_inline]] __m512 row(int r) const {
    return combine_quarters(quarters_[r], Combine());
  }

 private:
  __m512 quarters_[kRows][4];
};

// Swaps quarters: quarter q of v[i] becomes quarter i of v[q].
inline void transpose_quarters(__m512* v) {
  const __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44);
  const __m512 b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
  const __m512 c = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
  const __m512 d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

// Transposes 16 x 16 floats in registers.
inline void transpose_16x16(__m512* v) {
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(t[4 * i + j]), high = _mm512_castps_pd(t[4 * i + j + 2]);
      v[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      v[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // v[4 i + c] holds column 4 q + c of rows 4 i .. 4 i + 3 in its quarter q.
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88);
    const __m512 e = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(a, d, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(a, d, 0xdd);
    t[4 + c] = _mm512_shuffle_f32x4(b, e, 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(b, e, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

}  // namespace
}  // namespace kvkernels
