// Runs linear layers on memory that ends at a page nobody may touch, so that a vector read past the
// end of a row faults, and compares them with sums in double precision.
#include "kvkernels/linear.h"

#include <algorithm>
#include <cmath>

#include "guarded.h"

namespace {

using namespace kvkernels;

struct Shape {
  int64_t num_rows, in_features, out_features;
};

void check_layer(const Shape& shape, DType dtype, AttentionPath path, int num_threads) {
  const auto [num_rows, in_features, out_features] = shape;
  const size_t item = dtype == DType::kFloat32 ? 4 : 2;
  const Guarded input(num_rows * in_features * item), weight(out_features * in_features * item);
  const Guarded bias(out_features * item), out(num_rows * out_features * item);
  const auto fill = [&](const Guarded& memory, int64_t count, int64_t step) {
    // Multiples of 1/8 below 2: every dtype holds them.
    for (int64_t i = 0; i < count; ++i) {
      put(memory.as<void>(), dtype, i, static_cast<float>(i * step % 31 - 15) / 8);
    }
  };
  fill(input, num_rows * in_features, 7);
  fill(weight, out_features * in_features, 11);
  fill(bias, out_features, 5);
  // Its rows in two layers, and after them the whole again, to which the sums are compared.
  const int64_t half = out_features / 2;
  const Guarded upper(num_rows * half * item), lower(num_rows * (out_features - half) * item);
  const size_t rest = half * in_features * item;
  const LinearLayer layers[] = {
      {weight.as<void>(), bias.as<void>(), upper.as<void>(), half, in_features},
      {weight.as<char>() + rest, bias.as<char>() + half * item, lower.as<void>(),
       out_features - half, in_features},
      {weight.as<void>(), bias.as<void>(), out.as<void>(), out_features, in_features}};
  linear({input.as<void>(), layers, 3, num_rows, in_features, in_features, dtype}, path,
         num_threads);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t col = 0; col < out_features; ++col) {
      double sum = get(bias.as<void>(), dtype, col);
      for (int64_t i = 0; i < in_features; ++i) {
        sum += static_cast<double>(get(input.as<void>(), dtype, row * in_features + i)) *
               get(weight.as<void>(), dtype, col * in_features + i);
      }
      const double got = get(out.as<void>(), dtype, row * out_features + col);
      const double part =
          col < half ? get(upper.as<void>(), dtype, row * half + col)
                     : get(lower.as<void>(), dtype, row * (out_features - half) + col - half);
      CHECK(part == got);
      CHECK(std::abs(got - sum) <= std::max(1.0, std::abs(sum)) / 128);
    }
  }
}

}  // namespace

int main() {
  const AttentionPath paths[] = {AttentionPath::kPortable, AttentionPath::kAvx2,
                                 AttentionPath::kAvx512,   AttentionPath::kAvx512Bf16,
                                 AttentionPath::kAmx,      AttentionPath::kAmxEmulated};
  const Shape shapes[] = {{1, 1, 1},     {1, 31, 17},   {2, 33, 16},   {3, 32, 5},     {5, 64, 100},
                          {131, 40, 9},  {7, 48, 65},   {0, 8, 8},     {2, 0, 3},      {17, 33, 49},
                          {90, 330, 34}, {300, 36, 33}, {1030, 33, 3}, {270, 2100, 20}};
  for (const AttentionPath path : paths) {
    if (!has_attention_path(path)) continue;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const Shape& shape : shapes) check_layer(shape, dtype, path, 3);
    }
  }
  return 0;
}
