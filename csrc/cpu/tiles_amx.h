// The AMX instructions of Intel processors since Sapphire Rapids, as the class Tiles that kernels
// take: 8 registers of 16 rows of 64 bytes. Only for files compiled for AMX. In an anonymous
// namespace: each file that includes this gets its own copy, compiled with that file's flags.
//
//   zero<T>(), load<T>(source, stride in bytes), store<T>(target, stride in bytes)
//   dot<C, A, B>(): C[m][n] += sum over k < 32 of A[m][k] * B[k / 2][2 n + k % 2], of bfloat16
//   dot_unsigned_signed<C, A, B>(), dot_signed_unsigned<C, A, B>():
//     C[m][n] += sum over k < 64 of A[m][k] * B[k / 4][4 n + k % 4], of bytes, to 32 bits; A and B
//     are unsigned or signed as the name says
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvkernels {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A constant in memory: GCC 12 believes that the instruction reads only the first 8 bytes, and
// might not store the rest of a configuration on the stack.
constexpr TileConfig kConfig;

// Configures the calling thread's tile registers, and releases them at the end. Linux gives the
// permission for tiles to a process, once (best_isa() asks), but their shape is a register of each
// thread. It is set for each piece of work and released after it, because threads with tiles in use
// have more state to save at every switch.
class AmxTiles {
 public:
  AmxTiles() { _tile_loadconfig(&kConfig); }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  // Starts a product whose result, in tile 0, means nothing: the unit for products goes to sleep
  // without one.
  //
  // All by assembly, since GCC's own intrinsics paste the text of their argument into the
  // instruction, and so take no template argument.
  static void keep_awake() { asm volatile("tdpbusd %%tmm2, %%tmm1, %%tmm0" : :); }
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static void load(const void* source, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(source), "r"(stride), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  static void store(void* target, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                 :
                 : "r"(target), "r"(stride), "i"(kTile)
                 : "memory");
  }
  template <int kC, int kA, int kB>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
  template <int kC, int kA, int kB>
  static void dot_unsigned_signed() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
  template <int kC, int kA, int kB>
  static void dot_signed_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

}  // namespace
}  // namespace kvkernels
