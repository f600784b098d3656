// What the host side of a kernel needs: the right device, a launch, errors in words.
//
//   DeviceGuard guard(view.device_index);
//   LaunchInfo info{"divergence_fwd_row", dim3(rows), dim3(256), 0, stream, "N=4, V=32000"};
//   launch(info, divergence_fwd_row_kernel<T, Kind>, pointer, rows, columns);
//
// Throws std::runtime_error (RuntimeError in Python) with kernel, grid, block, shape and CUDA's
// text. KDK_SYNC=1 waits for every kernel, so that an asynchronous error names the kernel that made
// it.
#pragma once

#include <stdexcept>
#include <string>

#include "common/simt.h"

namespace kd {

using simt::launch;
using simt::LaunchInfo;
using simt::Stream;

#if defined(__CUDACC__)
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}
#endif

// Makes `device` current for its own lifetime. The library links its own CUDA runtime, whose
// current device is not the caller's: every entry point holds a guard.
class DeviceGuard {
 public:
#if defined(__CUDACC__)
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device == previous_) return;
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
#else
  explicit DeviceGuard(int) {}
#endif
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
#if defined(__CUDACC__)
  int previous_ = 0;
  bool changed_ = false;
#endif
};

}  // namespace kd
