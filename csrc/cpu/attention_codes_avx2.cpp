// Products with codes as sums of products of 16-bit integers, 16 an instruction (vpmaddwd): twice
// as many as of floats, and a code becomes a 16-bit integer by mere zero extension. The arithmetic
// is that of attention_codes_avx512_vnni.cpp.
#include "cpu/attention_codes_rounding_avx2.h"
#include "cpu/row_batches.h"

namespace kvkernels {
namespace {

// Which codes to take from bytes.
enum class Codes { kBytes, kLowNibbles, kHighNibbles };

// 16 bytes as 16-bit integers.
inline __m256i load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <Codes kCodes>
__m256i codes_of(__m256i bytes) {
  if constexpr (kCodes == Codes::kLowNibbles) return _mm256_and_si256(bytes, _mm256_set1_epi16(15));
  if constexpr (kCodes == Codes::kHighNibbles) return _mm256_srli_epi16(bytes, 4);
  return bytes;
}

// sum += a * b, products of neighbours added in pairs. Written out because GCC 12 copies the sum to
// another register and back around the intrinsic.
[[gnu::always_inline]] inline void add_products(__m256i& sum, __m256i a, __m256i b) {
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
}

// ---- keys ----------------------------------------------------------------------------------

// Adds the products of one piece of some keys with the same piece of each row.
template <Codes kCodes, int kRows>
void add_piece_of_keys(const __m256i* bytes, const RoundedQuery& query, int64_t piece,
                       __m256i* sums) {
  constexpr int kKeys = keys_at_once(kRows);
  __m256i codes[kKeys];
#pragma GCC unroll 8
  for (int t = 0; t < kKeys; ++t) codes[t] = codes_of<kCodes>(bytes[t]);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const auto* row = reinterpret_cast<const __m256i*>(query.x[r] + 16 * piece);
    const __m256i x = _mm256_load_si256(row);
#pragma GCC unroll 8
    for (int t = 0; t < kKeys; ++t) add_products(sums[r * kKeys + t], codes[t], x);
  }
}

template <bool kIsInt4, int kRows>
void add_bytes_of_keys(const uint8_t* const* keys, int64_t first_byte, const RoundedQuery& query,
                       __m256i* sums) {
  constexpr int kKeys = keys_at_once(kRows);
  __m256i bytes[kKeys];
#pragma GCC unroll 8
  for (int t = 0; t < kKeys; ++t) bytes[t] = load_bytes(keys[t] + first_byte);
  if constexpr (kIsInt4) {
    const int64_t piece = first_byte / 8;
    add_piece_of_keys<Codes::kLowNibbles, kRows>(bytes, query, piece, sums);
    add_piece_of_keys<Codes::kHighNibbles, kRows>(bytes, query, piece + 1, sums);
  } else {
    add_piece_of_keys<Codes::kBytes, kRows>(bytes, query, first_byte / 16, sums);
  }
}

// Scores `count` keys that share their scales, with up to 4 rows.
template <bool kIsInt4, int kRows>
void score_group(const uint8_t* codes, const uint16_t* pairs, int64_t count, int64_t dim,
                 const float* query, float* scores, ReadAhead& next) {
  constexpr int kKeys = keys_at_once(kRows);
  const int64_t num_bytes = bytes_of_row(kIsInt4, dim);
  RoundedQuery rounded;
  round_query<kIsInt4, kRows>(query, dim, pairs, rounded);
  const __m256i excess = _mm256_load_si256(reinterpret_cast<const __m256i*>(rounded.excess));
  const __m256 unit = _mm256_load_ps(rounded.unit), base = _mm256_load_ps(rounded.base);
  for (int64_t first = 0; first < count; first += kKeys) {
    const uint8_t* keys[kKeys];
#pragma GCC unroll 8
    for (int t = 0; t < kKeys; ++t) {
      keys[t] = codes + std::min(first + t, count - 1) * num_bytes;
    }
    __m256i sums[kSums];
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_si256();
    for (int64_t i = 0; i < num_bytes; i += 16) {
      add_bytes_of_keys<kIsInt4, kRows>(keys, i, rounded, sums);
    }
    const __m256i products = _mm256_sub_epi32(sum_lanes_of_8(sums), excess);
    alignas(32) float results[kSums];
    _mm256_store_ps(results, _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), unit, base));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(scores + r * kCodeRowStride + first, results + r * kKeys, kKeys * sizeof(float));
    }
    // One request per eight keys: it takes as long as adding up the sums of two keys.
    if (first % 8 == 0) next.advance(8 * num_bytes);
  }
}

template <bool kIsInt4>
void score_run(const CodeRun& run, const float* query, int64_t num_rows, float* scores,
               ReadAhead& next_read) {
  constexpr decltype(&score_group<kIsInt4, 1>) kKernels[kMaxBatch] = {
      score_group<kIsInt4, 1>, score_group<kIsInt4, 2>, score_group<kIsInt4, 3>,
      score_group<kIsInt4, 4>};
  const int64_t num_bytes = bytes_of_row(kIsInt4, run.dim), end = run.slot + run.count;
  const int64_t group_size = run.block_size / run.groups;
  for (int64_t slot = run.slot, next; slot < end; slot = next) {
    next = std::min((slot / group_size + 1) * group_size, end);
    const uint16_t* pairs = run.scales + slot / group_size * run.dim * 2;
    for_each_batch(num_rows, kMaxBatch, [&](int64_t r, int64_t count) {
      kKernels[count - 1](run.codes + slot * num_bytes, pairs, next - slot, run.dim,
                          query + r * run.dim, scores + r * kCodeRowStride + slot - run.slot,
                          next_read);
    });
  }
}

