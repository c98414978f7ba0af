// Reads of files, made by several threads at once, for which a caller may stop waiting.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace kvkernels {

struct FileRead {
  int fd = -1;
  int64_t offset = 0;
  std::vector<iovec> into;  // filled one after the other
  // What a call has to move a multiple of for there to be another: past an odd length a direct read
  // cannot go on, and need not, for there the file ends.
  int64_t multiple = 1;
};

// Whoever calls work() makes one read after the other, those that are left, until none is. All
// threads may call everything at any time.
class FileReads {
 public:
  using Clock = std::chrono::steady_clock;
  using Preadv = ssize_t (*)(int, const iovec*, int, off_t);

  // In place of a number of bytes.
  static constexpr int64_t kNotBegun = INT64_MIN;
  static constexpr int64_t kNotOver = INT64_MIN + 1;

  // What fills one piece of memory is read in pieces of so many bytes, so that threads share it.
  FileReads(const std::vector<FileRead>& reads, int64_t piece_bytes, Preadv preadv = ::preadv);

  std::size_t num_pieces() const { return pieces_.size(); }

  void work();

  // Wait until all that was begun is over, and nothing is left to begin. False if that took longer.
  bool wait_until(Clock::time_point deadline);

  // Begin no more of them.
  void stop();

  // For each the bytes read, fewer where the file ends; or the error number, negative; or one of
  // the above.
  std::vector<int64_t> outcomes() const;

 private:
  struct Piece {
    FileRead read;
    int64_t num_bytes;
  };

  int64_t fill(FileRead& piece) const;
  bool is_over() const { return num_running_ == 0 && num_begun_ == num_to_begin_; }

  std::vector<Piece> pieces_;
  std::vector<std::size_t> ends_;  // of each read's pieces
  const Preadv preadv_;
  mutable std::mutex mutex_;
  std::condition_variable over_;
  std::vector<int64_t> outcomes_;  // of the pieces
  std::size_t num_to_begin_;
  std::size_t num_begun_ = 0;
  std::size_t num_running_ = 0;
};

}  // namespace kvkernels
