// The two 16-bit floating types as storage, and their conversions.
//
// They are plain structs of bits on purpose: the same type crosses nvcc, g++ and every CPU ISA, and
// arithmetic on them does not compile, so a kernel cannot compute in half precision by accident.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace kd {

struct alignas(2) bf16 {
  uint16_t bits;
};

struct alignas(2) f16 {
  uint16_t bits;
};

namespace detail {

KD_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

KD_HOST_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace detail

// to_float(x): exact widening. double and float pass through, so templates need no special case.
KD_HOST_DEVICE float to_float(float x) {
  return x;
}
KD_HOST_DEVICE double to_float(double x) {
  return x;
}

KD_HOST_DEVICE float to_float(bf16 x) {
  return detail::bits_float(static_cast<uint32_t>(x.bits) << 16);
}

KD_HOST_DEVICE float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  __half h;
  memcpy(&h, &x, sizeof(h));
  return __half2float(h);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return detail::bits_float(sign | 0x7f800000u | (magnitude << 13));
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
  const float scaled = detail::bits_float(magnitude << 13) * 0x1p112f;
  return detail::bits_float(sign | detail::float_bits(scaled));
#endif
}

// from_float<T>(x): round to nearest, ties to even; NaN stays NaN.
template <class T>
KD_HOST_DEVICE T from_float(float x);

template <>
KD_HOST_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
KD_HOST_DEVICE bf16 from_float<bf16>(float x) {
  const uint32_t bits = detail::float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return bf16{static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  }
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
KD_HOST_DEVICE f16 from_float<f16>(float x) {
#if defined(__CUDA_ARCH__)
  const __half h = __float2half_rn(x);
  f16 out;
  memcpy(&out, &h, sizeof(out));
  return out;
#else
  const uint32_t bits = detail::float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x47800000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // >= 2^16
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 1/2 puts its last bit at 2^-24, so the FPU rounds where it must.
    const float shifted = detail::bits_float(magnitude) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (detail::float_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return f16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// cast<T>(x): from the compute type (float, or double when the storage is double) to storage.
template <class T>
KD_HOST_DEVICE T cast(float x) {
  return from_float<T>(x);
}
template <class T>
KD_HOST_DEVICE T cast(double x) {
  if constexpr (sizeof(T) == 2) {
    return from_float<T>(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// The type a kernel computes in: double for double, float for everything else.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeType<T>::type;

}  // namespace kd
