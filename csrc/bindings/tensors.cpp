#include "bindings/tensors.h"

#include <algorithm>
#include <iterator>

#include "bindings/bindings.h"

namespace kvkernels::bindings {
namespace {

namespace py = pybind11;

// The structures of DLPack 1.x; where a member is not used here, there is only room for a pointer.

struct DLVersion {
  uint32_t major, minor;
};

struct DLDevice {
  int32_t type;  // 1: CPU
  int32_t id;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  ElementType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  DLVersion version;
  DLPackExchangeAPI* older;
  void *allocate_managed, *managed_from_object, *managed_to_object;
  // Borrows shape and strides. Null where the library leaves it out, as DLPack allows.
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_work_stream;
};

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;

// Set once, when the package is imported.
const DLPackExchangeAPI* exchange = nullptr;
py::handle plain_classes[2];

// Reads tensors through `capsule`, which is Tensor.__dlpack_c_exchange_api__, from now on. False,
// and nothing changes: its version is not known here, or it does not read tensors.
bool use_tensor_exchange(const py::capsule& capsule, const py::type& tensor,
                         const py::type& parameter) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major != kMajorVersion) api = api->older;
  if (api == nullptr || api->tensor_from_object == nullptr) return false;
  // Never freed: they live as long as PyTorch.
  plain_classes[0] = tensor.inc_ref();
  plain_classes[1] = parameter.inc_ref();
  exchange = api;
  return true;
}

// What a method without arguments gives; null where it raises.
py::object ask(py::handle tensor, PyObject* method) {
  PyObject* const answer = PyObject_CallMethodNoArgs(tensor.ptr(), method);
  if (answer == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(answer);
}

// Whether a tensor that has elements has memory, too. One whose storage was let go of, as sharding
// libraries do, lies where it would if that began at address 0.
bool has_memory(py::handle tensor, const char* data, ElementType type) {
  // Heaps lie above, except those of programs at fixed addresses, and storages are smaller: hardly
  // ever is the tensor asked, which takes 0.04 us.
  constexpr uint64_t kLowAddress = uint64_t{1} << 38;
  const uint64_t address = reinterpret_cast<uintptr_t>(data);
  if (address >= kLowAddress) return true;
  static PyObject* const method = PyUnicode_InternFromString("storage_offset");
  const py::object offset = ask(tensor, method);
  const uint64_t item_bytes = type.bits * type.lanes / 8;
  return offset && address != PyLong_AsUnsignedLongLong(offset.ptr()) * item_bytes;
}

// Whether PyTorch negates the tensor's numbers when it reads them, as those of the imaginary part
// of a conjugate. Asking takes 0.06 us, so only those tensors are asked that may be such a part:
// its numbers are no neighbours, and lie at odd places. (Not so what as_strided takes from an even
// place on, or _neg_view returns: these are read with the wrong sign.)
bool is_negated(py::handle tensor, const DLTensor& found, const char* data) {
  if (found.dtype != kFloat32Type && found.dtype != kFloat16Type) return false;
  const bool has_neighbours = found.ndim > 0 && found.shape[found.ndim - 1] > 1;
  const bool is_at_odd_place = reinterpret_cast<uintptr_t>(data) / (found.dtype.bits / 8) % 2 == 1;
  if (has_neighbours && !is_at_odd_place) return false;
  static PyObject* const method = PyUnicode_InternFromString("is_neg");
  return !ask(tensor, method).is(py::bool_(false));
}

}  // namespace

bool TensorView::has(ElementType wanted, std::initializer_list<int64_t> wanted_shape) const {
  return type == wanted && dim == static_cast<int>(wanted_shape.size()) &&
         std::equal(wanted_shape.begin(), wanted_shape.end(), shape,
                    [](int64_t want, int64_t got) { return want == kAnySize || want == got; });
}

bool TensorView::is_contiguous_from(int first) const {
  int64_t stride = 1;
  for (int i = dim - 1; i >= first; --i) {
    if (shape[i] != 1 && strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

std::optional<DType> dtype_of(ElementType type) {
  if (type == kFloat32Type) return DType::kFloat32;
  if (type == kFloat16Type) return DType::kFloat16;
  if (type == kBFloat16Type) return DType::kBFloat16;
  if (type == kFloat8Type) return DType::kFloat8;
  return std::nullopt;
}

std::optional<TensorView> view_tensor(py::handle tensor) {
  const auto type = py::handle(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())));
  if (exchange == nullptr || !(type.is(plain_classes[0]) || type.is(plain_classes[1]))) {
    return std::nullopt;
  }
  DLTensor found;
  if (exchange->tensor_from_object(tensor.ptr(), &found) != 0) {
    PyErr_Clear();  // such as a sparse tensor's: the caller goes the way that names what is wrong
    return std::nullopt;
  }
  if (found.device.type != kCpu) return std::nullopt;
  char* const data = static_cast<char*>(found.data) + found.byte_offset;
  const bool is_empty =
      std::find(found.shape, found.shape + found.ndim, 0) != found.shape + found.ndim;
  if (!is_empty && !has_memory(tensor, data, found.dtype)) return std::nullopt;
  if (is_negated(tensor, found, data)) return std::nullopt;
  return TensorView{data, found.ndim, found.dtype, found.shape, found.strides};
}

TensorView view(py::handle tensor) {
  const std::optional<TensorView> found = view_tensor(tensor);
  require(found.has_value());
  return *found;
}

DType float_dtype(const TensorView& tensor) {
  const std::optional<DType> dtype = dtype_of(tensor.type);
  require(dtype.has_value() && *dtype != DType::kFloat8);
  return *dtype;
}

py::object new_empty(py::handle tensor, const py::tuple& shape) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty");
  PyObject* const out = PyObject_CallMethodOneArg(tensor.ptr(), name, shape.ptr());
  if (out == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(out);
}

void bind_tensors(py::module_& module) { module.def("use_tensor_exchange", &use_tensor_exchange); }

}  // namespace kvkernels::bindings
