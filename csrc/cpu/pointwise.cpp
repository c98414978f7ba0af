// Pointwise functions: chooses the kernels, and shares rows among threads.
#include "kvkernels/pointwise.h"

#include <algorithm>

#include "cpu/pointwise_kernel.h"
#include "kvkernels/cpu_features.h"
#include "kvkernels/parallel.h"

namespace kvkernels {
namespace {

// Elements per piece of work: they take a thread about as long as it takes to wake one.
constexpr int64_t kGrainElements = 32 << 10;

PointwiseKernels find_kernels(AttentionPath path, DType dtype) {
#if defined(__x86_64__)
  const bool is_plain = path == AttentionPath::kPortable || path == AttentionPath::kAmxEmulated;
  if (!is_plain && path != AttentionPath::kAvx2 && best_isa() >= Isa::kAvx512) {
    return avx512_pointwise_kernels(dtype);
  }
  if (!is_plain && best_isa() >= Isa::kAvx2) return avx2_pointwise_kernels(dtype);
#endif
  return portable_pointwise_kernels(dtype);
}

template <typename Args>
void share_rows(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t num_rows,
                int64_t row_size, int num_threads) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, row_size));
  parallel_ranges(num_rows, grain, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void rms_norm(const RmsNormArgs& args, AttentionPath path, int num_threads) {
  const auto kernel = find_kernels(path, args.dtype).rms_norm;
  share_rows(kernel, args, args.num_rows, args.size, num_threads);
}

void rotary_embedding(const RotaryArgs& args, AttentionPath path, int num_threads) {
  const auto kernel = find_kernels(path, args.dtype).rotary_embedding;
  share_rows(kernel, args, args.batch_size * args.num_tokens, args.num_heads * args.head_dim,
             num_threads);
}

void gated_activation(const GatedActivationArgs& args, AttentionPath path, int num_threads) {
  const auto kernel = find_kernels(path, args.dtype).gated_activation;
  share_rows(kernel, args, args.num_rows, args.size, num_threads);
}

void add(const AddArgs& args, AttentionPath path, int num_threads) {
  const auto kernel = find_kernels(path, args.dtype).add;
  share_rows(kernel, args, args.num_rows, args.size, num_threads);
}

}  // namespace kvkernels
