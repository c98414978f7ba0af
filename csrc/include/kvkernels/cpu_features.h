// Which instruction sets this processor has and this process may use.
#pragma once

namespace kvkernels {

// In rising order: each set can do all that the ones before it can.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The best set that the processor has and the operating system allows; found once. For kAmx this
// asks Linux for permission to use the tile registers, for all threads started from then on.
Isa best_isa();

// Whether an instruction that multiplies pairs of bfloat16 (AVX512-BF16) takes no longer than a
// multiplication of floats. False where there is no AVX512-BF16.
bool has_fast_bf16_products();

// Whether prefetches go to the L1 cache (true) or to the L2 cache: see attention_spans.h for the
// figures. Set when the library is loaded.
extern const bool kPrefetchesToL1;

const char* isa_name(Isa isa);

}  // namespace kvkernels
