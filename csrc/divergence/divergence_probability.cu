// Row kernels for the probability group: total variation, Hellinger and the like.
#include "divergence/divergence_kernel.cuh"

KD_INSTANTIATE_ROWS(kd::cuda::Variant::kProbability)
