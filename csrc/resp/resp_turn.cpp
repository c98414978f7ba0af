// Turns over several connections: each sends and receives what it can.
#include <poll.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <string>
#include <system_error>
#include <vector>

#include "kvkernels/resp.h"

namespace kvkernels {
namespace {

// A turn ends when so much was answered: often enough to keep the servers busy, and seldom enough
// to cost little.
constexpr int64_t kTurnBytes = 512 << 10;
constexpr size_t kTurnAnswers = 32;

// Does something with a channel; false, and the channel has failed, if that ended it.
template <typename Move>
bool try_to(RespChannel& channel, const Move& move) {
  try {
    move();
    return true;
  } catch (const RespStreamError& error) {
    channel.fail(error.what());
    return false;
  }
}

void move_bytes(RespChannel& channel, bool is_to_receive) {
  if (is_to_receive) try_to(channel, [&] { channel.receive(kTurnBytes); });
  if (channel.failure().empty() && !try_to(channel, [&] { channel.flush(); })) {
    // What the other side said before it closed is there to be read.
    const std::string why = channel.failure();
    try_to(channel, [&] { channel.receive(kTurnBytes); });
    channel.fail(why);
  }
}

}  // namespace

void move_at_once(const std::vector<RespChannel*>& channels) {
  for (RespChannel* channel : channels) move_bytes(*channel, true);
}

void read_what_came(const std::vector<RespChannel*>& channels) {
  for (RespChannel* channel : channels) {
    int num_bytes = 0;
    if (ioctl(channel->fd(), FIONREAD, &num_bytes) < 0) {
      throw std::system_error(errno, std::generic_category(), "FIONREAD");
    }
    // where there is nothing, it may have been closed
    try_to(*channel, [&] { channel->receive(std::max(num_bytes, 1)); });
  }
}

RespTurn take_turn(const std::vector<RespChannel*>& channels, double timeout_s) {
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  };
  const double ends_at = now() + timeout_s;
  std::vector<pollfd> polled(channels.size());
  while (true) {
    bool is_over = channels.empty();
    size_t num_answers = 0;
    int64_t answered_bytes = 0;
    for (size_t i = 0; i < channels.size(); ++i) {
      RespChannel& channel = *channels[i];
      move_bytes(channel, polled[i].revents != 0);
      is_over |= !channel.failure().empty() || channel.num_awaited() == 0;
      num_answers += channel.num_answers();
      answered_bytes += channel.answered_bytes();
      polled[i] = {channel.fd(), POLLIN, 0};
      if (channel.has_output()) polled[i].events |= POLLOUT;
    }
    if (is_over || num_answers >= kTurnAnswers || answered_bytes >= kTurnBytes) {
      return RespTurn::kAnswered;
    }
    const double left_ms = std::ceil((ends_at - now()) * 1e3);
    if (left_ms <= 0) return RespTurn::kTimedOut;
    const int num_ready =
        poll(polled.data(), polled.size(), static_cast<int>(std::min(left_ms, 1e9)));
    if (num_ready == 0) return RespTurn::kTimedOut;
    if (num_ready < 0) {
      if (errno != EINTR) throw std::system_error(errno, std::generic_category(), "poll");
      return RespTurn::kInterrupted;
    }
  }
}

}  // namespace kvkernels
