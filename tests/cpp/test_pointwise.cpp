// Runs the pointwise functions on memory that ends at a page nobody may touch, so that a vector
// read past the end of a row faults, and compares them with the same in double precision.
#include "kvkernels/pointwise.h"

#include <algorithm>
#include <cmath>

#include "guarded.h"

namespace {

using namespace kvkernels;

struct Filled : Guarded {
  Filled(DType dtype, int64_t count, int64_t step) : Guarded(count * item_bytes(dtype)) {
    // Multiples of 1/8 below 2: every dtype holds them.
    for (int64_t i = 0; i < count; ++i) {
      put(as<void>(), dtype, i, static_cast<float>(i * step % 31 - 15) / 8);
    }
  }
};

void check_near(double got, double exact) {
  CHECK(std::abs(got - exact) <= std::max(1.0, std::abs(exact)) / 64);
}

struct Shape {
  int64_t num_rows, size;
};

void check_rms_norm(const Shape& shape, DType dtype, AttentionPath path, bool is_offset) {
  const auto [num_rows, size] = shape;
  const Filled input(dtype, num_rows * size, 7), weight(dtype, size, 5);
  const Guarded out(num_rows * size * item_bytes(dtype));
  const auto at = [&](const Guarded& memory, int64_t i) {
    return get(memory.as<void>(), dtype, i);
  };
  rms_norm({input.as<void>(), weight.as<void>(), out.as<void>(), num_rows, size, size, dtype, 0.5f,
            is_offset},
           path, 3);
  for (int64_t row = 0; row < num_rows; ++row) {
    double squares = 0;
    for (int64_t i = 0; i < size; ++i) squares += std::pow(at(input, row * size + i), 2);
    const double scale = 1 / std::sqrt(squares / size + 0.5);
    for (int64_t i = 0; i < size; ++i) {
      const double factor = at(weight, i) + (is_offset ? 1 : 0);
      check_near(at(out, row * size + i), at(input, row * size + i) * scale * factor);
    }
  }
}

void check_gated_activation(const Shape& shape, DType dtype, AttentionPath path,
                            Activation activation) {
  const auto [num_rows, size] = shape;
  const Filled gate(dtype, num_rows * size, 7), up(dtype, num_rows * size, 11);
  const Guarded out(num_rows * size * item_bytes(dtype));
  gated_activation({gate.as<void>(), up.as<void>(), out.as<void>(), num_rows, size, size, size,
                    dtype, activation},
                   path, 3);
  for (int64_t i = 0; i < num_rows * size; ++i) {
    const double x = get(gate.as<void>(), dtype, i);
    const double silu = x / (1 + std::exp(-x));
    const double gelu =
        x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * std::pow(x, 3))));
    const double active = activation == Activation::kSilu ? silu : gelu;
    check_near(get(out.as<void>(), dtype, i), active * get(up.as<void>(), dtype, i));
  }
}

void check_rotary_embedding(int64_t num_tokens, int64_t head_dim, DType dtype, AttentionPath path) {
  constexpr int64_t kBatchSize = 2, kNumHeads = 3;
  const int64_t num_rows = kBatchSize * num_tokens, half = head_dim / 2;
  const int64_t heads_dim = kNumHeads * head_dim;
  const Filled input(dtype, num_rows * heads_dim, 7);
  const Filled cos(dtype, num_tokens * head_dim, 5);
  const Filled sin(dtype, num_tokens * head_dim, 3);
  const Guarded out(num_rows * heads_dim * item_bytes(dtype));
  const int64_t batch_stride = num_tokens * heads_dim;
  rotary_embedding({input.as<void>(),
                    cos.as<void>(),
                    sin.as<void>(),
                    out.as<void>(),
                    kBatchSize,
                    kNumHeads,
                    num_tokens,
                    head_dim,
                    {batch_stride, head_dim, heads_dim},
                    {batch_stride, head_dim, heads_dim},
                    {0, head_dim},
                    dtype},
                   path, 3);
  const auto at = [&](const Guarded& memory, int64_t i) {
    return static_cast<double>(get(memory.as<void>(), dtype, i));
  };
  for (int64_t row = 0; row < num_rows * kNumHeads; ++row) {
    const int64_t token = row / kNumHeads % num_tokens;
    for (int64_t i = 0; i < head_dim; ++i) {
      const int64_t angle = token * head_dim + i, other = (i + half) % head_dim;
      const double sign = i < half ? -1 : 1;
      check_near(at(out, row * head_dim + i),
                 at(input, row * head_dim + i) * at(cos, angle) +
                     sign * at(input, row * head_dim + other) * at(sin, angle));
    }
  }
}

void check_add(const Shape& shape, DType dtype, AttentionPath path) {
  const auto [num_rows, size] = shape;
  const Filled a(dtype, num_rows * size, 7), b(dtype, num_rows * size, 11);
  const Guarded out(num_rows * size * item_bytes(dtype));
  const auto at = [&](const Guarded& memory, int64_t i) {
    return get(memory.as<void>(), dtype, i);
  };
  add({a.as<void>(), b.as<void>(), out.as<void>(), num_rows, size, dtype}, path, 3);
  for (int64_t i = 0; i < num_rows * size; ++i) CHECK(at(out, i) == at(a, i) + at(b, i));
  // Over one of them.
  add({out.as<void>(), b.as<void>(), out.as<void>(), num_rows, size, dtype}, path, 3);
  for (int64_t i = 0; i < num_rows * size; ++i) CHECK(at(out, i) == at(a, i) + 2 * at(b, i));
}

}  // namespace

int main() {
  const AttentionPath paths[] = {AttentionPath::kPortable, AttentionPath::kAvx2,
                                 AttentionPath::kAvx512};
  const Shape shapes[] = {{0, 8}, {1, 1}, {2, 15}, {3, 33}, {150, 400}};
  for (const AttentionPath path : paths) {
    if (!has_attention_path(path)) continue;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const Shape& shape : shapes) {
        check_add(shape, dtype, path);
        for (const bool is_offset : {false, true}) check_rms_norm(shape, dtype, path, is_offset);
        for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
          check_gated_activation(shape, dtype, path, activation);
        }
      }
      for (const int64_t head_dim : {2, 22, 64, 96}) {
        check_rotary_embedding(5, head_dim, dtype, path);
      }
      check_rotary_embedding(150, 128, dtype, path);
    }
  }
  return 0;
}
