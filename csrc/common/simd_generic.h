// GenericVec<S, N>: the vector interface over the compiler's own vector types. It is VecD on every
// ISA and VecF on the baseline; the compiler lowers it to SSE2, NEON, AVX or AVX-512 as it may.
#pragma once

#include "common/half.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

// Spelled out because a vector_size that depends on a template parameter does not overload.
template <class S, int N>
struct NativeOf;

template <>
struct NativeOf<float, 4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
};
template <>
struct NativeOf<double, 2> {
  typedef double Floats __attribute__((vector_size(16)));
  typedef int64_t Ints __attribute__((vector_size(16)));
};
template <>
struct NativeOf<double, 4> {
  typedef double Floats __attribute__((vector_size(32)));
  typedef int64_t Ints __attribute__((vector_size(32)));
};
template <>
struct NativeOf<double, 8> {
  typedef double Floats __attribute__((vector_size(64)));
  typedef int64_t Ints __attribute__((vector_size(64)));
};

template <class S, int N>
struct GenericMask {
  using Native = typename NativeOf<S, N>::Ints;

  Native m;  // -1 or 0 a lane

  static KD_LANES GenericMask first(int64_t n) {
    GenericMask out;
    for (int i = 0; i < N; ++i) out.m[i] = i < n ? -1 : 0;
    return out;
  }

  friend KD_LANES GenericMask operator&(GenericMask a, GenericMask b) { return {a.m & b.m}; }
  friend KD_LANES GenericMask operator|(GenericMask a, GenericMask b) { return {a.m | b.m}; }
  friend KD_LANES GenericMask operator^(GenericMask a, GenericMask b) { return {a.m ^ b.m}; }
  friend KD_LANES GenericMask operator!(GenericMask a) { return {~a.m}; }

  friend KD_LANES bool any(GenericMask a) {
    int64_t bits = 0;
    for (int i = 0; i < N; ++i) bits |= a.m[i];
    return bits != 0;
  }
  friend KD_LANES bool all(GenericMask a) { return !any(!a); }
  friend KD_LANES bool none(GenericMask a) { return !any(a); }
};

template <class S, int N>
struct GenericVec {
  using Scalar = S;
  using Mask = GenericMask<S, N>;
  using Native = typename NativeOf<S, N>::Floats;
  using NativeInt = typename NativeOf<S, N>::Ints;
  static constexpr int kLanes = N;

  Native v;

  GenericVec() = default;
  KD_LANES explicit GenericVec(Native native) : v(native) {}
  KD_LANES GenericVec(S s) {
    for (int i = 0; i < N; ++i) v[i] = s;
  }

  static KD_LANES GenericVec zero() { return GenericVec(Native{}); }
  static KD_LANES GenericVec iota() {
    GenericVec out;
    for (int i = 0; i < N; ++i) out.v[i] = static_cast<S>(i);
    return out;
  }

  static KD_LANES GenericVec load(const S* p) {
    GenericVec out;
    memcpy(&out.v, p, sizeof(out.v));
    return out;
  }
  // Half rows belong to float lanes; the unsigned lanes widen exactly.
  static KD_LANES GenericVec load(const bf16* p) { return GenericVec(load_half(p)); }
  static KD_LANES GenericVec load(const f16* p) { return GenericVec(load_half(p)); }

  template <class T>
  static KD_LANES GenericVec load_partial(const T* p, int64_t n, S fill) {
    GenericVec out(fill);
    for (int i = 0; i < N; ++i) {
      if (i < n) out.v[i] = to_float(p[i]);
    }
    return out;
  }

  KD_LANES GenericVec& operator+=(GenericVec b) { return v += b.v, *this; }
  KD_LANES GenericVec& operator-=(GenericVec b) { return v -= b.v, *this; }
  KD_LANES GenericVec& operator*=(GenericVec b) { return v *= b.v, *this; }

  friend KD_LANES GenericVec operator+(GenericVec a, GenericVec b) { return GenericVec(a.v + b.v); }
  friend KD_LANES GenericVec operator-(GenericVec a, GenericVec b) { return GenericVec(a.v - b.v); }
  friend KD_LANES GenericVec operator*(GenericVec a, GenericVec b) { return GenericVec(a.v * b.v); }
  friend KD_LANES GenericVec operator/(GenericVec a, GenericVec b) { return GenericVec(a.v / b.v); }
  friend KD_LANES GenericVec operator-(GenericVec a) { return GenericVec(-a.v); }

