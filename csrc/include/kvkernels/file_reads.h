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
  // Filled one after the other; this memory must live until the read is over.
  std::vector<iovec> into;
  // A call that moves a multiple of this many bytes is followed by another for the rest. With
  // direct I/O this is the sector size: a call that moves any other number has met the end of the
  // file, and could not go on from there.
  int64_t multiple = 1;
};

// A list of reads. Every thread that calls work() takes the next read that nobody has begun, until
// none is left. All functions may be called from any thread at any time.
class FileReads {
 public:
  using Clock = std::chrono::steady_clock;
  using Preadv = ssize_t (*)(int, const iovec*, int, off_t);

  // Outcomes that stand in place of a number of bytes.
  static constexpr int64_t kNotBegun = INT64_MIN;
  static constexpr int64_t kNotOver = INT64_MIN + 1;

  // A read into one contiguous buffer is cut into pieces of `piece_bytes`, which threads share; a
  // read into several is one piece. `preadv` stands in for the system's, for tests.
  FileReads(const std::vector<FileRead>& reads, int64_t piece_bytes, Preadv preadv = ::preadv);

  std::size_t num_pieces() const { return pieces_.size(); }

  void work();

  // Waits until every read that was begun is over and none is left to begin. False if the deadline
  // came first.
  bool wait_until(Clock::time_point deadline);

  // Begins no more reads. Those that have begun go on.
  void stop();

  // One number for each read: the bytes read, fewer than asked for where the file ends; or a
  // negative errno; or kNotBegun or kNotOver.
  std::vector<int64_t> outcomes() const;

 private:
  struct Piece {
    FileRead read;
    int64_t num_bytes;
  };

  int64_t fill(FileRead& piece) const;
  bool is_over() const { return num_running_ == 0 && num_begun_ == num_to_begin_; }

  std::vector<Piece> pieces_;
  std::vector<std::size_t> ends_;  // for each read, one past its last piece
  const Preadv preadv_;
  mutable std::mutex mutex_;
  std::condition_variable over_;
  std::vector<int64_t> outcomes_;  // of the pieces
  std::size_t num_to_begin_;
  std::size_t num_begun_ = 0;
  std::size_t num_running_ = 0;
};

}  // namespace kvkernels
