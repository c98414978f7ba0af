// Linear layers in plain C++ for any processor. Loops over lanes are laid out so that a compiler
// turns them into vectors of whatever width it may use.
#include "cpu/float_formats.h"
#include "cpu/linear_products.h"

namespace kvkernels {
namespace {

template <typename T>
struct PlainLanes {
  using Item = T;
  static constexpr int64_t kStep = 8;
  static constexpr int kSums = 4;
  struct Vector {
    float lanes[kStep];
  };
  using Sum = Vector;

  static Sum zero() { return {}; }

  static Vector load(const Item* p) {
    Vector v;
    for (int64_t i = 0; i < kStep; ++i) v.lanes[i] = to_float(p[i]);
    return v;
  }

  static Vector load(const Item* p, int64_t count) {
    Vector v = {};
    for (int64_t i = 0; i < count; ++i) v.lanes[i] = to_float(p[i]);
    return v;
  }

  static Sum add(Sum sum, const Vector& a, const Vector& b) {
    for (int64_t i = 0; i < kStep; ++i) sum.lanes[i] += a.lanes[i] * b.lanes[i];
    return sum;
  }

  static void reduce(const Sum* sums, float* totals) {
    for (int s = 0; s < kSums; ++s) {
      totals[s] = 0;
      for (int64_t i = 0; i < kStep; ++i) totals[s] += sums[s].lanes[i];
    }
  }

  static void store(const float* totals, int64_t count, Item* out) {
    for (int64_t i = 0; i < count; ++i) from_float(totals[i], out[i]);
  }

  static float widen(Item item) { return to_float(item); }
};

}  // namespace

LinearKernel portable_linear(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {multiply_tile<PlainLanes<float>>};
    case DType::kFloat16:
      return {multiply_tile<PlainLanes<Float16>>};
    default:
      return {multiply_tile<PlainLanes<BFloat16>>};
  }
}

}  // namespace kvkernels
