// The Redis protocol (RESP2) over one connection, with no copy of what is large.
//
//   send     text | the caller's memory | text        gathered by the kernel
//   receive  "$65568 CRLF" | the caller's memory | CRLF "$655...    scattered by the kernel
//
// Nothing here waits but take_turn(), which does so for several connections at once: since each is
// read whenever there is something to read, no amount of commands under way can make both sides
// wait for each other.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvkernels {

// Of a command that fills memory, only a string is kFilled: an integer is the text of its line.
struct RespReply {
  enum class Kind { kNil, kText, kError, kInteger, kString, kFilled, kArray };

  Kind kind = Kind::kNil;
  int64_t number = 0;  // kInteger; of kFilled, how many bytes came
  std::string text;    // kText, kError, kString
  std::vector<RespReply> items;
};

// The connection ended, or what came is not the protocol: it cannot be used any more.
class RespStreamError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What keeps the caller's memory, and whatever he wants back with the reply. Never released by
// flush(), receive() or take_turn(), which may run where that is not allowed.
using RespOwner = std::shared_ptr<void>;

struct RespCommand {
  std::vector<iovec> into;  // filled in order, where fills_into, with a reply that is a string
  bool fills_into = false;
  int64_t num_bytes = 0;  // about how much it moves, to or fro
  RespOwner owner;
};

struct RespAnswer {
  RespOwner owner;  // of the command
  RespReply reply;
};

// How a turn ended: there are answers or a channel failed, nothing more came in time, or a signal
// came, which the caller may want to look at.
enum class RespTurn { kAnswered, kTimedOut, kInterrupted };

// Commands queue up, replies come in their order.
class RespChannel {
 public:
  // Of a socket that is not owned; -1 where the caller himself moves the bytes.
  explicit RespChannel(int fd) : fd_(fd), input_(kInputBytes) {}

  int fd() const { return fd_; }

  // ---- commands

  // What is sent next: text, which is copied, or memory that `owner` keeps.
  void send_text(std::string_view text);
  void send_memory(const void* data, size_t num_bytes, RespOwner owner);
  // All that was sent since the last one is one command.
  void push(RespCommand command);

  // The answers that have come, each once.
  std::vector<RespAnswer> take_answers();
  // The owners of all commands whose replies will not come.
  std::vector<RespOwner> abandon();
  // The same, of what did not come in time; the channel has failed, and is late, if there are any.
  void give_up();
  // Releases what sending is done with.
  void release_sent() { sent_owners_.clear(); }

  bool has_output() const { return !output_.empty(); }
  size_t num_awaited() const { return awaited_.size(); }
  int64_t awaited_bytes() const { return awaited_bytes_; }
  size_t num_answers() const { return answers_.size(); }
  int64_t answered_bytes() const { return answered_bytes_; }
  // Why it cannot be used any more; empty while it can.
  const std::string& failure() const { return failure_; }
  void fail(std::string why) { failure_ = std::move(why); }
  // Whether that is so because a reply did not come in time.
  bool is_late() const { return is_late_; }
  // Bytes that have come so far.
  uint64_t num_received() const { return num_received_; }

  // ---- over the socket; they throw RespStreamError

  // Sends what the socket takes now.
  void flush();
  // Reads what is there, up to about `max_bytes`.
  void receive(int64_t max_bytes);

  // ---- where the caller moves the bytes

  // Up to `max_bytes` of what is to be sent, which then counts as sent.
  std::string take_output(size_t max_bytes);
  // Where the next bytes go, at most `max_parts`; then received() says how many came.
  size_t next_input(iovec* parts, size_t max_parts);
  void received(size_t num_bytes);

 private:
  static constexpr size_t kInputBytes = 64 << 10;

  struct Piece {
    std::string text;
    const char* data = nullptr;  // null: text
    size_t size = 0;             // of data
    RespOwner owner;

    std::string_view view() const { return data != nullptr ? std::string_view(data, size) : text; }
  };
  struct Frame {  // an array that is being read
    RespReply reply;
    int64_t num_missing;
  };

  void sent(size_t num_bytes);
  void parse();
  bool parse_line(std::string_view* line);
  void begin_reply(std::string_view line);
  void begin_string(int64_t num_bytes);
  bool finish_string();
  void complete(RespReply reply);
  iovec string_target(size_t skipped_parts);
  void advance_string(size_t num_bytes);

  int fd_;
  std::string failure_;
  bool is_late_ = false;
  uint64_t num_received_ = 0;

  std::deque<Piece> output_;
  size_t num_sent_ = 0;  // of the first piece
  std::vector<RespOwner> sent_owners_;

  std::deque<RespCommand> awaited_;
  int64_t awaited_bytes_ = 0, answered_bytes_ = 0;
  std::vector<RespAnswer> answers_;

  std::vector<char> input_;
  size_t begin_ = 0, end_ = 0;  // of what was read and not yet used
  size_t num_scanned_ = 0;      // of it, where no line ends

  std::vector<Frame> frames_;
  bool in_string_ = false;
  int64_t string_bytes_ = 0, string_left_ = 0;
  bool fills_into_ = false;  // the string that is being read
  size_t into_part_ = 0, into_filled_ = 0;
  std::string string_;         // where it does not fill the caller's memory
  std::vector<char> dropped_;  // where what has no room is read to
};

// Sends and receives on channels that all await replies, until enough has been answered for the
// caller to go on, a channel is done or has failed, or `timeout_s` has passed.
RespTurn take_turn(const std::vector<RespChannel*>& channels, double timeout_s);

// Sends and receives what can be moved without waiting.
void move_at_once(const std::vector<RespChannel*>& channels);

// Receives what lies in the sockets, and no more, however fast more comes.
void read_what_came(const std::vector<RespChannel*>& channels);

// A command for a batch: what it sends, then what is known of its reply.
struct RespRequest {
  struct Piece {
    std::string text;
    const void* data;  // null: text
    size_t size;       // of data
  };

  size_t lane;
  std::vector<Piece> pieces;
  RespCommand command;
};

// Commands that depend on nobody's reply, run without the caller. Those of a lane, which is one
// server, are shared out among its channels: one that is slow gets fewer.
class RespBatch {
 public:
  // Also while those that were added before are under way.
  void add(RespRequest request);
  size_t size() const { return requests_.size(); }

  // Begins with what was added, as far as that needs no waiting.
  void advance(const std::vector<std::vector<RespChannel*>>& lanes);

  // Runs all that was added. False if a signal came before the end: to be called again. When the
  // time is over, or was before, nothing more is sent, but what has come is read. What is not
  // answered then was lost with a channel, found none, or ran out of time; replies may still come
  // to its channels, so they are of no more use.
  bool run(const std::vector<std::vector<RespChannel*>>& lanes, double timeout_s);

  bool is_answered(size_t index) const { return is_answered_[index]; }
  const RespReply& reply(size_t index) const { return replies_[index]; }

 private:
  // The channels that owe replies, once each has as many commands as it takes.
  std::vector<RespChannel*> hand_out(const std::vector<std::vector<RespChannel*>>& lanes);
  void collect(const std::vector<RespChannel*>& channels);

  std::vector<RespRequest> requests_;
  std::vector<std::deque<size_t>> waiting_;  // by lane
  std::vector<RespReply> replies_;
  std::vector<char> is_answered_;
  std::vector<RespOwner> owners_;  // of what was answered
};

}  // namespace kvkernels
