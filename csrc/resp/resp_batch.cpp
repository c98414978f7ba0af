// Many commands on the connections of one or several servers.
#include <algorithm>
#include <chrono>
#include <iterator>
#include <memory>
#include <utility>

#include "kvkernels/resp.h"

namespace kvkernels {
namespace {

// Under way on all connections to one server, and on each never fewer than kMinCommands. It is what
// a link of 40 Gbit/s holds in 0.2 ms. More makes a server hold more replies at once, and they fall
// out of its caches: on one machine (Zen 5, L2 caches of 1 MiB) replies of 64 KiB came over TCP
// at 4.9 GB/s with 1 MiB on two connections, and at 4.1 with 2 or 4. With half of it a unix
// socket's one connection idled.
constexpr int64_t kWindowBytes = 1 << 20;
constexpr size_t kMinCommands = 2, kMaxCommands = 256;

bool owes_replies(const RespChannel* channel) {
  return channel->failure().empty() && channel->num_awaited() > 0;
}

bool takes_more(const RespChannel& channel, int64_t window_bytes) {
  if (!channel.failure().empty()) return false;
  return channel.num_awaited() < kMinCommands ||
         (channel.num_awaited() < kMaxCommands && channel.awaited_bytes() < window_bytes);
}

// A command's owner, and which request it is.
struct Numbered {
  RespOwner owner;
  size_t index;
};

void send(RespRequest& request, size_t index, RespChannel& channel) {
  const RespOwner owner = request.command.owner;
  for (const RespRequest::Piece& piece : request.pieces) {
    if (piece.data != nullptr) {
      channel.send_memory(piece.data, piece.size, owner);
    } else {
      channel.send_text(piece.text);
    }
  }
  request.pieces.clear();
  request.command.owner = std::make_shared<Numbered>(Numbered{owner, index});
  channel.push(std::move(request.command));
}

}  // namespace

void RespBatch::add(RespRequest request) {
  if (waiting_.size() <= request.lane) waiting_.resize(request.lane + 1);
  waiting_[request.lane].push_back(requests_.size());
  requests_.push_back(std::move(request));
  replies_.emplace_back();
  is_answered_.push_back(0);
}

void RespBatch::advance(const std::vector<std::vector<RespChannel*>>& lanes) {
  const std::vector<RespChannel*> busy = hand_out(lanes);
  move_at_once(busy);
  collect(busy);
}

bool RespBatch::run(const std::vector<std::vector<RespChannel*>>& lanes, double timeout_s) {
  using Clock = std::chrono::steady_clock;
  const auto ends_at = Clock::now() + std::chrono::duration<double>(timeout_s);
  while (true) {
    const std::chrono::duration<double> left = ends_at - Clock::now();
    if (left.count() <= 0) break;
    const std::vector<RespChannel*> busy = hand_out(lanes);
    if (busy.empty()) return true;
    const RespTurn turn = take_turn(busy, left.count());
    collect(busy);
    if (turn == RespTurn::kTimedOut) break;
    if (turn == RespTurn::kInterrupted) return false;
  }
  // What came meanwhile counts, and is read: this process may have stood still, not the servers.
  std::vector<RespChannel*> awaiting;
  for (const std::vector<RespChannel*>& lane : lanes) {
    std::copy_if(lane.begin(), lane.end(), std::back_inserter(awaiting), owes_replies);
  }
  read_what_came(awaiting);
  collect(awaiting);
  return true;
}

std::vector<RespChannel*> RespBatch::hand_out(const std::vector<std::vector<RespChannel*>>& lanes) {
  std::vector<RespChannel*> busy;
  waiting_.resize(std::max(waiting_.size(), lanes.size()));
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    std::deque<size_t>& waiting = waiting_[lane];
    const int64_t window = kWindowBytes / std::max<int64_t>(lanes[lane].size(), 1);
    for (RespChannel* channel : lanes[lane]) {
      for (; !waiting.empty() && takes_more(*channel, window); waiting.pop_front()) {
        send(requests_[waiting.front()], waiting.front(), *channel);
      }
      if (owes_replies(channel)) busy.push_back(channel);
    }
  }
  return busy;
}

void RespBatch::collect(const std::vector<RespChannel*>& channels) {
  for (RespChannel* channel : channels) {
    for (RespAnswer& answer : channel->take_answers()) {
      const size_t index = static_cast<Numbered*>(answer.owner.get())->index;
      replies_[index] = std::move(answer.reply);
      is_answered_[index] = 1;
      owners_.push_back(std::move(answer.owner));
    }
  }
}

}  // namespace kvkernels
