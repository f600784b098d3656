// Scalar maths under the names that the SIMD lane types use too, so that a formula is written once:
//
//   template <class F> KD_HOST_DEVICE F softplus(F x) { return max(x, F(0)) + log1p(exp(-abs(x)));
//   }
//
// serves float and double on host and device, and a lane type (whose own fma, exp, ... are found by
// argument-dependent lookup). Inside namespace kd call them without a qualifier. Comparisons give
// bool here and a mask there; combine them with & | ! (not && ||) and use select, not the ?:
// operator. Constants are doubles: write F(kLn2).
//
// Accuracy: 1 to 2 ulp on both sides, expm1 and log1p also near 0. Never compile the device side
// with --use_fast_math, which would replace these functions by cruder ones and flush subnormals.
#pragma once

#include <cmath>
#include <limits>

#include "common/macros.h"

namespace kd {

constexpr double kLog2E = 1.4426950408889634074;  // log2(e)
constexpr double kLn2 = 0.69314718055994530942;   // ln(2)
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// a * b + c. Fused where the target has the instruction; elsewhere two roundings, because the fused
// library call is 50 times slower: do not build error-free transformations on it.
KD_HOST_DEVICE float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  return ::fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
KD_HOST_DEVICE double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  return ::fma(a, b, c);
#else
  return a * b + c;
#endif
}

#define KD_SCALAR_FUNCTION(name)         \
  KD_HOST_DEVICE float name(float x) {   \
    return ::name##f(x);                 \
  }                                      \
  KD_HOST_DEVICE double name(double x) { \
    return ::name(x);                    \
  }
KD_SCALAR_FUNCTION(exp)
KD_SCALAR_FUNCTION(exp2)
KD_SCALAR_FUNCTION(expm1)
KD_SCALAR_FUNCTION(log)
KD_SCALAR_FUNCTION(log2)
KD_SCALAR_FUNCTION(log1p)
KD_SCALAR_FUNCTION(sqrt)
#undef KD_SCALAR_FUNCTION

KD_HOST_DEVICE float pow(float x, float y) {
  return ::powf(x, y);
}
KD_HOST_DEVICE double pow(double x, double y) {
  return ::pow(x, y);
}

// A cheaper exp2 for lanes whose argument is at most 0; scalars have nothing to gain.
KD_HOST_DEVICE float exp2_nonpositive(float x) {
  return exp2(x);
}
KD_HOST_DEVICE double exp2_nonpositive(double x) {
  return exp2(x);
}

KD_HOST_DEVICE float abs(float x) {
  return ::fabsf(x);
}
KD_HOST_DEVICE double abs(double x) {
  return ::fabs(x);
}

// If one argument is NaN, which one comes back is unspecified (GPU and SIMD units differ).
KD_HOST_DEVICE float min(float a, float b) {
#if defined(__CUDA_ARCH__)
  return ::fminf(a, b);
#else
  return a < b ? a : b;
#endif
}
KD_HOST_DEVICE double min(double a, double b) {
  return a < b ? a : b;
}
KD_HOST_DEVICE float max(float a, float b) {
#if defined(__CUDA_ARCH__)
  return ::fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
KD_HOST_DEVICE double max(double a, double b) {
  return a > b ? a : b;
}

KD_HOST_DEVICE float select(bool condition, float a, float b) {
  return condition ? a : b;
}
KD_HOST_DEVICE double select(bool condition, double a, double b) {
  return condition ? a : b;
}

KD_HOST_DEVICE bool is_nan(float x) {
  return x != x;
}
KD_HOST_DEVICE bool is_nan(double x) {
  return x != x;
}
KD_HOST_DEVICE bool is_inf(float x) {
  return abs(x) == static_cast<float>(kInfinity);
}
KD_HOST_DEVICE bool is_inf(double x) {
  return abs(x) == kInfinity;
}
KD_HOST_DEVICE bool is_finite(float x) {
  return abs(x) < static_cast<float>(kInfinity);
}
KD_HOST_DEVICE bool is_finite(double x) {
  return abs(x) < kInfinity;
}

// Of a mask: is it true in any, in every, in no lane?
KD_HOST_DEVICE bool any(bool condition) {
  return condition;
}
KD_HOST_DEVICE bool all(bool condition) {
  return condition;
}
KD_HOST_DEVICE bool none(bool condition) {
  return !condition;
}

}  // namespace kd
