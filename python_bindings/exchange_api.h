// The part of DLPack 1.x that is used here, declared from its published ABI: a C table of functions
// that a tensor type offers as `__dlpack_c_exchange_api__` (a capsule). It turns a Python tensor
// into a borrowed view, and tells the current CUDA stream, without linking the tensor's library.
#pragma once

#include <cstdint>

namespace kd::dlpack {

constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4, kBool = 6 };

struct DType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  DeviceType device_type;
  int32_t device_id;
  int32_t ndim;
  DType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, Tensor* out);  // may be null
  int (*current_work_stream)(DeviceType type, int32_t id, void** out);
};

}  // namespace kd::dlpack
