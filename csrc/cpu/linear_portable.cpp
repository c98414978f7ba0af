// Linear layers in plain C++ for any processor. Loops over lanes are written so that a compiler
// turns them into vectors of whatever width the processor has.
#include "cpu/float_formats.h"
#include "cpu/linear_products.h"

namespace kvkernels {
namespace {

template <typename T>
struct PlainLanes {
  using Item = T;
  using Row = T;
  static constexpr int64_t kStep = 8;
  static constexpr int kVectors = 1, kPanelCols = 4, kBlockRows = 4, kMaxSums = 4;
  struct Vector {
    float lanes[kStep];
  };
  using Sum = Vector;

  static int64_t rows_of_block(int64_t left) { return std::min<int64_t>(left, kBlockRows); }
  static constexpr int block_cols(int num_rows) { return 4 / (num_rows == 3 ? 4 : num_rows); }

  static Sum zero() { return {}; }

  template <int>
  static Vector load(const Item* p) {
    Vector v;
    for (int64_t i = 0; i < kStep; ++i) v.lanes[i] = to_float(p[i]);
    return v;
  }

  template <int>
  static Vector load(const Item* p, int64_t count) {
    Vector v = {};
    for (int64_t i = 0; i < count; ++i) v.lanes[i] = to_float(p[i]);
    return v;
  }

  static Sum add(Sum sum, const Vector& a, const Vector& b) {
    for (int64_t i = 0; i < kStep; ++i) sum.lanes[i] += a.lanes[i] * b.lanes[i];
    return sum;
  }

  template <int kCount>
  static void reduce(const Sum* sums, float* totals) {
    for (int s = 0; s < kCount; ++s) {
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
