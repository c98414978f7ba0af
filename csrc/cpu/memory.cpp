// Advice to the operating system about memory, by madvise.
#include "kvkernels/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kvkernels {

void advise_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + num_bytes) / page * page;
  // A failure does no harm: a kernel may be built without large pages.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)num_bytes;
#endif
}

}  // namespace kvkernels
