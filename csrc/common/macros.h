// Function qualifiers that mean the same thing to nvcc and to a host compiler.
#pragma once

#if defined(__CUDACC__)
#define KD_HOST_DEVICE __host__ __device__ __forceinline__
#define KD_UNROLL _Pragma("unroll")
#else
#define KD_HOST_DEVICE inline __attribute__((always_inline))
#define KD_UNROLL
#endif

#define KD_RESTRICT __restrict__
