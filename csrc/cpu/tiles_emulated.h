// What tiles_amx.h does, in plain C++: shows on processors without its instructions that what
// kernels do with them is right. Slow. In an anonymous namespace: each file that includes this gets
// its own copy, compiled with that file's flags.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/float_bits.h"

namespace kvkernels {
namespace {

class EmulatedTiles {
 public:
  template <int kTile>
  void zero() {
    std::memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }
  template <int kTile>
  void load(const void* source, int64_t stride) {
    for (int64_t row = 0; row < 16; ++row) {
      std::memcpy(tiles_[kTile][row], static_cast<const char*>(source) + row * stride, 64);
    }
  }
  template <int kTile>
  void store(void* target, int64_t stride) {
    for (int64_t row = 0; row < 16; ++row) {
      std::memcpy(static_cast<char*>(target) + row * stride, tiles_[kTile][row], 64);
    }
  }
  template <int kC, int kA, int kB>
  void dot() {
    for (int m = 0; m < 16; ++m) {
      float sums[16];
      std::memcpy(sums, tiles_[kC][m], sizeof(sums));
      for (int pair = 0; pair < 16; ++pair) {
        const uint32_t a = tiles_[kA][m][pair];
        const float low = float_from_bits(a << 16), high = float_from_bits(a & 0xffff0000);
        for (int n = 0; n < 16; ++n) {
          const uint32_t b = tiles_[kB][pair][n];
          sums[n] += low * float_from_bits(b << 16) + high * float_from_bits(b & 0xffff0000);
        }
      }
      std::memcpy(tiles_[kC][m], sums, sizeof(sums));
    }
  }

 private:
  uint32_t tiles_[8][16][16];
};

}  // namespace
}  // namespace kvkernels
