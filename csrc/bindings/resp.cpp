// The Redis connections' part of the Python extension.
#include <pybind11/stl.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/bytes.h"
#include "kvkernels/resp.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

constexpr Py_ssize_t kSmallBytes = 4 << 10;  // copied: a piece of its own would cost more

// What a command keeps until it is sent and answered.
struct Held {
  HeldBuffers buffers;
  py::object ticket;
};

std::string_view bytes_of(py::handle object) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(object.ptr(), &data, &size) != 0) throw py::error_already_set();
  return {data, static_cast<std::size_t>(size)};
}

// A command as it is sent, from words that are each bytes, or a tuple of buffers; those that are
// large are not copied, and kept by `held`.
std::vector<RespRequest::Piece> encode(const py::sequence& words, Held& held) {
  std::vector<RespRequest::Piece> pieces;
  const auto text = [&pieces]() -> std::string& {
    if (pieces.empty() || pieces.back().data != nullptr) pieces.push_back({{}, nullptr, 0});
    return pieces.back().text;
  };
  const auto add_size = [&text](char kind, auto size) -> std::string& {
    return (text() += kind).append(std::to_string(size)).append("\r\n");
  };
  add_size('*', words.size());
  for (const py::handle word : words) {
    if (PyBytes_Check(word.ptr())) {
      const std::string_view bytes = bytes_of(word);
      add_size('$', bytes.size()) += bytes;
    } else {
      const std::size_t first = held.buffers.size();
      Py_ssize_t size = 0;
      for (const py::handle part : word.cast<py::tuple>())
        size += held.buffers.add(part, PyBUF_SIMPLE).len;
      add_size('$', size);
      for (std::size_t i = first; i < held.buffers.size(); ++i) {
        const Py_buffer& buffer = held.buffers[i];
        const auto length = static_cast<std::size_t>(buffer.len);
        if (buffer.len < kSmallBytes) {
          text() += std::string_view(static_cast<const char*>(buffer.buf), length);
        } else {
          pieces.push_back({{}, buffer.buf, length});
        }
      }
    }
    text() += "\r\n";
  }
  return pieces;
}

// What is known of a command whose reply, if it is a string, fills the buffers `into`, unless that
// is None.
RespCommand make_command(const py::object& into, int64_t num_bytes, std::shared_ptr<Held> held) {
  RespCommand command;
  command.num_bytes = num_bytes;
  command.fills_into = !into.is_none();
  if (command.fills_into) {
    for (const py::handle part : into.cast<py::sequence>()) {
      const Py_buffer& buffer = held->buffers.add(part, PyBUF_WRITABLE);
      if (buffer.len == 0) continue;
      command.into.push_back({buffer.buf, static_cast<std::size_t>(buffer.len)});
    }
  }
  command.owner = std::move(held);
  return command;
}

py::object reply_object(const RespReply& reply, const py::object& make_error) {
  switch (reply.kind) {
    case RespReply::Kind::kText:
    case RespReply::Kind::kString:
      return py::bytes(reply.text);
    case RespReply::Kind::kError:
      return make_error(py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(
          reply.text.data(), static_cast<Py_ssize_t>(reply.text.size()), "replace")));
    case RespReply::Kind::kInteger:
    case RespReply::Kind::kFilled:
      return py::int_(reply.number);
    case RespReply::Kind::kArray: {
      py::list items;
      for (const RespReply& item : reply.items) items.append(reply_object(item, make_error));
      return items;
    }
    default:
      return py::none();
  }
}

// A channel, and what of it Python sees: commands are words, answers are pairs of a command's
// ticket and its reply.
class Channel {
 public:
  Channel(int fd, py::object make_error) : channel_(fd), make_error_(std::move(make_error)) {}

  RespChannel& core() { return channel_; }

  void push(const py::sequence& words, const py::object& into, int64_t num_bytes,
            py::object ticket) {
    // Whatever may fail is done before anything is queued.
    auto held = std::make_shared<Held>();
    held->ticket = std::move(ticket);
    const auto pieces = encode(words, *held);
    RespCommand command = make_command(into, num_bytes, held);
    for (const RespRequest::Piece& piece : pieces) {
      if (piece.data != nullptr) {
        channel_.send_memory(piece.data, piece.size, held);
      } else {
        channel_.send_text(piece.text);
      }
    }
    channel_.push(std::move(command));
  }

  py::list take_answers() {
    py::list answers;
    for (RespAnswer& answer : channel_.take_answers()) {
      py::object& ticket = static_cast<Held*>(answer.owner.get())->ticket;
      answers.append(py::make_tuple(std::move(ticket), reply_object(answer.reply, make_error_)));
    }
    return answers;
  }

  py::list abandon() {
    py::list tickets;
    for (const RespOwner& owner : channel_.abandon()) {
      tickets.append(static_cast<Held*>(owner.get())->ticket);
    }
    return tickets;
  }

  void flush() {
    {
      py::gil_scoped_release unlocked;
      channel_.flush();
    }
    channel_.release_sent();
  }

  void receive(int64_t max_bytes) {
    py::gil_scoped_release unlocked;
    channel_.receive(max_bytes);
  }

  py::bytes take_output(std::size_t max_bytes) {
    const std::string taken = channel_.take_output(max_bytes);
    channel_.release_sent();
    return taken;
  }

  // To be filled before any other method is called.
  py::memoryview next_input() {
    iovec part;
    channel_.next_input(&part, 1);
    return py::memoryview::from_memory(part.iov_base, static_cast<py::ssize_t>(part.iov_len));
  }

