// Host versions of the CUDA functions that do not wait: atomics, bit tricks, loads, fast maths.
// The fast maths here is exact to a last bit or two: tolerances must not be taken from it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// ---- atomics -----------------------------------------------------------------------------------

namespace simt::host {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// *address = fn(*address) in one step; returns the old value.
template <class T, class Fn>
T atomic_update(T* address, Fn&& fn) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = BitsOf<T>;
  Bits* bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old, bits_as<Bits>(fn(bits_as<T>(old))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return bits_as<T>(old);
}

}  // namespace simt::host

// One macro a function keeps the list of types next to the name, as in CUDA's own table.
#define KD_SIMT_ATOMIC(name, T, expression)                                                \
  inline T name(T* address, T value) {                                                     \
    return simt::host::atomic_update(address, [value](T old) -> T { return expression; }); \
  }
// Integer addition wraps on a GPU.
KD_SIMT_ATOMIC(atomicAdd, int,
               static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
KD_SIMT_ATOMIC(atomicAdd, unsigned, old + value)
KD_SIMT_ATOMIC(atomicAdd, unsigned long long, old + value)
KD_SIMT_ATOMIC(atomicAdd, float, old + value)
KD_SIMT_ATOMIC(atomicAdd, double, old + value)
KD_SIMT_ATOMIC(atomicSub, int,
               static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
KD_SIMT_ATOMIC(atomicSub, unsigned, old - value)
KD_SIMT_ATOMIC(atomicMin, int, value < old ? value : old)
KD_SIMT_ATOMIC(atomicMin, unsigned, value < old ? value : old)
KD_SIMT_ATOMIC(atomicMin, long long, value < old ? value : old)
KD_SIMT_ATOMIC(atomicMin, unsigned long long, value < old ? value : old)
KD_SIMT_ATOMIC(atomicMax, int, value > old ? value : old)
KD_SIMT_ATOMIC(atomicMax, unsigned, value > old ? value : old)
KD_SIMT_ATOMIC(atomicMax, long long, value > old ? value : old)
KD_SIMT_ATOMIC(atomicMax, unsigned long long, value > old ? value : old)
KD_SIMT_ATOMIC(atomicAnd, unsigned, old& value)
KD_SIMT_ATOMIC(atomicOr, unsigned, old | value)
KD_SIMT_ATOMIC(atomicXor, unsigned, old ^ value)
KD_SIMT_ATOMIC(atomicExch, int, (static_cast<void>(old), value))
KD_SIMT_ATOMIC(atomicExch, unsigned, (static_cast<void>(old), value))
KD_SIMT_ATOMIC(atomicExch, unsigned long long, (static_cast<void>(old), value))
KD_SIMT_ATOMIC(atomicExch, float, (static_cast<void>(old), value))
#undef KD_SIMT_ATOMIC

#define KD_SIMT_CAS(T)                                                              \
  inline T atomicCAS(T* address, T expected, T value) {                             \
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_SEQ_CST, \
                                __ATOMIC_SEQ_CST);                                  \
    return expected;                                                                \
  }
KD_SIMT_CAS(int)
KD_SIMT_CAS(unsigned)
KD_SIMT_CAS(unsigned long long)
#undef KD_SIMT_CAS

// ---- bits --------------------------------------------------------------------------------------

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<uint64_t>(x)) : 64;
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline int __float_as_int(float x) {
  return simt::host::bits_as<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return simt::host::bits_as<unsigned>(x);
}
inline float __int_as_float(int x) {
  return simt::host::bits_as<float>(x);
}
inline float __uint_as_float(unsigned x) {
  return simt::host::bits_as<float>(x);
}
inline long long __double_as_longlong(double x) {
  return simt::host::bits_as<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return simt::host::bits_as<double>(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

// ---- loads and stores with a cache hint --------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}

// ---- maths -------------------------------------------------------------------------------------

// glibc declares some of these names itself, hence macros.
#define __expf(x) ::std::exp(static_cast<float>(x))
#define __exp10f(x) ::std::pow(10.0f, static_cast<float>(x))
#define __logf(x) ::std::log(static_cast<float>(x))
#define __log2f(x) ::std::log2(static_cast<float>(x))
#define __log10f(x) ::std::log10(static_cast<float>(x))
#define __powf(x, y) ::std::pow(static_cast<float>(x), static_cast<float>(y))
#define __sinf(x) ::std::sin(static_cast<float>(x))
#define __cosf(x) ::std::cos(static_cast<float>(x))
#define __fdividef(x, y) (static_cast<float>(x) / static_cast<float>(y))
#define __frcp_rn(x) (1.0f / static_cast<float>(x))
#define __fsqrt_rn(x) ::std::sqrt(static_cast<float>(x))
#define __fadd_rn(x, y) (static_cast<float>(x) + static_cast<float>(y))
#define __fmul_rn(x, y) (static_cast<float>(x) * static_cast<float>(y))
#define __fmaf_rn(x, y, z) \
  ::std::fma(static_cast<float>(x), static_cast<float>(y), static_cast<float>(z))
#define __saturatef(x) ::std::fmin(::std::fmax(static_cast<float>(x), 0.0f), 1.0f)

inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}

// ---- built-in vectors --------------------------------------------------------------------------

#define KD_SIMT_VECTOR(T, name, bytes2, bytes4)       \
  struct __align__(bytes2) name##2 {                  \
    T x, y;                                           \
  };                                                  \
  struct __align__(bytes4) name##4 {                  \
    T x, y, z, w;                                     \
  };                                                  \
  inline name##2 make_##name##2(T x, T y) {           \
    return {x, y};                                    \
  }                                                   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { \
    return {x, y, z, w};                              \
  }
KD_SIMT_VECTOR(float, float, 8, 16)
KD_SIMT_VECTOR(int, int, 8, 16)
KD_SIMT_VECTOR(unsigned, uint, 8, 16)
KD_SIMT_VECTOR(double, double, 16, 16)
#undef KD_SIMT_VECTOR