void score(const CodeRun& keys, const float* query, int64_t num_rows, float* scores,
           ReadAhead& next) {
  (keys.is_int4 ? score_run<true> : score_run<false>)(keys, query, num_rows, scores, next);
}

// ---- values --------------------------------------------------------------------------------

// Adds one piece of each value of the run: 16 channels from `first` on.
template <Codes kCodes, int kRows>
void add_piece_of_values(const CodeRun& run, int64_t first_byte, int64_t first,
                         const RoundedWeights& weights, const float* decay, float* sums) {
  constexpr bool kIsInt4 = kCodes != Codes::kBytes;
  const int64_t num_bytes = bytes_of_row(kIsInt4, run.dim);
  const uint8_t* codes = run.codes + run.slot * num_bytes + first_byte;
  const int64_t group = std::min(first / (run.dim / run.groups), run.groups - 1);
  const int32_t* x[kRows];
  __m256i products[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    x[r] = reinterpret_cast<const int32_t*>(weights.x[r * run.groups + group]);
    products[r][0] = products[r][1] = _mm256_setzero_si256();
  }
  const int64_t num_pairs = (run.count + 1) / 2;
  for (int64_t pair = 0; pair < num_pairs; ++pair, codes += 2 * num_bytes) {
    // A key past the last has weight 0, so any codes will do.
    const uint8_t* odd = codes + (2 * pair + 1 < run.count ? num_bytes : 0);
    const __m256i a = codes_of<kCodes>(load_bytes(codes));
    const __m256i b = codes_of<kCodes>(load_bytes(odd));
    const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i both = _mm256_set1_epi32(x[r][pair]);
      add_products(products[r][0], low, both);
      add_products(products[r][1], high, both);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const int64_t set = r * run.groups + group;
    const __m256i excess = _mm256_set1_epi32(weights.excess[set]);
    __m256 parts[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(products[r][i], excess));
      parts[i] = _mm256_fmadd_ps(exact, _mm256_set1_ps(weights.unit[set]),
                                 _mm256_set1_ps(weights.base[set]));
    }
    float* target = sums + r * run.dim + first;
    const __m256 factor = _mm256_set1_ps(decay[r]);
    const auto add = [factor](float* p, __m256 v) {
      _mm256_storeu_ps(p, _mm256_fmadd_ps(_mm256_loadu_ps(p), factor, v));
    };
    add(target, _mm256_permute2f128_ps(parts[0], parts[1], 0x20));
    add(target + 8, _mm256_permute2f128_ps(parts[0], parts[1], 0x31));
  }
}

template <bool kIsInt4, int kRows>
void add_bytes_of_values(const CodeRun& run, int64_t first_byte, const RoundedWeights& weights,
                         const float* decay, float* sums) {
  if constexpr (kIsInt4) {
    add_piece_of_values<Codes::kLowNibbles, kRows>(run, first_byte, first_byte, weights, decay,
                                                   sums);
    add_piece_of_values<Codes::kHighNibbles, kRows>(run, first_byte, run.dim / 2 + first_byte,
                                                    weights, decay, sums);
  } else {
    add_piece_of_values<Codes::kBytes, kRows>(run, first_byte, first_byte, weights, decay, sums);
  }
}

template <bool kIsInt4, int kRows>
void add_rows(const CodeRun& run, const RoundedWeights& weights, const float* decay, float* sums,
              ReadAhead& next) {
  const int64_t num_bytes = bytes_of_row(kIsInt4, run.dim);
  for (int64_t i = 0; i < num_bytes; i += 16) {
    next.advance(16 * run.count);
    add_bytes_of_values<kIsInt4, kRows>(run, i, weights, decay, sums);
  }
}

template <bool kIsInt4>
void add_run(const CodeRun& run, const float* weights, int64_t num_rows, const float* decay,
             float* sums, ReadAhead& next) {
  constexpr decltype(&add_rows<kIsInt4, 1>) kKernels[kMaxBatch] = {
      add_rows<kIsInt4, 1>, add_rows<kIsInt4, 2>, add_rows<kIsInt4, 3>, add_rows<kIsInt4, 4>};
  KeyScales scales;
  spread_scales(run, middle_code(kIsInt4), scales);
  RoundedWeights rounded;
  for_each_batch(num_rows, kMaxBatch, [&](int64_t r, int64_t count) {
    round_weights<kIsInt4>(weights + r * kCodeRowStride, count, run, scales, rounded);
    kKernels[count - 1](run, rounded, decay + r, sums + r * run.dim, next);
  });
}

void add(const CodeRun& values, const float* weights, int64_t num_rows, const float* decay,
         float* sums, ReadAhead& next) {
  (values.is_int4 ? add_run<true> : add_run<false>)(values, weights, num_rows, decay, sums, next);
}

bool suits(const CodeShape& shape) {
  const int64_t unit = shape.is_int4 ? 2 * kPieceChannels : kPieceChannels;
  return shape.head_dim <= kMaxCodeDim && shape.value_dim <= kMaxCodeDim &&
         shape.head_dim % unit == 0 && shape.value_dim % unit == 0 &&
         shape.has_groups_of(kPieceChannels);
}

}  // namespace

const CodeKernels* avx2_code_kernels() {
  static const CodeKernels kernels = {suits, 1, score_each<score>, add_each<add>};
  return &kernels;
}

}  // namespace kvkernels
