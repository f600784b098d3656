// Row kernels for forward_kl alone.
#include "divergence/divergence_kernel.cuh"

KD_INSTANTIATE_ROWS(kd::cuda::Variant::kForward)
