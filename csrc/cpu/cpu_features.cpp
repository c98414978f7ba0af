// Finds the instruction sets once, by CPUID and, for AMX, by asking Linux.
#include "kvkernels/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvkernels {
namespace {

#if defined(__x86_64__)

bool has_avx2() {
  // GCC's builtin also checks that the operating system saves the wide registers.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("bmi2");
}

bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5) & 1;
}

bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool has_tile = (edx >> 24) & 1, has_bf16 = (edx >> 22) & 1, has_int8 = (edx >> 25) & 1;
  if (!has_tile || !has_bf16 || !has_int8) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa find_best_isa() {
  if (!has_avx2()) return Isa::kPortable;
  if (!has_avx512()) return Isa::kAvx2;
  if (!has_avx512_bf16()) return Isa::kAvx512;
  return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
}

// True for AMD's processors from Zen 5 on: their L1 cache has 48 KiB, and more misses may be under
// way than on older ones.
bool prefetches_to_l1() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned base_family = (eax >> 8) & 15, extended_family = (eax >> 20) & 255;
  constexpr unsigned kZen5 = 0x1a;
  return base_family + extended_family >= kZen5;
}

#else

Isa find_best_isa() { return Isa::kPortable; }

bool prefetches_to_l1() { return false; }

#endif

}  // namespace

Isa best_isa() {
  static const Isa isa = find_best_isa();
  return isa;
}

const bool kPrefetchesToL1 = prefetches_to_l1();

bool has_fast_bf16_products() {
#if defined(__x86_64__)
  // By maker, not by a timed probe: which path runs decides the last bits of a result, and must not
  // change from run to run. AMD's processors start as many of these instructions a cycle as
  // multiplications of floats, Intel's a quarter as many (half the products a second).
  return best_isa() >= Isa::kAvx512Bf16 && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      break;
  }
  return "portable";
}

}  // namespace kvkernels
