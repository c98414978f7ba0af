// Redis connections against a socket of this test: whatever pieces replies come in, and whatever
// comes instead of them, memory stays whole.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "guarded.h"
#include "kvkernels/resp.h"

using namespace kvkernels;

namespace {

struct Ends {
  Ends() {
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) std::abort();
  }
  ~Ends() {
    close(fds[0]);
    if (fds[1] >= 0) close(fds[1]);
  }
  void write(const std::string& text) const {
    for (size_t done = 0; done < text.size();) {
      const ssize_t taken = ::write(fds[1], text.data() + done, text.size() - done);
      if (taken < 0) std::abort();
      done += static_cast<size_t>(taken);
    }
  }
  int fds[2];
};

// A GET of which each reply fills two pieces of memory that are just long enough, as ASan sees.
struct Get {
  explicit Get(size_t size) : head(std::min<size_t>(size, 7)), rest(size - head.size()) {}

  RespRequest request(size_t lane) {
    RespCommand command;
    for (std::vector<char>* part : {&head, &rest}) {
      if (!part->empty()) command.into.push_back({part->data(), part->size()});
    }
    command.fills_into = true;
    command.num_bytes = static_cast<int64_t>(head.size() + rest.size());
    command.owner = std::make_shared<int>();
    return {lane, {{"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", nullptr, 0}}, command};
  }

  std::vector<char> head, rest;
};

std::string value_of(size_t size, unsigned seed) {
  std::mt19937 rng(seed);
  std::string value(size, '\0');
  for (char& c : value) c = static_cast<char>(rng());
  return value;
}

std::string wire_of(const std::string& value) {
  return "$" + std::to_string(value.size()) + "\r\n" + value + "\r\n";
}

void test_batches_fill_memory() {
  std::mt19937 rng(0);
  Ends ends[3];
  std::vector<RespChannel> channels;
  for (const Ends& pair : ends) channels.emplace_back(pair.fds[0]);
  std::vector<std::unique_ptr<Get>> gets;
  std::vector<std::string> values;
  std::string wires[2];
  RespBatch batch;
  for (size_t i = 0; i < 300; ++i) {
    const size_t sizes[] = {0, 1, 8, 100, 5000, 70000};
    const size_t room = sizes[rng() % 6];
    // Longer ones than there is room for are cut.
    values.push_back(value_of(rng() % 4 == 0 ? room + rng() % 300000 : room, rng()));
    gets.push_back(std::make_unique<Get>(room));
    batch.add(gets.back()->request(i % 2));
    wires[i % 2] += wire_of(values.back());
  }
  std::vector<std::thread> servers;
  for (int lane = 0; lane < 2; ++lane)
    servers.emplace_back([&, lane] { ends[lane].write(wires[lane]); });
  CHECK(batch.run({{&channels[0]}, {&channels[1]}}, 60));
  for (std::thread& server : servers) server.join();
  for (size_t i = 0; i < gets.size(); ++i) {
    CHECK(batch.is_answered(i));
    CHECK(batch.reply(i).number == static_cast<int64_t>(values[i].size()));
    const Get& get = *gets[i];
    CHECK(std::equal(get.head.begin(), get.head.end(), values[i].begin()));
    const auto rest = values[i].begin() + static_cast<std::ptrdiff_t>(get.head.size());
    CHECK(std::equal(get.rest.begin(), get.rest.end(), rest));
  }
}

