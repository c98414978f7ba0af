// Which instruction sets this processor, and this process, may use.
#pragma once

namespace kvkernels {

// In rising order: each set can do all that the ones before it can.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The best set that the processor has and the operating system allows; found once. For kAmx this
// asks Linux for permission to use the tile registers, for all threads started from then on.
Isa best_isa();

// Whether a product of pairs of bfloat16 takes no longer than one of floats.
bool has_fast_bf16_products();

// Whether what will be read soon is better asked for into the L1 cache than into the L2 cache.
// Found when the library is loaded.
extern const bool kPrefetchesToL1;

const char* isa_name(Isa isa);

}  // namespace kvkernels
