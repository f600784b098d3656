// What the CUDA driver of this machine says; never fails, because having no driver is normal.
#pragma once

#include <string>

namespace kd {

struct CudaInfo {
  int runtime = 0;  // CUDA version of the static runtime, e.g. 13000
  int driver = 0;   // newest CUDA version the driver serves; 0 without a driver
  int devices = 0;
  std::string error;  // why there is no device; empty if there is one
};

CudaInfo cuda_info();

}  // namespace kd