// More is added while the first replies come, to a lane of two channels and one of none.
void test_batches_grow_while_they_run() {
  std::mt19937 rng(5);
  const Ends ends[2];
  RespChannel first(ends[0].fds[0]), second(ends[1].fds[0]);
  const std::vector<std::vector<RespChannel*>> lanes = {{&first, &second}, {}};
  std::vector<std::thread> servers;
  for (const Ends& pair : ends) {
    servers.emplace_back([&pair] {  // of each command that comes the key is the reply
      std::string unread;
      char buffer[5000];
      for (ssize_t came; (came = read(pair.fds[1], buffer, sizeof buffer)) > 0;) {
        unread.append(buffer, static_cast<size_t>(came));
        const std::string command = "*2\r\n$3\r\nGET\r\n$4\r\n";
        while (unread.size() >= command.size() + 6) {
          pair.write("$4\r\n" + unread.substr(command.size(), 6));
          unread.erase(0, command.size() + 6);
        }
      }
    });
  }
  std::vector<std::unique_ptr<Get>> gets;
  RespBatch batch;
  batch.advance(lanes);  // with nothing
  for (size_t i = 0; i < 1200; ++i) {
    gets.push_back(std::make_unique<Get>(4));
    const bool is_for_nobody = i % 100 == 99;
    RespRequest request = gets.back()->request(is_for_nobody ? 1 : 0);
    request.pieces[0].text = "*2\r\n$3\r\nGET\r\n$4\r\n" + std::to_string(1000 + i) + "\r\n";
    batch.add(std::move(request));
    if (rng() % 8 == 0) batch.advance(lanes);
  }
  CHECK(batch.run(lanes, 60));
  for (size_t i = 0; i < gets.size(); ++i) {
    CHECK(batch.is_answered(i) == (i % 100 != 99));
    if (!batch.is_answered(i)) continue;
    const std::string key = std::to_string(1000 + i);
    CHECK(std::equal(gets[i]->head.begin(), gets[i]->head.end(), key.begin(), key.end()));
  }
  CHECK(first.num_awaited() == 0 && second.num_awaited() == 0);
  for (const Ends& pair : ends) shutdown(pair.fds[0], SHUT_WR);
  for (std::thread& server : servers) server.join();
}

// Replies with a few bytes changed, dropped or doubled, in random pieces.
void test_whatever_comes() {
  std::mt19937 rng(1);
  const std::string plain = wire_of(value_of(3000, 2)) + ":12\r\n" + wire_of("") +
                            "*3\r\n$1\r\na\r\n*2\r\n:1\r\n+x\r\n$-1\r\n" + "-ERR no\r\n$-1\r\n" +
                            wire_of(value_of(9000, 3));
  int num_whole = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string wire = plain;
    for (unsigned change = rng() % 4; change > 0; --change) {
      const size_t at = rng() % wire.size(), kind = rng() % 4;
      if (kind == 0) wire[at] = static_cast<char>(rng());
      if (kind == 1) wire.erase(at, rng() % 20);
      if (kind == 2) wire.insert(at, wire.substr(rng() % wire.size(), rng() % 20));
      if (kind == 3) wire[at] = "$*:+-\r\n0123456789"[rng() % 17];
    }
    const Ends ends;
    RespChannel channel(-1);  // the test moves the bytes
    std::vector<std::unique_ptr<Get>> gets;
    for (int i = 0; i < 7; ++i) {
      gets.push_back(std::make_unique<Get>(i % 2 == 0 ? 5000 : 0));
      RespRequest request = gets.back()->request(0);
      if (i % 3 == 1) request.command.fills_into = false;
      channel.send_text(request.pieces[0].text);
      channel.push(request.command);
    }
    CHECK(channel.take_output(1 << 20).size() == 7 * gets[0]->request(0).pieces[0].text.size());
    try {
      for (size_t done = 0; done < wire.size();) {
        iovec parts[4];
        const size_t num_parts = channel.next_input(parts, 1 + rng() % 4);
        size_t left = 1 + rng() % 4000, came = 0;
        for (size_t i = 0; i < num_parts && left > 0; ++i) {
          const size_t part = std::min({left, parts[i].iov_len, wire.size() - done});
          std::memcpy(parts[i].iov_base, wire.data() + done, part);
          done += part, came += part, left -= part;
          if (part < parts[i].iov_len) break;
        }
        channel.received(came);
      }
      num_whole += channel.num_awaited() == 0;
    } catch (const RespStreamError&) {
    }
    const size_t answered = channel.take_answers().size();
    CHECK(answered + channel.abandon().size() == 7);
  }
  CHECK(num_whole > 500);
}

