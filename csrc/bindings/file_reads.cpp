// Python bindings of the disk tier's reads.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/bytes.h"
#include "kvkernels/file_reads.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;
using namespace std::chrono_literals;

// Reads, each given as (fd, offset, buffers, multiple). `files` is whatever owns the descriptors,
// and is kept alive as long as this. `preadv` is the address of a function that stands in for the
// system's, or 0.
class Reads {
 public:
  Reads(const py::sequence& reads, int64_t piece_bytes, py::object files, uintptr_t preadv)
      : files_(std::move(files)) {
    std::vector<FileRead> asked;
    held_.reserve(reads.size());
    for (const py::handle item : reads) {
      const auto fields = py::reinterpret_borrow<py::tuple>(item);
      FileRead& read = asked.emplace_back();
      HeldBuffers& held = held_.emplace_back();
      read.fd = fields[0].cast<int>();
      read.offset = fields[1].cast<int64_t>();
      for (const py::handle buffer : fields[2]) {
        const Py_buffer& view = held.add(buffer, PyBUF_WRITABLE);
        if (view.len != 0) read.into.push_back({view.buf, static_cast<std::size_t>(view.len)});
      }
      read.multiple = fields[3].cast<int64_t>();
    }
    reads_.emplace(asked, piece_bytes,
                   preadv == 0 ? ::preadv : reinterpret_cast<FileReads::Preadv>(preadv));
  }

  std::size_t num_pieces() const { return reads_->num_pieces(); }

  void work() {
    const py::gil_scoped_release release;
    reads_->work();
  }

  // Reads everything in this thread and waits for the others. An interruption (KeyboardInterrupt)
  // is raised only after that.
  void run() {
    {
      const py::gil_scoped_release release;
      reads_->work();
      reads_->wait_until(Clock::time_point::max());
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

  // Waits for other threads to read everything, until the timeout at the latest. After that no read
  // is begun, and buffers of reads that are not under way are released.
  void run_elsewhere(double timeout_s) {
    const Stop stop(*this);
    const double longest_s = 1e-9 * static_cast<double>(std::numeric_limits<int64_t>::max() / 2);
    const auto deadline =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(
                           std::chrono::duration<double>(std::clamp(timeout_s, 0.0, longest_s)));
    for (bool is_over = false; !is_over;) {
      {
        const py::gil_scoped_release release;
        is_over = reads_->wait_until(std::min(deadline, Clock::now() + kBetweenSignals));
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      is_over |= Clock::now() >= deadline;
    }
  }

  // For each read the bytes read, or a negative errno; None for one not finished in time.
  py::list outcomes() const {
    py::list outcomes;
    for (const int64_t outcome : reads_->outcomes()) {
      if (outcome == FileReads::kNotBegun || outcome == FileReads::kNotOver) {
        outcomes.append(py::none());
      } else {
        outcomes.append(outcome);
      }
    }
    return outcomes;
  }

 private:
  using Clock = FileReads::Clock;
  static constexpr auto kBetweenSignals = 100ms;

  struct Stop {
    explicit Stop(Reads& reads) : reads(reads) {}
    ~Stop() {
      reads.reads_->stop();
      const auto outcomes = reads.reads_->outcomes();
      for (std::size_t i = 0; i < outcomes.size(); ++i) {
        if (outcomes[i] != FileReads::kNotOver) reads.held_[i].release();
      }
    }
    Stop(const Stop&) = delete;
    Stop& operator=(const Stop&) = delete;

    Reads& reads;
  };

  py::object files_;
  std::vector<HeldBuffers> held_;
  std::optional<FileReads> reads_;
};

}  // namespace

void bind_file_reads(py::module_& module) {
  py::class_<Reads>(module, "FileReads")
      .def(py::init<const py::sequence&, int64_t, py::object, uintptr_t>(), py::arg("reads"),
           py::arg("piece_bytes"), py::arg("files"), py::arg("preadv"))
      .def("__len__", &Reads::num_pieces)
      .def("work", &Reads::work)
      .def("run", &Reads::run)
      .def("run_elsewhere", &Reads::run_elsewhere, py::arg("timeout_s"))
      .def("outcomes", &Reads::outcomes);
}

}  // namespace kvkernels::bindings
