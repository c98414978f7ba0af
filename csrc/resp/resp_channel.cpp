// Commands and replies of one connection.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <system_error>
#include <utility>

#include "kvkernels/resp.h"

namespace kvkernels {
namespace {

// Read beyond a string that goes to the caller's memory, or before one: enough for the lines
// between two of them, and little of what would have to be copied once more.
constexpr size_t kLineBytes = 128;
constexpr size_t kDroppedBytes = 256 << 10;
constexpr size_t kGrowBytes = 64 << 10;         // a string grows as it comes, not as announced
constexpr int64_t kMaxStringBytes = 512 << 20;  // proto-max-bulk-len
constexpr int64_t kMaxElements = 1 << 20;
constexpr size_t kMaxDepth = 8;
constexpr size_t kMaxPieces = 64;  // of one call; the kernel takes 1,024

std::string quoted(std::string_view text) {
  std::string shown = "'";
  for (const char c : text.substr(0, 100)) shown += c >= ' ' && c <= '~' ? c : '?';
  return shown + "'";
}

[[noreturn]] void refuse(const char* what, int error) {
  throw RespStreamError(std::string(what) + ": " + std::generic_category().message(error));
}

bool parse_integer(std::string_view text, int64_t* number) {
  const char* end = text.data() + text.size();
  const auto [last, error] = std::from_chars(text.data(), end, *number);
  return error == std::errc() && last == end;
}

}  // namespace

// ---- output ------------------------------------------------------------------------------------

void RespChannel::send_text(std::string_view text) {
  if (output_.empty() || output_.back().data != nullptr) output_.emplace_back();
  output_.back().text += text;
}

void RespChannel::send_memory(const void* data, size_t num_bytes, RespOwner owner) {
  if (num_bytes == 0) return;
  output_.push_back({{}, static_cast<const char*>(data), num_bytes, std::move(owner)});
}

void RespChannel::push(RespCommand command) {
  awaited_bytes_ += command.num_bytes;
  awaited_.push_back(std::move(command));
}

void RespChannel::sent(size_t num_bytes) {
  num_sent_ += num_bytes;
  while (!output_.empty() && num_sent_ >= output_.front().view().size()) {
    num_sent_ -= output_.front().view().size();
    if (output_.front().owner) sent_owners_.push_back(std::move(output_.front().owner));
    output_.pop_front();
  }
}

void RespChannel::flush() {
  while (!output_.empty()) {
    iovec parts[kMaxPieces];
    msghdr message = {};
    message.msg_iov = parts;
    size_t num_bytes = 0, skipped = num_sent_;
    for (const Piece& piece : output_) {
      const std::string_view left = piece.view().substr(skipped);
      parts[message.msg_iovlen++] = {const_cast<char*>(left.data()), left.size()};
      num_bytes += left.size();
      skipped = 0;
      if (message.msg_iovlen == kMaxPieces) break;
    }
    const ssize_t taken = sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (taken < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      refuse("while sending", errno);
    }
    sent(static_cast<size_t>(taken));
    if (static_cast<size_t>(taken) < num_bytes) return;  // full: another try would be in vain
  }
}

std::string RespChannel::take_output(size_t max_bytes) {
  std::string taken;
  while (!output_.empty() && taken.size() < max_bytes) {
    const std::string_view left = output_.front().view().substr(num_sent_);
    const std::string_view part = left.substr(0, max_bytes - taken.size());
    taken += part;
    sent(part.size());
  }
  return taken;
}

// ---- input -------------------------------------------------------------------------------------

// The next piece of memory for the string that is being read, `skipped_parts` of the caller's
// pieces further on.
iovec RespChannel::string_target(size_t skipped_parts) {
  const auto left = static_cast<size_t>(string_left_);
  if (!fills_into_) {
    const auto filled = static_cast<size_t>(string_bytes_ - string_left_);
    if (string_.size() == filled) string_.resize(filled + std::min(left, kGrowBytes + filled));
    return {string_.data() + filled, string_.size() - filled};
  }
  const std::vector<iovec>& into = awaited_.front().into;
  const size_t part = into_part_ + skipped_parts;
  if (part < into.size()) {
    const size_t filled = skipped_parts == 0 ? into_filled_ : 0;
    return {static_cast<char*>(into[part].iov_base) + filled, into[part].iov_len - filled};
  }
  dropped_.resize(std::min(left, kDroppedBytes));
  return {dropped_.data(), dropped_.size()};
}

size_t RespChannel::next_input(iovec* parts, size_t max_parts) {
  if (begin_ > 0) {
    std::memmove(input_.data(), input_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  size_t num_parts = 0;
  auto left = static_cast<size_t>(string_left_);
  if (in_string_ && left > 0) {
    // Of what grows or is dropped one piece at a time: the next lies where this one did.
    const size_t most = fills_into_ && into_part_ < awaited_.front().into.size()
                            ? std::min(max_parts, awaited_.front().into.size() - into_part_)
                            : 1;
    for (size_t i = 0; i < most && left > 0; ++i) {
      iovec target = string_target(i);
      target.iov_len = std::min(target.iov_len, left);
      left -= target.iov_len;
      if (target.iov_len > 0) parts[num_parts++] = target;
    }
    if (left > 0 || num_parts == max_parts) return num_parts;
  }
  // Behind the string that is being read comes the reply to the next command.
  const size_t next = in_string_ ? 1 : 0;
  const bool is_large = awaited_.size() > next && awaited_[next].fills_into;
  const size_t room = input_.size() - end_;
  parts[num_parts++] = {input_.data() + end_, is_large ? std::min(room, kLineBytes) : room};
  return num_parts;
}

void RespChannel::received(size_t num_bytes) {
  num_received_ += num_bytes;
  while (in_string_ && num_bytes > 0 && string_left_ > 0) {
    const iovec target = string_target(0);
    const size_t part = std::min({num_bytes, target.iov_len, static_cast<size_t>(string_left_)});
    advance_string(part);
    num_bytes -= part;
  }
  end_ += num_bytes;
  parse();
}

void RespChannel::advance_string(size_t num_bytes) {
  string_left_ -= static_cast<int64_t>(num_bytes);
  if (!fills_into_ || into_part_ >= awaited_.front().into.size()) return;
  into_filled_ += num_bytes;
  if (into_filled_ == awaited_.front().into[into_part_].iov_len) {
    ++into_part_;
    into_filled_ = 0;
  }
}

void RespChannel::receive(int64_t max_bytes) {
  for (int64_t moved = 0; moved < max_bytes;) {
    iovec parts[4];
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = next_input(parts, 4);
    size_t room = 0;
    for (size_t i = 0; i < message.msg_iovlen; ++i) room += parts[i].iov_len;
    const ssize_t came = recvmsg(fd_, &message, MSG_DONTWAIT);
    if (came < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      refuse("while receiving", errno);
    }
    if (came == 0) throw RespStreamError("the server closed the connection");
    received(static_cast<size_t>(came));
    moved += came;
    if (static_cast<size_t>(came) < room) return;  // all there was: asking again would be in vain
  }
}

// ---- replies -----------------------------------------------------------------------------------

// Uses what was read as far as it goes.
void RespChannel::parse() {
  std::string_view line;
  while (true) {
    if (in_string_) {
      while (string_left_ > 0 && begin_ < end_) {
        const iovec target = string_target(0);
        const size_t part =
            std::min({end_ - begin_, target.iov_len, static_cast<size_t>(string_left_)});
        if (part > 0) std::memcpy(target.iov_base, input_.data() + begin_, part);
        begin_ += part;
        advance_string(part);
      }
      if (!finish_string()) return;
    } else if (parse_line(&line)) {
      begin_reply(line);
    } else {
      return;
    }
  }
}

// The next line, without its CRLF, if all of it is there.
bool RespChannel::parse_line(std::string_view* line) {
  const std::string_view all(input_.data() + begin_, end_ - begin_);
  const size_t length = all.find("\r\n", num_scanned_);
  if (length == std::string_view::npos) {
    num_scanned_ = all.empty() ? 0 : all.size() - 1;  // a CR may be the last
    if (all.size() == kInputBytes) {
      throw RespStreamError("expected a line of at most " + std::to_string(kInputBytes) + " bytes");
    }
    return false;
  }
  *line = all.substr(0, length);
  begin_ += length + 2;
  num_scanned_ = 0;
  return true;
}

void RespChannel::begin_reply(std::string_view line) {
  if (awaited_.empty()) {
    throw RespStreamError("a reply that nobody asked for: " + quoted(line));
  }
  const char kind = line.empty() ? '\0' : line[0];
  const std::string_view rest = line.substr(line.empty() ? 0 : 1);
  int64_t number = 0;
  if (kind == '+') {
    complete({RespReply::Kind::kText, 0, std::string(rest), {}});
  } else if (kind == '-') {
    complete({RespReply::Kind::kError, 0, std::string(rest), {}});
  } else if (!parse_integer(rest, &number)) {
    throw RespStreamError("expected a reply, got " + quoted(line));
  } else if (kind == ':') {
    // A number in the place of a string must not pass for the count of what was filled.
    if (frames_.empty() && awaited_.front().fills_into) {
      complete({RespReply::Kind::kText, 0, std::string(line), {}});
    } else {
      complete({RespReply::Kind::kInteger, number, {}, {}});
    }
  } else if (kind == '$' && number >= -1 && number <= kMaxStringBytes) {
    if (number < 0) {
      complete({});
    } else {
      begin_string(number);
    }
  } else if (kind == '*' && number >= -1 && number <= kMaxElements && frames_.size() < kMaxDepth) {
    if (number < 0) {
      complete({});
    } else if (number == 0) {
      complete({RespReply::Kind::kArray, 0, {}, {}});
    } else {
      frames_.push_back({{RespReply::Kind::kArray, 0, {}, {}}, number});
    }
  } else {
    throw RespStreamError("expected a reply, got " + quoted(line));
  }
}

void RespChannel::begin_string(int64_t num_bytes) {
  in_string_ = true;
  string_bytes_ = string_left_ = num_bytes;
  fills_into_ = frames_.empty() && awaited_.front().fills_into;
  into_part_ = into_filled_ = 0;
  string_.clear();
}

// Ends the string if all of it is there, and the CRLF behind it.
bool RespChannel::finish_string() {
  if (string_left_ > 0 || end_ - begin_ < 2) return false;
  if (std::memcmp(input_.data() + begin_, "\r\n", 2) != 0) {
    throw RespStreamError("expected a string to end where it said");
  }
  begin_ += 2;
  in_string_ = false;
  if (fills_into_) {
    complete({RespReply::Kind::kFilled, string_bytes_, {}, {}});
  } else {
    complete({RespReply::Kind::kString, 0, std::move(string_), {}});
  }
  return true;
}

// A reply is whole: it is the next element of the array that is being read, or answers a command.
void RespChannel::complete(RespReply reply) {
  while (!frames_.empty()) {
    Frame& frame = frames_.back();
    frame.reply.items.push_back(std::move(reply));
    if (--frame.num_missing > 0) return;
    reply = std::move(frame.reply);
    frames_.pop_back();
  }
  RespCommand command = std::move(awaited_.front());
  awaited_.pop_front();
  awaited_bytes_ -= command.num_bytes;
  answered_bytes_ += command.num_bytes;
  answers_.push_back({std::move(command.owner), std::move(reply)});
}

std::vector<RespAnswer> RespChannel::take_answers() {
  answered_bytes_ = 0;
  return std::exchange(answers_, {});
}

std::vector<RespOwner> RespChannel::abandon() {
  std::vector<RespOwner> owners;
  for (RespCommand& command : awaited_) owners.push_back(std::move(command.owner));
  awaited_.clear();
  awaited_bytes_ = 0;
  output_.clear();
  num_sent_ = 0;
  // What may still come belongs to nobody: whatever it is, the next reply is one too many.
  in_string_ = false;
  frames_.clear();
  begin_ = end_ = num_scanned_ = 0;
  return owners;
}

void RespChannel::give_up() {
  if (abandon().empty() || !failure_.empty()) return;
  is_late_ = true;
  fail("a reply did not come in time");
}

}  // namespace kvkernels
