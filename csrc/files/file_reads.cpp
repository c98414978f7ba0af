#include "kvkernels/file_reads.h"

#include <algorithm>
#include <cerrno>

namespace kvkernels {

FileReads::FileReads(const std::vector<FileRead>& reads, int64_t piece_bytes, Preadv preadv)
    : preadv_(preadv) {
  for (const FileRead& read : reads) {
    int64_t num_bytes = 0;
    for (const iovec& part : read.into) num_bytes += static_cast<int64_t>(part.iov_len);
    if (read.into.size() != 1) {
      pieces_.push_back({read, num_bytes});
    } else {
      char* const data = static_cast<char*>(read.into[0].iov_base);
      for (int64_t begin = 0; begin < num_bytes; begin += piece_bytes) {
        const int64_t length = std::min(piece_bytes, num_bytes - begin);
        const iovec into = {data + begin, static_cast<std::size_t>(length)};
        pieces_.push_back({{read.fd, read.offset + begin, {into}, read.multiple}, length});
      }
    }
    ends_.push_back(pieces_.size());
  }
  outcomes_.assign(pieces_.size(), kNotBegun);
  num_to_begin_ = pieces_.size();
}

void FileReads::work() {
  std::unique_lock lock(mutex_);
  while (num_begun_ < num_to_begin_) {
    const std::size_t number = num_begun_++;
    outcomes_[number] = kNotOver;
    ++num_running_;
    lock.unlock();
    const int64_t outcome = fill(pieces_[number].read);
    lock.lock();
    outcomes_[number] = outcome;
    --num_running_;
    if (is_over()) over_.notify_all();
  }
}

bool FileReads::wait_until(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return over_.wait_until(lock, deadline, [this] { return is_over(); });
}

void FileReads::stop() {
  const std::lock_guard lock(mutex_);
  num_to_begin_ = num_begun_;
}

std::vector<int64_t> FileReads::outcomes() const {
  const std::lock_guard lock(mutex_);
  std::vector<int64_t> outcomes;
  std::size_t begin = 0;
  for (const std::size_t end : ends_) {
    int64_t total = 0;
    bool has_ended = false;
    for (; begin < end; ++begin) {
      const int64_t outcome = outcomes_[begin];
      if (outcome == kNotOver || (outcome == kNotBegun && total != kNotOver)) {
        total = outcome;
        has_ended = true;
      } else if (!has_ended) {
        total = outcome < 0 ? outcome : total + outcome;
        has_ended = outcome < pieces_[begin].num_bytes;
      }
    }
    outcomes.push_back(total);
  }
  return outcomes;
}

int64_t FileReads::fill(FileRead& piece) const {
  int64_t num_read = 0;
  iovec* rest = piece.into.data();
  iovec* const end = rest + piece.into.size();
  while (rest != end) {
    const ssize_t n =
        preadv_(piece.fd, rest, static_cast<int>(end - rest), piece.offset + num_read);
    if (n < 0) {
      if (errno == EINTR) continue;
      return -errno;
    }
    num_read += n;
    if (n == 0 || n % piece.multiple != 0) break;
    auto left = static_cast<std::size_t>(n);
    for (; rest != end && left >= rest->iov_len; ++rest) left -= rest->iov_len;
    if (rest != end) {
      rest->iov_base = static_cast<char*>(rest->iov_base) + left;
      rest->iov_len -= left;
    }
  }
  return num_read;
}

}  // namespace kvkernels
