// Row kernels for the mixture group: Jensen-Shannon and skew.
#include "divergence/divergence_kernel.cuh"

KD_INSTANTIATE_ROWS(kd::cuda::Variant::kMixture)
