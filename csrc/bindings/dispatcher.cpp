#include "bindings/dispatcher.h"

#include <cstdint>

#include "bindings/bindings.h"
#include "kvkernels/torch_symbols.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

// PyTorch numbers its dispatch keys anew in each version; Python tells the numbers.
using DispatchKey = uint16_t;

// Tell what PyTorch keeps of each thread. They take and return numbers, if anything, so that their
// names are all that could change.
struct ThreadState {
  bool (*is_grad_enabled)();
  int64_t (*num_dispatch_modes)();
  int64_t (*num_function_modes)();
  bool (*is_profiled)();
  bool (*has_key)(DispatchKey);

  bool is_complete() const {
    return is_grad_enabled && num_dispatch_modes && num_function_modes && is_profiled && has_key;
  }
};

template <typename Function>
void find(const char* name, Function*& found) {
  found = reinterpret_cast<Function*>(find_torch_symbol(name));
}

ThreadState find_thread_state() {
  ThreadState state = {};
  find("_ZN3c108GradMode10is_enabledEv", state.is_grad_enabled);
  find("_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", state.num_dispatch_modes);
  find("_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv", state.num_function_modes);
  find("_ZN5torch8profiler4impl15profilerEnabledEv", state.is_profiled);
  find("_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE", state.has_key);
  return state;
}

// Set once, when the package is imported.
ThreadState thread_state;
bool has_thread_state = false;
DispatchKey of_transforms, of_tracing;
py::handle ask_python, forward_ad;

// Tangents are carried while torch.autograd.forward_ad._current_level is not negative.
bool has_tangents() {
  static PyObject* const name = PyUnicode_InternFromString("_current_level");
  PyObject* const level = PyDict_GetItem(forward_ad.ptr(), name);
  return level == nullptr || !PyLong_CheckExact(level) || PyLong_AsLong(level) >= 0;
}

// `ask` answers needs_dispatcher() from now on where PyTorch's functions for it are not found.
// `forward_ad_names` is the dictionary of that module. Returns whether they are found.
bool watch_dispatcher(const py::function& ask, const py::dict& forward_ad_names,
                      const py::object& transforms_key, const py::object& tracing_key) {
  // Never freed: they live as long as the package.
  ask_python = ask.inc_ref();
  forward_ad = forward_ad_names.inc_ref();
  of_transforms = py::int_(transforms_key).cast<DispatchKey>();
  of_tracing = py::int_(tracing_key).cast<DispatchKey>();
  thread_state = find_thread_state();
  return has_thread_state = thread_state.is_complete();
}

}  // namespace

bool needs_dispatcher() {
  if (!has_thread_state) return !ask_python || ask_python().cast<bool>();
  const ThreadState& state = thread_state;
  return state.is_grad_enabled() || state.num_dispatch_modes() > 0 ||
         state.num_function_modes() > 0 || state.is_profiled() || state.has_key(of_transforms) ||
         state.has_key(of_tracing) || has_tangents();
}

void bind_dispatcher(py::module_& module) {
  module.def("watch_dispatcher", &watch_dispatcher);
  module.def("needs_dispatcher", &needs_dispatcher);
}

}  // namespace kvkernels::bindings
