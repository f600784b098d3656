// Python tensor -> kd::View. Two ways, the same result:
//   the exchange table of the tensor's type (about 0.1 us a tensor), where the type has one;
//   integers (pointer, shape, strides, codes) asked from a Python function otherwise, and always
//   with KDK_BINDING=integers.
// A View borrows: it is valid for the duration of the call that received the tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>

#include "common/view.h"
#include "exchange_api.h"

namespace kd::binding {

namespace py = pybind11;

inline bool force_integers() {
  const char* value = std::getenv("KDK_BINDING");
  return value != nullptr && std::strcmp(value, "integers") == 0;
}

// describe(tensor) -> (pointer, shape, strides, dtype code, device code, device index): set once by
// kdkernels.backends at import.
inline PyObject*& describe_function() {
  static PyObject* function = nullptr;
  return function;
}
inline PyObject*& stream_function() {
  static PyObject* function = nullptr;
  return function;
}

// The table is a property of the type; the look-up costs more than the call, so it is kept. A type
// is kept alive by its entry (few types, for the life of the process).
inline const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  thread_local PyTypeObject* last_type = nullptr;
  thread_local const dlpack::ExchangeApi* last = nullptr;
  if (type == last_type) return last;
  thread_local std::unordered_map<PyTypeObject*, const dlpack::ExchangeApi*> known;
  auto found = known.find(type);
  if (found == known.end()) {
    const dlpack::ExchangeApi* api = nullptr;
    PyObject* capsule =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    if (capsule == nullptr) {
      PyErr_Clear();
    } else {
      if (PyCapsule_IsValid(capsule, dlpack::kCapsuleName)) {
        api = static_cast<const dlpack::ExchangeApi*>(
            PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
      }
      Py_DECREF(capsule);
    }
    if (api != nullptr && (api->version.major != dlpack::kMajorVersion ||
                           api->dltensor_from_py_object_no_sync == nullptr)) {
      api = nullptr;
    }
    Py_INCREF(type);
    found = known.emplace(type, api).first;
  }
  last_type = type;
  return last = found->second;
}

inline DType dtype_from(dlpack::DType dtype) {
  if (dtype.lanes != 1) return DType::kOther;
  switch (dtype.code) {
    case dlpack::kFloat:
      return dtype.bits == 32   ? DType::kFloat32
             : dtype.bits == 64 ? DType::kFloat64
             : dtype.bits == 16 ? DType::kFloat16
                                : DType::kOther;
    case dlpack::kBFloat:
      return dtype.bits == 16 ? DType::kBFloat16 : DType::kOther;
    case dlpack::kInt:
      return dtype.bits == 64 ? DType::kInt64 : dtype.bits == 32 ? DType::kInt32 : DType::kOther;
    case dlpack::kBool:
      return DType::kBool;
    default:
      return DType::kOther;
  }
}

inline View view_from_table(PyObject* object, const dlpack::ExchangeApi* api) {
  dlpack::Tensor tensor;
  if (api->dltensor_from_py_object_no_sync(object, &tensor) != 0) throw py::error_already_set();
  if (tensor.ndim > kMaxDims) throw py::value_error("a tensor has more than 6 dimensions");
  View view;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.ndim = tensor.ndim;
  for (int i = 0; i < tensor.ndim; ++i) {
    view.shape[i] = tensor.shape[i];
    view.stride[i] = tensor.strides[i];
  }
  view.dtype = dtype_from(tensor.dtype);
  view.device = tensor.device_type == dlpack::kCpu || tensor.device_type == dlpack::kCudaHost
                    ? Device::kCpu
                : tensor.device_type == dlpack::kCuda ? Device::kCuda
                                                      : Device::kOther;
  view.device_index = tensor.device_id;
  return view;
}

inline View view_from_integers(PyObject* object) {
  if (describe_function() == nullptr) {
    throw py::type_error("expected a torch.Tensor of a type this build can read");
  }
  const py::tuple facts =
      py::reinterpret_borrow<py::object>(describe_function())(py::handle(object)).cast<py::tuple>();
  View view;
  view.data = reinterpret_cast<void*>(facts[0].cast<uintptr_t>());
  const py::tuple shape = facts[1].cast<py::tuple>(), strides = facts[2].cast<py::tuple>();
  view.ndim = static_cast<int32_t>(shape.size());
  if (view.ndim > kMaxDims) throw py::value_error("a tensor has more than 6 dimensions");
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = shape[i].cast<int64_t>();
    view.stride[i] = strides[i].cast<int64_t>();
  }
  view.dtype = static_cast<DType>(facts[3].cast<int>());
  view.device = static_cast<Device>(facts[4].cast<int>());
  view.device_index = facts[5].cast<int>();
  return view;
}

inline View view_from(PyObject* object) {
  if (object == Py_None) return View{};
  static const bool integers = force_integers();
  const dlpack::ExchangeApi* api = integers ? nullptr : exchange_api(Py_TYPE(object));
  return api != nullptr ? view_from_table(object, api) : view_from_integers(object);
}

// The framework's current stream on the view's device; null (the default stream) on the CPU.
inline void* current_stream(PyObject* tensor, const View& view) {
  if (view.device != Device::kCuda) return nullptr;
  static const bool integers = force_integers();
  const dlpack::ExchangeApi* api = integers ? nullptr : exchange_api(Py_TYPE(tensor));
  if (api != nullptr && api->current_work_stream != nullptr) {
    void* stream = nullptr;
    if (api->current_work_stream(dlpack::kCuda, view.device_index, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }
  const py::object stream =
      py::reinterpret_borrow<py::object>(stream_function())(view.device_index);
  return reinterpret_cast<void*>(stream.cast<uintptr_t>());
}

}  // namespace kd::binding

namespace pybind11::detail {
template <>
struct type_caster<kd::View> {
  PYBIND11_TYPE_CASTER(kd::View, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = kd::binding::view_from(source.ptr());
    return true;
  }
};
}  // namespace pybind11::detail
