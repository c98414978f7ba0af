// The class of tiles_amx.h in plain C++: shows on processors without AMX that the kernels use its
// instructions rightly. Slow. In an anonymous namespace: each file that includes this gets its own
// copy, compiled with that file's flags.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/float_bits.h"

namespace kvkernels {
namespace {

class EmulatedTiles {
 public:
  static void keep_awake() {}
  template <int kTile>
  static void zero() {
    std::memset(registers().tiles[kTile], 0, sizeof(registers().tiles[kTile]));
  }
  template <int kTile>
  static void load(const void* source, int64_t stride) {
    for (int64_t row = 0; row < 16; ++row) {
      std::memcpy(registers().tiles[kTile][row], static_cast<const char*>(source) + row * stride,
                  64);
    }
  }
  template <int kTile>
  static void store(void* target, int64_t stride) {
    for (int64_t row = 0; row < 16; ++row) {
      std::memcpy(static_cast<char*>(target) + row * stride, registers().tiles[kTile][row], 64);
    }
  }
  template <int kC, int kA, int kB>
  static void dot() {
    for (int m = 0; m < 16; ++m) {
      float sums[16];
      std::memcpy(sums, registers().tiles[kC][m], sizeof(sums));
      for (int pair = 0; pair < 16; ++pair) {
        const uint32_t a = registers().tiles[kA][m][pair];
        const float low = float_from_bits(a << 16), high = float_from_bits(a & 0xffff0000);
        for (int n = 0; n < 16; ++n) {
          const uint32_t b = registers().tiles[kB][pair][n];
          sums[n] += low * float_from_bits(b << 16) + high * float_from_bits(b & 0xffff0000);
        }
      }
      std::memcpy(registers().tiles[kC][m], sums, sizeof(sums));
    }
  }

  template <int kC, int kA, int kB>
  static void dot_unsigned_signed() {
    dot_bytes<uint8_t, int8_t>(kC, kA, kB);
  }
  template <int kC, int kA, int kB>
  static void dot_signed_unsigned() {
    dot_bytes<int8_t, uint8_t>(kC, kA, kB);
  }

 private:
  template <typename A, typename B>
  static void dot_bytes(int c, int a, int b) {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        for (int four = 0; four < 16; ++four) {
          A left[4];
          B right[4];
          std::memcpy(left, &registers().tiles[a][m][four], sizeof(left));
          std::memcpy(right, &registers().tiles[b][four][n], sizeof(right));
          for (int i = 0; i < 4; ++i)
            registers().tiles[c][m][n] += static_cast<uint32_t>(left[i] * right[i]);
        }
      }
    }
  }

  struct Registers {
    uint32_t tiles[8][16][16];
  };

  // One set per thread, which outlives the object as the processor's registers do: kernels of codes
  // find them as they were left.
  static Registers& registers() {
    static thread_local Registers all;
    return all;
  }
};

}  // namespace
}  // namespace kvkernels
