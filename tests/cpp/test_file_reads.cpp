// Reads of files by several threads: whatever the calls give, every byte that is told of is right,
// and whoever waits is told in time.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <thread>
#include <vector>

#include "guarded.h"
#include "kvkernels/file_reads.h"

using namespace kvkernels;
using namespace std::chrono_literals;

namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kFileBytes = 300000;

struct File {
  File() : bytes(kFileBytes) {
    std::mt19937 rng(0);
    for (char& byte : bytes) byte = static_cast<char>(rng());
    char path[] = "/tmp/kvkernels-file-reads-XXXXXX";
    fd = mkstemp(path);
    if (fd < 0 || unlink(path) != 0) std::abort();
    if (write(fd, bytes.data(), bytes.size()) != kFileBytes) std::abort();
  }
  ~File() { close(fd); }

  std::vector<char> bytes;
  int fd;
};

void work_together(FileReads& reads, int num_threads) {
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back([&reads] { reads.work(); });
  reads.work();
  CHECK(reads.wait_until(FileReads::Clock::time_point::max()));
  for (std::thread& thread : threads) thread.join();
}

// Every read fills memory that ends where nobody may write, in one or several buffers.
void check_random_reads(FileReads::Preadv preadv) {
  const File file;
  std::mt19937 rng(1);
  for (int round = 0; round < 60; ++round) {
    std::deque<Guarded> memory;
    std::vector<FileRead> asked;
    std::vector<int64_t> expected;
    const size_t num_reads = rng() % 20;
    for (size_t i = 0; i < num_reads; ++i) {
      FileRead& read = asked.emplace_back();
      read.fd = file.fd;
      read.offset = static_cast<int64_t>(rng() % (kFileBytes + 5000));
      int64_t num_bytes = 0;
      for (size_t left = rng() % 4; left > 0; --left) {
        const size_t size = 1 + rng() % 60000;
        read.into.push_back({memory.emplace_back(size).as<char>(), size});
        num_bytes += static_cast<int64_t>(size);
      }
      expected.push_back(std::clamp<int64_t>(kFileBytes - read.offset, 0, num_bytes));
    }
    FileReads reads(asked, 1 + static_cast<int64_t>(rng() % 30000), preadv);
    work_together(reads, 1 + round % 4);
    CHECK(reads.outcomes() == expected);
    for (size_t i = 0; i < num_reads; ++i) {
      const char* at = file.bytes.data() + asked[i].offset;
      int64_t left = expected[i];
      for (const iovec& part : asked[i].into) {
        const auto size = std::min<int64_t>(left, static_cast<int64_t>(part.iov_len));
        CHECK(std::memcmp(part.iov_base, at, static_cast<size_t>(size)) == 0);
        at += size;
        left -= size;
      }
    }
  }
}

// A call that is interrupted every other time, and never fills more than one buffer.
ssize_t interrupted_preadv(int fd, const iovec* into, int, off_t offset) {
  static std::atomic<int> num_calls;
  if (++num_calls % 2 == 0) {
    errno = EINTR;
    return -1;
  }
  const iovec part = {into->iov_base, std::min<size_t>(into->iov_len, 3000)};
  return preadv(fd, &part, 1, offset);
}

ssize_t failing_preadv(int fd, const iovec* into, int count, off_t offset) {
  if (offset == 2 * kPage) {
    errno = EIO;
    return -1;
  }
  return preadv(fd, into, count, offset);
}

void test_a_read_that_fails_costs_no_other() {
  const File file;
  // Each has its own: two threads read at once.
  std::vector<char> single(4 * kPage), in_pieces(4 * kPage), of_none(4 * kPage);
  std::vector<FileRead> asked;
  for (int i = 0; i < 4; ++i) {
    const iovec into = {single.data() + i * kPage, kPage};
    asked.push_back({file.fd, i * kPage, {into}, 1});
  }
  asked.push_back({file.fd, 0, {{in_pieces.data(), in_pieces.size()}}, 1});  // one piece fails
  asked.push_back({-1, 0, {{of_none.data(), of_none.size()}}, 1});
  FileReads reads(asked, kPage, failing_preadv);
  CHECK(reads.num_pieces() == 12);
  work_together(reads, 2);
  const std::vector<int64_t> expected = {kPage, kPage, -EIO, kPage, -EIO, -EBADF};
  CHECK(reads.outcomes() == expected);
}

std::atomic<int> num_calls_at_the_end;

ssize_t counting_preadv(int fd, const iovec* into, int count, off_t offset) {
  ++num_calls_at_the_end;
  return preadv(fd, into, count, offset);
}

void test_a_direct_read_does_not_go_on_at_an_odd_place() {
  const File file;
  std::vector<char> memory(2 * kPage);
  const int64_t offset = kFileBytes / kPage * kPage;
  const FileRead asked = {file.fd, offset, {{memory.data(), memory.size()}}, kPage};
  FileReads reads({asked}, int64_t{1} << 20, counting_preadv);
  work_together(reads, 1);
  CHECK(reads.outcomes() == std::vector<int64_t>{kFileBytes - offset});
  CHECK(num_calls_at_the_end == 1);
}

std::atomic<bool> may_go_on;
std::atomic<bool> hangs;

ssize_t hanging_preadv(int fd, const iovec* into, int count, off_t offset) {
  if (offset == kPage) {
    hangs = true;
    while (!may_go_on) std::this_thread::sleep_for(1ms);
  }
  return preadv(fd, into, count, offset);
}

void test_a_read_that_hangs_is_left_behind() {
  const File file;
  std::vector<char> memory(4 * kPage, '\xEE');
  std::vector<FileRead> asked;
  for (int i = 0; i < 4; ++i) {
    const iovec into = {memory.data() + i * kPage, kPage};
    asked.push_back({file.fd, i * kPage, {into}, 1});
  }
  FileReads reads(asked, kPage, hanging_preadv);
  std::thread only([&reads] { reads.work(); });
  while (!hangs) std::this_thread::sleep_for(1ms);
  CHECK(!reads.wait_until(FileReads::Clock::now() + 50ms));
  reads.stop();
  std::vector<int64_t> expected = {kPage, FileReads::kNotOver, FileReads::kNotBegun,
                                   FileReads::kNotBegun};
  CHECK(reads.outcomes() == expected);
  may_go_on = true;
  CHECK(reads.wait_until(FileReads::Clock::time_point::max()));  // for what was begun
  only.join();
  reads.work();  // begins no more
  expected[1] = kPage;
  CHECK(reads.outcomes() == expected);
  CHECK(std::memcmp(memory.data(), file.bytes.data(), 2 * kPage) == 0);
  CHECK(std::all_of(memory.begin() + 2 * kPage, memory.end(), [](char c) { return c == '\xEE'; }));
}

void test_nothing_to_read() {
  FileReads reads({{-1, 0, {}, 1}, {-1, 0, {{nullptr, 0}}, 1}}, kPage);
  work_together(reads, 2);
  const std::vector<int64_t> expected = {0, 0};
  CHECK(reads.outcomes() == expected);
}

}  // namespace

int main() {
  check_random_reads(preadv);
  check_random_reads(interrupted_preadv);
  test_a_read_that_fails_costs_no_other();
  test_a_direct_read_does_not_go_on_at_an_odd_place();
  test_a_read_that_hangs_is_left_behind();
  test_nothing_to_read();
  return 0;
}
