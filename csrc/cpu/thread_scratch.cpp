#include "cpu/thread_scratch.h"

#include <cstdlib>
#include <new>

namespace kvkernels {
namespace {

struct AlignedBuffer {
  ~AlignedBuffer() { std::free(data); }
  float* data = nullptr;
  int64_t size = 0;
};

}  // namespace

float* thread_scratch(int slot, int64_t num_floats) {
  thread_local AlignedBuffer buffers[5];
  AlignedBuffer& buffer = buffers[slot];
  if (buffer.size < num_floats) {
    std::free(buffer.data);
    buffer.size = 0;
    const int64_t num_bytes = (num_floats * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, num_bytes));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = num_floats;
  }
  return buffer.data;
}

}  // namespace kvkernels
