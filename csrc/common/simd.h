// VecF and VecD: the explicit vector types hot CPU loops are written against, once for every ISA.
//
// A source that includes this file is compiled once per ISA with -DKDK_ISA=avx512 | avx2 | baseline
// (cmake/Isa.cmake) and keeps its code in `namespace kd { namespace KDK_ISA_NAMESPACE { ... } }`.
// Such a source includes only <cstdint>, <cstddef>, <cstring> and headers of this project: an
// inline function of the standard library compiled with AVX-512 could be the copy the linker keeps
// for the whole program. For the same reason a template over plain scalars that lives outside the
// ISA namespace must be KD_HOST_DEVICE (always inlined).
//
// Interface, the same for VecF (float lanes) and VecD (double lanes, half as many); V is either
// one:
//   V::kLanes  V::Scalar  V::Mask             V(s): all lanes s, implicit
//   V::load(p)  V::load_partial(p, n, fill)   p: float, bf16, f16 (VecF) or double (VecD), any
//                                             alignment; 0 <= n <= kLanes, memory past n untouched
//   V::zero()  V::iota()                      0, and the lane's own index
//   V::Mask::first(n)                         lanes below n
//   store(p, v)  store_partial(p, v, n)       rounds to nearest even, NaN stays NaN
//   stream(p, v)  stream2(p, v0, v1)          non-temporal; p aligned to the bytes written (at most
//                                             kStreamAlignment); stream2 of a half type is one
//                                             full-width store; stream_fence() after the last one
//   + - * / += -= *=, fma a*b+c, fms a*b-c, fnma c-a*b (one rounding; two on the x86 baseline)
//   < <= > >= == != -> Mask (false for NaN, != true);  & | ^ ! on masks, any(m) all(m) none(m)
//   select(m, a, b)                           m ? a : b, a blend: NaN of the other side is not seen
//   min(a, b) = a < b ? a : b,  max(a, b) = a > b ? a : b    hence b wherever either is NaN
//   abs, sqrt, is_nan, is_finite
//   reduce_add, reduce_max, reduce_min        halves are folded onto each other: a fixed order
//   reduce_add_double(v), widen_sum(v)        lanes added as doubles, into a double or a VecD
//   exp2, exp2_sum, exp2_nonpositive, exp, expm1, log2, log2_absolute, log, log1p, pow
//                                             errors and edges in simd_math.h
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "common/macros.h"

#if !defined(KDK_ISA)
#define KDK_ISA baseline
#endif
#define KDK_ISA_NAMESPACE KDK_ISA

// KDK_ISA is a name; the preprocessor compares numbers.
#define KDK_ISA_LEVEL_baseline 0
#define KDK_ISA_LEVEL_avx2 1
#define KDK_ISA_LEVEL_avx512 2
#define KDK_ISA_CONCAT_(a, b) a##b
#define KDK_ISA_CONCAT(a, b) KDK_ISA_CONCAT_(a, b)
#define KDK_ISA_LEVEL KDK_ISA_CONCAT(KDK_ISA_LEVEL_, KDK_ISA)

#if defined(__x86_64__)
// GCC 12 warns about its own _mm512_undefined_ps().
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define KD_LANES inline __attribute__((always_inline))

namespace kd {
namespace KDK_ISA_NAMESPACE {

// The longest unit a non-temporal store writes on any ISA: a cache line.
constexpr size_t kStreamAlignment = 64;

KD_LANES bool is_aligned(const void* pointer, size_t bytes = kStreamAlignment) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

// One cache line, into all levels or into L2 only. Any address is allowed, also one past an array.
KD_LANES void prefetch(const void* pointer) {
  __builtin_prefetch(pointer, 0, 3);
}
KD_LANES void prefetch_l2(const void* pointer) {
  __builtin_prefetch(pointer, 0, 2);
}

// Orders non-temporal stores before everything that follows; once, after a thread's last stream().
KD_LANES void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd

#include "common/simd_generic.h"
#if KDK_ISA_LEVEL == 2
#include "common/simd_avx512.h"
#elif KDK_ISA_LEVEL == 1
#include "common/simd_avx2.h"
#else
#include "common/simd_baseline.h"
#endif
#include "common/simd_math.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

// Lanes<T>: the vector type that rows stored as T are computed in.
template <class T>
struct LanesOf {
  using type = VecF;
};
template <>
struct LanesOf<double> {
  using type = VecD;
};
template <class T>
using Lanes = typename LanesOf<T>::type;

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
