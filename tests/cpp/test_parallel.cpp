// Shares work out among threads of our own, from several callers at once, and counts what was done.
#include "kvkernels/parallel.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "guarded.h"

namespace {

using namespace kvkernels;

// Every item is done once, and by the time of the return: what the bodies write needs no lock.
void check_items(int num_threads, int num_calls) {
  for (int call = 0; call < num_calls; ++call) {
    std::vector<int> times_done(1 + call % 50);
    std::atomic<size_t> next{0};
    run_parallel(num_threads, [&] {
      for (size_t item = next++; item < times_done.size(); item = next++) ++times_done[item];
    });
    for (const int times : times_done) CHECK(times == 1);
  }
}

void check_errors() {
  for (int call = 0; call < 100; ++call) {
    std::atomic<int> num_left{3};
    bool is_caught = false;
    try {
      run_parallel(3, [&] {
        while (num_left-- > 0) throw std::runtime_error("on purpose");
      });
    } catch (const std::runtime_error&) {
      is_caught = true;
    }
    CHECK(is_caught);
  }
}

// Only as many threads as asked for, however many workers earlier calls have left behind.
void check_bound() {
  for (int call = 0; call < 200; ++call) {
    const int num_threads = 1 + call % 4;
    std::atomic<int> num_bodies{0};
    run_parallel(num_threads, [&] { ++num_bodies; });
    CHECK(num_bodies >= 1 && num_bodies <= num_threads);
  }
}

// Workers that have gone to sleep come again.
void check_helpers_come() {
  for (int call = 0; call < 20; ++call) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::atomic<bool> has_helper{false};
    std::atomic<int> num_bodies{0};
    run_parallel(2, [&] {
      if (++num_bodies == 2) has_helper = true;
      while (!has_helper) std::this_thread::yield();
    });
    CHECK(num_bodies == 2);
  }
}

}  // namespace

int main() {
  prefer_own_threads(true);
  check_items(1, 50);
  check_items(3, 3000);
  check_errors();
  check_bound();
  check_helpers_come();
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([i] {
      prefer_own_threads(i > 0);
      check_items(4, 1000);
    });
  }
  for (std::thread& caller : callers) caller.join();
  return 0;
}
