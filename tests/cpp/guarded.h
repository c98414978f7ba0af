// Memory that ends at a page nobody may touch, numbers to fill it with, and CHECK.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kvkernels/attention.h"

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

// Memory that ends, to the byte, where a page without any rights begins.
class Guarded {
 public:
  explicit Guarded(size_t num_bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t usable = (num_bytes + page - 1) / page * page;
    size_ = usable + page;
    base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(base_ != MAP_FAILED);
    CHECK(mprotect(static_cast<char*>(base_) + usable, page, PROT_NONE) == 0);
    data_ = static_cast<char*>(base_) + usable - num_bytes;
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void* base_;
  size_t size_;
  char* data_;
};

using kvkernels::DType;

inline float round_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= 0xffff0000;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void put(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(bits >> 16);
  }
}

inline float get(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float some_number() { return round_to_bfloat16((std::rand() % 2001 - 1000) / 700.0f); }
