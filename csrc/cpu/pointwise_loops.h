// The pointwise functions for any instruction set. In an anonymous namespace: each file that
// includes this gets its own copy, compiled with that file's flags. It first includes a
// codec_lanes_*.h and defines these functions of lanes:
//
//   divide(a, b), magnitude(v), where_negative(test, a, b)
//   exp2_up_to_0(v)  2^v of numbers that are not above 0
//   sum_of_lanes(v)  a float
#pragma once

#include <cmath>

#include "cpu/pointwise_kernel.h"

namespace kvkernels {
namespace {

// Calls body(i, count) for the vectors of a row; `count` is kLanes, or for the last vector the
// lanes that are left.
template <typename Body>
[[gnu::always_inline]] inline void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, size - i);
}

// A row of a tensor, whose elements are dense.
template <DType kType>
struct Row {
  using E = Elements<kType>;
  std::byte* start;

  static Row of(const void* tensor, int64_t offset) {
    return {static_cast<std::byte*>(const_cast<void*>(tensor)) + offset * E::kBytes};
  }

  Floats read(int64_t i, int64_t count) const { return E::read(start + i * E::kBytes, count); }

  void write(int64_t i, Floats v, int64_t count) const {
    E::write(start + i * E::kBytes, v, count);
  }
};

template <DType kType>
void norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const auto weight = Row<kType>::of(args.weight, 0);
  for (int64_t n = begin; n < end; ++n) {
    const auto row = Row<kType>::of(args.input, n * args.input_stride);
    const auto out = Row<kType>::of(args.out, n * args.size);
    Floats squares = all(0.0f);
    for_each_vector(args.size, [&](int64_t i, int64_t count) {
      const Floats v = row.read(i, count);
      squares = add(squares, mul(v, v));
    });
    const float mean = sum_of_lanes(squares) / static_cast<float>(args.size);
    const Floats scale = all(1.0f / std::sqrt(mean + args.eps));
    for_each_vector(args.size, [&](int64_t i, int64_t count) {
      const Floats v = mul(row.read(i, count), scale), w = weight.read(i, count);
      const Floats scaled =
          args.is_offset ? mul(v, add(w, all(1.0f))) : mul(Elements<kType>::round(v), w);
      out.write(i, scaled, count);
    });
  }
}

template <DType kType>
void rotate_tokens(const RotaryArgs& args, int64_t begin, int64_t end) {
  const auto product = [](Floats a, Floats b) { return Elements<kType>::round(mul(a, b)); };
  const int64_t half = args.head_dim / 2;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t batch = n / args.num_tokens, token = n % args.num_tokens;
    const int64_t angle = batch * args.angle_strides[0] + token * args.angle_strides[1];
    const auto cos = Row<kType>::of(args.cos, angle), sin = Row<kType>::of(args.sin, angle);
    const auto place = [&](const int64_t* strides, int64_t head) {
      return batch * strides[0] + head * strides[1] + token * strides[2];
    };
    for (int64_t head = 0; head < args.num_heads; ++head) {
      const auto in = Row<kType>::of(args.input, place(args.input_strides, head));
      const auto out = Row<kType>::of(args.out, place(args.out_strides, head));
      for_each_vector(half, [&](int64_t i, int64_t count) {
        const Floats a = in.read(i, count), b = in.read(half + i, count);
        const Floats first = sub(product(a, cos.read(i, count)), product(b, sin.read(i, count)));
        const Floats second =
            add(product(b, cos.read(half + i, count)), product(a, sin.read(half + i, count)));
        out.write(i, first, count);
        out.write(half + i, second, count);
      });
    }
  }
}

inline Floats sigmoid(Floats v) {
  const Floats small = exp2_up_to_0(mul(magnitude(v), all(-kLog2E)));
  const Floats of_magnitude = divide(all(1.0f), add(all(1.0f), small));
  return where_negative(v, mul(small, of_magnitude), of_magnitude);
}

template <Activation kActivation>
inline Floats activate(Floats v) {
  if (kActivation == Activation::kSilu) return mul(v, sigmoid(v));
  // (1 + tanh(u)) / 2 is the sigmoid of 2 u, and is accurate also where the tanh is almost -1.
  const Floats cube = mul(mul(v, v), v);
  const Floats u = add(v, mul(cube, all(0.044715f)));
  return mul(v, sigmoid(mul(u, all(1.59576912f))));  // 2 * sqrt(2 / pi)
}

template <DType kType, Activation kActivation>
void gate_rows(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const auto gate = Row<kType>::of(args.gate, n * args.gate_stride);
    const auto up = Row<kType>::of(args.up, n * args.up_stride);
    const auto out = Row<kType>::of(args.out, n * args.size);
    for_each_vector(args.size, [&](int64_t i, int64_t count) {
      const Floats active = Elements<kType>::round(activate<kActivation>(gate.read(i, count)));
      out.write(i, mul(active, up.read(i, count)), count);
    });
  }
}

template <DType kType>
void activate_rows(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  if (args.activation == Activation::kSilu) {
    gate_rows<kType, Activation::kSilu>(args, begin, end);
  } else {
    gate_rows<kType, Activation::kGeluTanh>(args, begin, end);
  }
}

template <DType kType>
void add_rows(const AddArgs& args, int64_t begin, int64_t end) {
  const auto rows = [&](const void* tensor) { return Row<kType>::of(tensor, begin * args.size); };
  const auto a = rows(args.a), b = rows(args.b), out = rows(args.out);
  for_each_vector((end - begin) * args.size, [&](int64_t i, int64_t count) {
    out.write(i, add(a.read(i, count), b.read(i, count)), count);
  });
}

template <DType kType>
constexpr PointwiseKernels kPointwise = {norm_rows<kType>, rotate_tokens<kType>,
                                         activate_rows<kType>, add_rows<kType>};

inline PointwiseKernels pointwise_kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return kPointwise<DType::kFloat32>;
    case DType::kFloat16:
      return kPointwise<DType::kFloat16>;
    default:
      return kPointwise<DType::kBFloat16>;
  }
}

}  // namespace
}  // namespace kvkernels
