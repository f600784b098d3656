#include "common/cuda_info.h"

#include <cuda_runtime_api.h>

namespace kd {

CudaInfo cuda_info() {
  CudaInfo info;
  cudaRuntimeGetVersion(&info.runtime);
  cudaDriverGetVersion(&info.driver);
  const cudaError_t status = cudaGetDeviceCount(&info.devices);
  if (status != cudaSuccess) {
    info.devices = 0;
    info.error = cudaGetErrorString(status);
    cudaGetLastError();  // leave no sticky error behind
  }
  return info;
}

}  // namespace kd
