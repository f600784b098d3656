// Row kernels for the power group: alpha, Renyi and AB.
#include "divergence/divergence_kernel.cuh"

KD_INSTANTIATE_ROWS(kd::cuda::Variant::kPower)