// An integer that answers a command that fills memory is told from the count of what was filled.
void test_numbers_fill_nothing() {
  const Ends ends;
  RespChannel channel(ends.fds[0]);
  Get get(10);
  RespBatch batch;
  for (int i = 0; i < 2; ++i) batch.add(get.request(0));
  ends.write(":10\r\n" + wire_of("0123456789"));
  CHECK(batch.run({{&channel}}, 60));
  CHECK(batch.reply(0).kind == RespReply::Kind::kText && batch.reply(0).text == ":10");
  CHECK(batch.reply(1).kind == RespReply::Kind::kFilled && batch.reply(1).number == 10);
}

void test_channels_that_fail() {
  Ends ends[2];
  RespChannel closed(ends[0].fds[0]), silent(ends[1].fds[0]);
  Get gets[4] = {Get(10), Get(10), Get(10), Get(10)};
  RespBatch batch;
  for (int i = 0; i < 4; ++i) batch.add(gets[i].request(i % 2));
  ends[0].write(wire_of("0123456789") + "$10\r\n012");
  close(ends[0].fds[1]);
  ends[0].fds[1] = -1;
  CHECK(batch.run({{&closed}, {&silent}}, 0.05));
  CHECK(batch.is_answered(0) && !batch.is_answered(1));
  CHECK(!batch.is_answered(2) && !batch.is_answered(3));
  CHECK(!closed.failure().empty());
  ends[1].write("$10\r\n0123");  // half a reply to nobody, as it will turn out
  silent.receive(1 << 20);
  CHECK(silent.abandon().size() == 2);
  ends[1].write("456789\r\n");
  bool is_refused = false;
  try {
    silent.receive(1 << 20);
  } catch (const RespStreamError&) {
    is_refused = true;
  }
  CHECK(is_refused);
}

// Where this process stood still, what lies in a socket was in time.
void test_reads_what_came_before_the_time_was_over() {
  const Ends ends[2];
  RespChannel answered(ends[0].fds[0]), silent(ends[1].fds[0]);
  const std::vector<std::vector<RespChannel*>> lanes = {{&answered}, {&silent}};
  Get gets[6] = {Get(90000), Get(10), Get(10), Get(10), Get(10), Get(10)};
  RespBatch batch;
  for (int i = 0; i < 6; ++i) batch.add(gets[i].request(i % 2));
  batch.advance(lanes);
  const std::string value = value_of(90000, 6);
  ends[0].write(wire_of(value) + wire_of("0123456789") + "$10\r\n012");
  batch.add(gets[0].request(0));
  CHECK(batch.run(lanes, -1));
  for (size_t i = 0; i < 7; ++i) CHECK(batch.is_answered(i) == (i == 0 || i == 2));
  CHECK(std::equal(gets[0].rest.begin(), gets[0].rest.end(), value.begin() + 7));
  CHECK(answered.num_awaited() == 1 && silent.num_awaited() == 3);  // and the last is not sent
  CHECK(answered.failure().empty() && silent.failure().empty());
}

void test_sends_more_than_a_socket_takes() {
  const Ends ends;
  RespChannel channel(ends.fds[0]);
  const std::string large = value_of(3 << 20, 4);
  std::string sent;
  for (int i = 0; i < 100; ++i) {
    channel.send_text("text" + std::to_string(i));
    sent += "text" + std::to_string(i);
    if (i % 10 != 0) continue;
    channel.send_memory(large.data(), large.size(), std::make_shared<int>());
    sent += large;
  }
  std::string received;
  std::vector<char> buffer(1 << 20);
  while (channel.has_output() || received.size() < sent.size()) {
    channel.flush();
    const ssize_t came = read(ends.fds[1], buffer.data(), buffer.size());
    if (came <= 0) std::abort();
    received.append(buffer.data(), static_cast<size_t>(came));
  }
  channel.release_sent();
  CHECK(received == sent);
}

}  // namespace

int main() {
  test_batches_fill_memory();
  test_batches_grow_while_they_run();
  test_whatever_comes();
  test_numbers_fill_nothing();
  test_channels_that_fail();
  test_reads_what_came_before_the_time_was_over();
  test_sends_more_than_a_socket_takes();
  return 0;
}
