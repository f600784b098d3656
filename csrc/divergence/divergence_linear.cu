// Row kernels for combinations of the linear group.
#include "divergence/divergence_kernel.cuh"

KD_INSTANTIATE_ROWS(kd::cuda::Variant::kLinear)