 private:
  RespChannel channel_;
  py::object make_error_;
};

void take_turn(const std::vector<Channel*>& channels, double timeout_s) {
  std::vector<RespChannel*> cores;
  for (Channel* channel : channels) cores.push_back(&channel->core());
  {
    py::gil_scoped_release unlocked;
    kvkernels::take_turn(cores, timeout_s);
  }
  for (RespChannel* core : cores) core->release_sent();
}

// Commands for the channels of several lanes, and the lanes while they are open: whatever happens,
// no channel then waits for a reply, or may be asked for one, that nobody else knows of.
class Batch {
 public:
  // Commands of a lane: of each its words, `into` and `num_bytes`.
  void add(std::size_t lane, const py::sequence& commands) {
    for (const py::handle one : commands) {
      const auto command = py::cast<py::tuple>(one);
      if (command.size() != 3) throw py::value_error("commands: expected three parts of each");
      auto held = std::make_shared<Held>();
      auto pieces = encode(command[0], *held);
      batch_.add(
          {lane, std::move(pieces), make_command(command[1], command[2].cast<int64_t>(), held)});
    }
  }

  // The lanes' channels are the batch's until it is run or closed.
  void open(const std::vector<std::vector<Channel*>>& lanes) { open_.emplace(lanes); }
  void close() { open_.reset(); }

  // What was added is sent as far as that needs no waiting.
  void advance() {
    Lanes& lanes = opened();
    py::gil_scoped_release unlocked;
    batch_.advance(lanes.channels);
  }

  // Of each command the reply, or `unanswered`.
  py::list run(double timeout_s, const py::object& make_error, const py::object& unanswered) {
    const Lanes& lanes = opened();
    const Closing closing(*this);
    const auto ends_at = Clock::now() + std::chrono::duration<double>(timeout_s);
    for (bool is_over = false; !is_over;) {
      {
        py::gil_scoped_release unlocked;
        const std::chrono::duration<double> left = ends_at - Clock::now();
        is_over = batch_.run(lanes.channels, left.count());
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    py::list replies;
    for (std::size_t i = 0; i < batch_.size(); ++i) {
      replies.append(batch_.is_answered(i) ? reply_object(batch_.reply(i), make_error)
                                           : unanswered);
    }
    return replies;
  }

 private:
  using Clock = std::chrono::steady_clock;

  struct Lanes {
    explicit Lanes(const std::vector<std::vector<Channel*>>& lanes) {
      for (const std::vector<Channel*>& lane : lanes) {
        channels.emplace_back();
        for (Channel* channel : lane) channels.back().push_back(&channel->core());
      }
    }
    ~Lanes() {
      for (const auto& lane : channels) {
        for (RespChannel* channel : lane) {
          channel->give_up();
          channel->release_sent();
        }
      }
    }
    Lanes(const Lanes&) = delete;
    Lanes& operator=(const Lanes&) = delete;

    std::vector<std::vector<RespChannel*>> channels;
  };

  struct Closing {
    explicit Closing(Batch& batch) : batch(batch) {}
    ~Closing() { batch.close(); }
    Closing(const Closing&) = delete;
    Closing& operator=(const Closing&) = delete;

    Batch& batch;
  };

  Lanes& opened() {
    if (!open_) throw py::value_error("lanes: expected open ones, got none");
    return *open_;
  }

  RespBatch batch_;
  std::optional<Lanes> open_;
};

}  // namespace

void bind_resp(py::module_& module) {
  py::register_exception<RespStreamError>(module, "RespStreamError");
  py::class_<Channel>(module, "RespChannel")
      .def(py::init<int, py::object>(), py::arg("fd"), py::arg("make_error"))
      .def("push", &Channel::push, py::arg("words"), py::arg("into"), py::arg("num_bytes"),
           py::arg("ticket"))
      .def("take_answers", &Channel::take_answers)
      .def("abandon", &Channel::abandon)
      .def("flush", &Channel::flush)
      .def("receive", &Channel::receive, py::arg("max_bytes"))
      .def("take_output", &Channel::take_output, py::arg("max_bytes"))
      .def("next_input", &Channel::next_input)
      .def(
          "received", [](Channel& self, std::size_t n) { self.core().received(n); },
          py::arg("num_bytes"))
      .def_property_readonly("has_output", [](Channel& self) { return self.core().has_output(); })
      .def_property_readonly("num_awaited", [](Channel& self) { return self.core().num_awaited(); })
      .def_property_readonly("awaited_bytes",
                             [](Channel& self) { return self.core().awaited_bytes(); })
      .def_property_readonly("failure", [](Channel& self) { return self.core().failure(); })
      .def_property_readonly("is_late", [](Channel& self) { return self.core().is_late(); })
      .def_property_readonly("num_received",
                             [](Channel& self) { return self.core().num_received(); });
  py::class_<Batch>(module, "RespBatch")
      .def(py::init<>())
      .def("add", &Batch::add, py::arg("lane"), py::arg("commands"))
      .def("open", &Batch::open, py::arg("lanes"), py::keep_alive<1, 2>())
      .def("close", &Batch::close)
      .def("advance", &Batch::advance)
      .def("run", &Batch::run, py::arg("timeout_s"), py::arg("make_error"), py::arg("unanswered"));
  module.def("resp_take_turn", &take_turn, py::arg("channels"), py::arg("timeout_s"));
}

}  // namespace kvkernels::bindings
