// Threads: the host program's OpenMP runtime where there is one, else a small pool of our own.
#include "kvkernels/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

namespace kvkernels {
namespace {

// ---- the host's OpenMP runtime -------------------------------------------------------------

// PyTorch's workers spin for a while after each of its own parallel regions. A second pool would
// have to share the cores with those spinning threads, at up to half the speed. So when a runtime
// is already loaded its own team is used: every OpenMP runtime on Linux exports GOMP_parallel, the
// function GCC compiles `#pragma omp parallel` into.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

int note_openmp_library(dl_phdr_info* info, size_t, void* result) {
  const char* path = info->dlpi_name;
  if (path == nullptr) return 0;
  const char* slash = std::strrchr(path, '/');
  const char* name = slash ? slash + 1 : path;
  const bool is_openmp =
      std::strstr(name, "libgomp") || std::strstr(name, "libiomp") || std::strstr(name, "libomp");
  if (!is_openmp) return 0;
  std::string& found = *static_cast<std::string*>(result);
  const bool is_torchs = std::strstr(path, "torch") != nullptr;
  if (found.empty() || is_torchs) found = path;
  return is_torchs;  // several runtimes may be loaded; PyTorch's is the one whose threads spin
}

GompParallel find_host_runtime() {
  std::string path;
  dl_iterate_phdr(note_openmp_library, &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
}

// ---- our own threads -----------------------------------------------------------------------

class ThreadPool {
 public:
  void run(int num_threads, const std::function<void()>& body) {
    // A second caller at the same time works alone instead of waiting for the first one's work.
    std::unique_lock<std::mutex> alone(run_mutex_, std::try_to_lock);
    const int num_helpers = alone.owns_lock() ? start_workers(num_threads - 1) : 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (num_helpers > 0) {
        body_ = &body;
        num_wanted_ = num_pending_ = num_helpers;
        ++generation_;
      }
    }
    if (num_helpers > 0) start_.notify_all();
    body();
    if (num_helpers == 0) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return num_pending_ == 0; });
    body_ = nullptr;
  }

 private:
  int start_workers(int num_wanted) {
    while (num_workers_ < num_wanted) {
      try {
        std::thread(&ThreadPool::work, this, num_workers_, generation_).detach();
      } catch (const std::system_error&) {
        break;  // the process may have no more threads: fewer do the same work
      }
      ++num_workers_;
    }
    return std::min(num_workers_, num_wanted);
  }

  void work(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= num_wanted_) continue;
      const std::function<void()>* body = body_;
      lock.unlock();
      (*body)();
      lock.lock();
      if (--num_pending_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_;  // held by the one caller that the workers serve
  std::mutex mutex_;      // guards everything below but num_workers_, which run_mutex_ guards
  std::condition_variable start_, done_;
  const std::function<void()>* body_ = nullptr;
  uint64_t generation_ = 0;
  int num_wanted_ = 0, num_pending_ = 0, num_workers_ = 0;
};

// Both are replaced in a forked child: threads do not survive a fork, so the parent's pool would
// never answer there, and neither would the team of the host's runtime.
std::atomic<ThreadPool*> g_pool{nullptr};
std::atomic<bool> g_is_forked{false};

void forget_threads() {
  g_is_forked = true;
  g_pool = nullptr;  // leaked on purpose: its locks may be held by threads that no longer exist
}

ThreadPool& own_pool() {
  ThreadPool* pool = g_pool;
  if (pool == nullptr) {
    auto* fresh = new ThreadPool;  // never destroyed: its workers live as long as the process
    if (g_pool.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
  }
  return *pool;
}

GompParallel host_runtime() {
  static const GompParallel runtime = [] {
    pthread_atfork(nullptr, nullptr, forget_threads);
    return find_host_runtime();
  }();
  return g_is_forked ? nullptr : runtime;
}

}  // namespace

void run_parallel(int num_threads, const std::function<void()>& body) {
  if (num_threads <= 1) {
    body();
    return;
  }
  std::mutex mutex;
  std::exception_ptr error;
  // Nothing may be thrown through a runtime written in C, nor out of another thread.
  const std::function<void()> guarded = [&]() noexcept {
    try {
      body();
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  if (const GompParallel gomp_parallel = host_runtime()) {
    auto call = [](void* context) { (*static_cast<const std::function<void()>*>(context))(); };
    gomp_parallel(call, const_cast<std::function<void()>*>(&guarded), num_threads, 0);
  } else {
    own_pool().run(num_threads, guarded);
  }
  if (error) std::rethrow_exception(error);
}

void parallel_ranges(int64_t num_items, int64_t grain, int num_threads,
                     const std::function<void(int64_t, int64_t)>& body) {
  const int64_t num_ranges = (num_items + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  run_parallel(static_cast<int>(std::min<int64_t>(num_threads, num_ranges)), [&] {
    for (int64_t range = next++; range < num_ranges; range = next++) {
      body(range * grain, std::min(num_items, (range + 1) * grain));
    }
  });
}

}  // namespace kvkernels
