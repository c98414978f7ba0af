// Threads: the host program's OpenMP runtime where there is one, else a small pool of our own.
#include "kvkernels/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "kvkernels/torch_symbols.h"

namespace kvkernels {
namespace {

void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// ---- the host's OpenMP runtime -------------------------------------------------------------

// PyTorch's workers spin for a while after each of its own parallel regions. A second pool would
// have to share the cores with those spinning threads, at up to half the speed. So if a runtime is
// already loaded, its own team is used: every OpenMP runtime on Linux exports GOMP_parallel, the
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
  // Several runtimes may be loaded; PyTorch's is the one whose threads spin.
  auto& paths = *static_cast<std::vector<std::string>*>(result);
  paths.insert(std::strstr(path, "torch") != nullptr ? paths.begin() : paths.end(), path);
  return 0;
}

struct HostRuntime {
  GompParallel parallel = nullptr;
  void (*set_num_threads)(int) = nullptr;  // for the calling thread's regions
};

HostRuntime find_host_runtime() {
  std::vector<std::string> paths;
  dl_iterate_phdr(note_openmp_library, &paths);
  for (const std::string& path : paths) {
    void* library = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr) continue;
    // Not OpenMP: Open MPI, for one, has libraries whose names begin alike.
    auto* const parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
    if (parallel == nullptr) continue;
    return {parallel, reinterpret_cast<void (*)(int)>(dlsym(library, "omp_set_num_threads"))};
  }
  return {};
}

// PyTorch's MKL: once PyTorch has been told a number of threads, MKL keeps a number of its own and
// no longer follows OpenMP's.
using SetMklThreads = int (*)(int);

SetMklThreads find_mkl() {
  return reinterpret_cast<SetMklThreads>(find_torch_symbol("MKL_Set_Num_Threads_Local"));
}

// ---- our own threads -----------------------------------------------------------------------

// For how long an idle worker spins before it sleeps: longer than the pause between two layers'
// calls, since waking a sleeping thread takes as long as a small call.
constexpr auto kAwake = std::chrono::microseconds(200);
// For how long it spins without yielding its processor to others.
constexpr auto kAlert = std::chrono::microseconds(20);

// Spins until is_ready(); false if that took longer than kAwake.
template <typename IsReady>
bool look_out(const IsReady& is_ready) {
  const auto begin = std::chrono::steady_clock::now();
  while (true) {
    for (int i = 0; i < 32; ++i) {
      if (is_ready()) return true;
      pause_thread();
    }
    const auto waited = std::chrono::steady_clock::now() - begin;
    if (waited > kAwake) return false;
    if (waited > kAlert) std::this_thread::yield();
  }
}

// A pool that does one caller's work at a time. Workers that come in time take part in it; the
// caller does not wait for a worker that has not begun when nothing is left to do. So a caller is
// never held up by a worker to which the system has given no processor, as it would be at the end
// of an OpenMP region.
class ThreadPool {
 public:
  void run(int num_threads, const std::function<void()>& body) {
    // A second caller at the same time works alone instead of waiting for the first one's work.
    std::unique_lock<std::mutex> alone(run_mutex_, std::try_to_lock);
    const int num_helpers = alone.owns_lock() ? start_workers(num_threads - 1) : 0;
    if (num_helpers > 0) offer(body, num_helpers);
    body();
    if (num_helpers > 0) withdraw();
  }

 private:
  // state_ counts places that workers may still take (in units of kPlace), plus workers that are at
  // work.
  static constexpr uint32_t kPlace = 1u << 16, kAtWork = kPlace - 1;

  int start_workers(int num_wanted) {
    num_wanted = std::min<int>(num_wanted, kAtWork);
    while (num_workers_ < num_wanted) {
      try {
        std::thread(&ThreadPool::work, this, num_offers_.load()).detach();
      } catch (const std::system_error&) {
        break;  // the process may have no more threads: fewer do the same work
      }
      ++num_workers_;
    }
    return std::min(num_workers_, num_wanted);
  }

  void offer(const std::function<void()>& body, int num_places) {
    body_ = &body;
    state_.store(static_cast<uint32_t>(num_places) * kPlace, std::memory_order_release);
    num_offers_.fetch_add(1);
    num_offers_.notify_all();
  }

  void withdraw() {
    uint32_t state = state_.fetch_and(kAtWork, std::memory_order_acq_rel) & kAtWork;
    const auto is_done = [&] {
      state = state_.load(std::memory_order_acquire);
      return state == 0;
    };
    while (!is_done() && !look_out(is_done)) state_.wait(state);
  }

  bool take_place() {
    uint32_t state = state_.load(std::memory_order_relaxed);
    while (state >= kPlace) {
      if (state_.compare_exchange_weak(state, state - kPlace + 1, std::memory_order_acq_rel)) {
        return true;
      }
    }
    return false;
  }

  void work(uint32_t seen) {
    const auto is_offered = [&] { return num_offers_.load(std::memory_order_acquire) != seen; };
    while (true) {
      while (!is_offered() && !look_out(is_offered)) num_offers_.wait(seen);
      seen = num_offers_.load(std::memory_order_acquire);
      if (!take_place()) continue;
      (*body_)();
      state_.fetch_sub(1, std::memory_order_acq_rel);
      state_.notify_one();
    }
  }

  std::mutex run_mutex_;  // held by the one caller that the workers serve
  int num_workers_ = 0;   // guarded by run_mutex_
  // Written before a place is offered; read only by workers that have taken one.
  const std::function<void()>* body_ = nullptr;
  std::atomic<uint32_t> state_{0};
  std::atomic<uint32_t> num_offers_{0};
};

// Both are changed in a forked child: threads do not survive a fork, so the parent's pool would
// never answer there, and neither would the host runtime's team.
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

// Registered when this library is loaded, not at the first call: the host may use its runtime, and
// fork, before it calls anything here.
[[maybe_unused]] const int g_fork_handler = pthread_atfork(nullptr, nullptr, forget_threads);

const HostRuntime& host_runtime() {
  static const HostRuntime runtime = find_host_runtime();
  return runtime;
}

thread_local bool t_prefers_own_threads = false;

GompParallel host_parallel() {
  const HostRuntime& runtime = host_runtime();
  return g_is_forked || t_prefers_own_threads ? nullptr : runtime.parallel;
}

}  // namespace

bool prefer_own_threads(bool is_wanted) { return std::exchange(t_prefers_own_threads, is_wanted); }

void set_host_threads(int num_threads) {
  if (const auto set_num_threads = host_runtime().set_num_threads) set_num_threads(num_threads);
}

int set_mkl_threads(int num_threads) {
  static const SetMklThreads set_num_threads = find_mkl();
  return set_num_threads != nullptr ? set_num_threads(num_threads) : 0;
}

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
  if (const GompParallel gomp_parallel = host_parallel()) {
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
