// View: how every array crosses from a caller into the kernels. It owns nothing and knows no
// framework. Shapes and strides are counted in elements, never in bytes.
#pragma once

#include <cstdint>

namespace kd {

enum class DType : uint8_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat64,
  kInt64,
  kInt32,
  kBool,
  kOther
};
enum class Device : uint8_t { kCpu, kCuda, kOther };

constexpr int kMaxDims = 6;

struct View {
  void* data = nullptr;
  int32_t ndim = -1;  // -1: the argument was not given (None)
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};
  DType dtype = DType::kOther;
  Device device = Device::kCpu;
  int32_t device_index = 0;

  explicit operator bool() const { return ndim >= 0; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  int64_t size() const {
    int64_t n = ndim >= 0 ? 1 : 0;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat64:
      return "float64";
    case DType::kInt64:
      return "int64";
    case DType::kInt32:
      return "int32";
    case DType::kBool:
      return "bool";
    case DType::kOther:
      break;
  }
  return "an unsupported dtype";
}

inline const char* name(Device device) {
  return device == Device::kCpu    ? "cpu"
         : device == Device::kCuda ? "cuda"
                                   : "an unsupported device";
}

}  // namespace kd
