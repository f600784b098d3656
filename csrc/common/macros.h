// Function qualifiers that mean the same thing to nvcc and to a host compiler.
#pragma once

#if defined(__CUDACC__)
#define KD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KD_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Before a loop over a register array: unrolled on the device, left to the host compiler elsewhere.
#if defined(__CUDA_ARCH__)
#define KD_UNROLL _Pragma("unroll")
#else
#define KD_UNROLL
#endif

#define KD_RESTRICT __restrict__