  friend KD_LANES Mask operator<(GenericVec a, GenericVec b) { return {(NativeInt)(a.v < b.v)}; }
  friend KD_LANES Mask operator<=(GenericVec a, GenericVec b) { return {(NativeInt)(a.v <= b.v)}; }
  friend KD_LANES Mask operator>(GenericVec a, GenericVec b) { return {(NativeInt)(a.v > b.v)}; }
  friend KD_LANES Mask operator>=(GenericVec a, GenericVec b) { return {(NativeInt)(a.v >= b.v)}; }
  friend KD_LANES Mask operator==(GenericVec a, GenericVec b) { return {(NativeInt)(a.v == b.v)}; }
  friend KD_LANES Mask operator!=(GenericVec a, GenericVec b) { return {(NativeInt)(a.v != b.v)}; }

  // Without hardware FMA a fused result would cost a library call a lane (60 times slower).
  friend KD_LANES GenericVec fma(GenericVec a, GenericVec b, GenericVec c) {
#if defined(__FMA__) || defined(__aarch64__)
    GenericVec out;
    for (int i = 0; i < N; ++i) {
      if constexpr (sizeof(S) == 4) {
        out.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
      } else {
        out.v[i] = __builtin_fma(a.v[i], b.v[i], c.v[i]);
      }
    }
    return out;
#else
    return a * b + c;
#endif
  }
  friend KD_LANES GenericVec fms(GenericVec a, GenericVec b, GenericVec c) { return fma(a, b, -c); }
  friend KD_LANES GenericVec fnma(GenericVec a, GenericVec b, GenericVec c) {
    return fma(-a, b, c);
  }

  friend KD_LANES GenericVec select(Mask m, GenericVec a, GenericVec b) {
    return from_bits((m.m & a.bits()) | (~m.m & b.bits()));
  }
  friend KD_LANES GenericVec min(GenericVec a, GenericVec b) { return select(a < b, a, b); }
  friend KD_LANES GenericVec max(GenericVec a, GenericVec b) { return select(a > b, a, b); }
  friend KD_LANES GenericVec abs(GenericVec a) {
    return from_bits(a.bits() & ~GenericVec(S(-0.0)).bits());
  }
  friend KD_LANES GenericVec sqrt(GenericVec a) {
    GenericVec out;
    for (int i = 0; i < N; ++i) {
      out.v[i] = sizeof(S) == 4 ? __builtin_sqrtf(a.v[i]) : __builtin_sqrt(a.v[i]);
    }
    return out;
  }
  friend KD_LANES Mask is_nan(GenericVec a) { return a != a; }
  friend KD_LANES Mask is_finite(GenericVec a) {
    return abs(a) < GenericVec(static_cast<S>(__builtin_inf()));
  }

  friend KD_LANES S reduce_add(GenericVec a) {
    for (int width = N / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
    }
    return a.v[0];
  }
  friend KD_LANES S reduce_max(GenericVec a) {
    for (int width = N / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
    }
    return a.v[0];
  }
  friend KD_LANES S reduce_min(GenericVec a) { return -reduce_max(-a); }

  KD_LANES NativeInt bits() const {
    NativeInt out;
    memcpy(&out, &v, sizeof(out));
    return out;
  }
  static KD_LANES GenericVec from_bits(NativeInt bits) {
    GenericVec out;
    memcpy(&out.v, &bits, sizeof(bits));
    return out;
  }

 private:
  template <class T>
  static KD_LANES Native load_half(const T* p) {
    static_assert(sizeof(S) == 4, "half rows are computed in float lanes");
    Native out;
    for (int i = 0; i < N; ++i) out[i] = to_float(p[i]);
    return out;
  }
};

template <class T, class S, int N>
KD_LANES void store(T* p, GenericVec<S, N> a) {
  if constexpr (sizeof(T) == sizeof(S)) {
    memcpy(p, &a.v, sizeof(a.v));
  } else {
    for (int i = 0; i < N; ++i) p[i] = cast<T>(static_cast<S>(a.v[i]));
  }
}

template <class T, class S, int N>
KD_LANES void store_partial(T* p, GenericVec<S, N> a, int64_t n) {
  for (int i = 0; i < N; ++i) {
    if (i < n) p[i] = cast<T>(static_cast<S>(a.v[i]));
  }
}

// 16 bytes at a time: what every x86-64 has. Elsewhere, and for half lanes, a plain store.
template <class T, class S, int N>
KD_LANES void stream(T* p, GenericVec<S, N> a) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == sizeof(S)) {
    __m128i parts[sizeof(a.v) / 16];
    memcpy(parts, &a.v, sizeof(a.v));
    for (size_t i = 0; i < sizeof(a.v) / 16; ++i) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, parts[i]);
    }
    return;
  }
#endif
  store(p, a);
}

template <class T, class S, int N>
KD_LANES void stream2(T* p, GenericVec<S, N> a, GenericVec<S, N> b) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 2 && N == 4) {
    T both[2 * N];
    store(both, a);
    store(both + N, b);
    __m128i packed;
    memcpy(&packed, both, sizeof(packed));
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), packed);
    return;
  }
#endif
  stream(p, a);
  stream(p + N, b);
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
