// AVX-512 (F, BW, VL, DQ): 16 float lanes with mask registers.
#pragma once

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || \
    !defined(__AVX512DQ__)
#error "KDK_ISA=avx512 needs -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
#endif

#include "common/simd_generic.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

using VecD = GenericVec<double, 8>;
using MaskD = VecD::Mask;

struct MaskF {
  __mmask16 m;

  static KD_LANES MaskF first(int64_t n) {
    return {static_cast<__mmask16>((uint32_t{1} << n) - 1)};
  }
};

KD_LANES MaskF operator&(MaskF a, MaskF b) {
  return {static_cast<__mmask16>(a.m & b.m)};
}
KD_LANES MaskF operator|(MaskF a, MaskF b) {
  return {static_cast<__mmask16>(a.m | b.m)};
}
KD_LANES MaskF operator^(MaskF a, MaskF b) {
  return {static_cast<__mmask16>(a.m ^ b.m)};
}
KD_LANES MaskF operator!(MaskF a) {
  return {static_cast<__mmask16>(~a.m)};
}
KD_LANES bool any(MaskF a) {
  return a.m != 0;
}
KD_LANES bool all(MaskF a) {
  return a.m == 0xffff;
}
KD_LANES bool none(MaskF a) {
  return a.m == 0;
}

struct VecF {
  using Scalar = float;
  using Mask = MaskF;
  static constexpr int kLanes = 16;

  __m512 v;

  VecF() = default;
  KD_LANES explicit VecF(__m512 native) : v(native) {}
  KD_LANES VecF(float s) : v(_mm512_set1_ps(s)) {}

  static KD_LANES VecF zero() { return VecF(_mm512_setzero_ps()); }
  static KD_LANES VecF iota() {
    return VecF(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }

  static KD_LANES VecF load(const float* p) { return VecF(_mm512_loadu_ps(p)); }
  static KD_LANES VecF load(const bf16* p) { return widen(p, _mm256_loadu_si256(as_m256(p))); }
  static KD_LANES VecF load(const f16* p) { return widen(p, _mm256_loadu_si256(as_m256(p))); }

  // A masked-off lane is not accessed: no fault, also across a page.
  static KD_LANES VecF load_partial(const float* p, int64_t n, float fill) {
    return VecF(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), MaskF::first(n).m, p));
  }
  template <class T>  // bf16 or f16
  static KD_LANES VecF load_partial(const T* p, int64_t n, float fill) {
    const __mmask16 m = MaskF::first(n).m;
    const VecF x = widen(p, _mm256_maskz_loadu_epi16(m, p));
    return VecF(_mm512_mask_mov_ps(_mm512_set1_ps(fill), m, x.v));
  }

  KD_LANES VecF& operator+=(VecF b) { return v = _mm512_add_ps(v, b.v), *this; }
  KD_LANES VecF& operator-=(VecF b) { return v = _mm512_sub_ps(v, b.v), *this; }
  KD_LANES VecF& operator*=(VecF b) { return v = _mm512_mul_ps(v, b.v), *this; }

 private:
  template <class T>
  static KD_LANES const __m256i* as_m256(const T* p) {
    return reinterpret_cast<const __m256i*>(p);
  }
  static KD_LANES VecF widen(const bf16*, __m256i halves) {
    return VecF(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
  }
  static KD_LANES VecF widen(const f16*, __m256i halves) { return VecF(_mm512_cvtph_ps(halves)); }
};

KD_LANES VecF operator+(VecF a, VecF b) {
  return VecF(_mm512_add_ps(a.v, b.v));
}
KD_LANES VecF operator-(VecF a, VecF b) {
  return VecF(_mm512_sub_ps(a.v, b.v));
}
KD_LANES VecF operator*(VecF a, VecF b) {
  return VecF(_mm512_mul_ps(a.v, b.v));
}
KD_LANES VecF operator/(VecF a, VecF b) {
  return VecF(_mm512_div_ps(a.v, b.v));
}
KD_LANES VecF operator-(VecF a) {
  return VecF(_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f)));
}

KD_LANES MaskF operator<(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
KD_LANES MaskF operator<=(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
}
KD_LANES MaskF operator>(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)};
}
KD_LANES MaskF operator>=(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)};
}
KD_LANES MaskF operator==(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
KD_LANES MaskF operator!=(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)};
}

KD_LANES VecF fma(VecF a, VecF b, VecF c) {
  return VecF(_mm512_fmadd_ps(a.v, b.v, c.v));
}
KD_LANES VecF fms(VecF a, VecF b, VecF c) {
  return VecF(_mm512_fmsub_ps(a.v, b.v, c.v));
}
KD_LANES VecF fnma(VecF a, VecF b, VecF c) {
  return VecF(_mm512_fnmadd_ps(a.v, b.v, c.v));
}
KD_LANES VecF min(VecF a, VecF b) {
  return VecF(_mm512_min_ps(a.v, b.v));
}
KD_LANES VecF max(VecF a, VecF b) {
  return VecF(_mm512_max_ps(a.v, b.v));
}
KD_LANES VecF abs(VecF a) {
  return VecF(_mm512_abs_ps(a.v));
}
KD_LANES VecF sqrt(VecF a) {
  return VecF(_mm512_sqrt_ps(a.v));
}
KD_LANES VecF select(MaskF m, VecF a, VecF b) {
  return VecF(_mm512_mask_mov_ps(b.v, m.m, a.v));
}
KD_LANES MaskF is_nan(VecF a) {
  return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)};
}
// 0x99: quiet NaN, +inf, -inf, signalling NaN.
KD_LANES MaskF is_finite(VecF a) {
  return !MaskF{_mm512_fpclass_ps_mask(a.v, 0x99)};
}

namespace detail {

KD_LANES __m256 low_half(VecF a) {
  return _mm512_castps512_ps256(a.v);
}
KD_LANES __m256 high_half(VecF a) {
  return _mm512_extractf32x8_ps(a.v, 1);
}

// bf16 bits in the low half of each 32-bit lane.
KD_LANES __m512i round_bf16(VecF a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  // A NaN keeps its upper bits and becomes quiet; rounding could carry it into infinity.
  return _mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), is_nan(a).m, upper,
                              _mm512_set1_epi32(0x40));
}

KD_LANES __m256i narrow(const bf16*, VecF a) {
  return _mm512_cvtepi32_epi16(round_bf16(a));
}
KD_LANES __m256i narrow(const f16*, VecF a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

KD_LANES __m512i narrow2(const bf16*, VecF a, VecF b) {
  // The pack works within 128-bit lanes; the permutation puts the quarters in order.
  const __m512i packed = _mm512_packus_epi32(round_bf16(a), round_bf16(b));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed);
}
KD_LANES __m512i narrow2(const f16* p, VecF a, VecF b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(p, a)), narrow(p, b), 1);
}

}  // namespace detail

KD_LANES void store(float* p, VecF a) {
  _mm512_storeu_ps(p, a.v);
}
KD_LANES void store_partial(float* p, VecF a, int64_t n) {
  _mm512_mask_storeu_ps(p, MaskF::first(n).m, a.v);
}
KD_LANES void stream(float* p, VecF a) {
  _mm512_stream_ps(p, a.v);
}
KD_LANES void stream2(float* p, VecF a, VecF b) {
  stream(p, a);
  stream(p + VecF::kLanes, b);
}

template <class T>  // bf16 or f16
KD_LANES void store(T* p, VecF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), detail::narrow(p, a));
}
template <class T>
KD_LANES void store_partial(T* p, VecF a, int64_t n) {
  _mm256_mask_storeu_epi16(p, MaskF::first(n).m, detail::narrow(p, a));
}
template <class T>
KD_LANES void stream(T* p, VecF a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), detail::narrow(p, a));
}
template <class T>
KD_LANES void stream2(T* p, VecF a, VecF b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), detail::narrow2(p, a, b));
}

// Doubles: whole lines instead of the generic 16 bytes.
KD_LANES void stream(double* p, VecD a) {
  _mm512_stream_pd(p, (__m512d)a.v);
}
KD_LANES void stream2(double* p, VecD a, VecD b) {
  stream(p, a);
  stream(p + VecD::kLanes, b);
}

// Lanes i and i + kLanes / 2 of a, as doubles, added.
KD_LANES VecD widen_sum(VecF a) {
  return VecD((VecD::Native)_mm512_add_pd(_mm512_cvtps_pd(detail::low_half(a)),
                                          _mm512_cvtps_pd(detail::high_half(a))));
}

KD_LANES float reduce_add(VecF a) {
  const __m256 x = _mm256_add_ps(detail::low_half(a), detail::high_half(a));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
KD_LANES float reduce_max(VecF a) {
  const __m256 x = _mm256_max_ps(detail::low_half(a), detail::high_half(a));
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
KD_LANES float reduce_min(VecF a) {
  return -reduce_max(-a);
}

namespace detail {

// p * 2^floor(n), rounded once. Infinite n give 0 and inf also where p is a quiet NaN.
KD_LANES VecF scale2(VecF p, VecF n) {
  return VecF(_mm512_scalef_ps(p.v, n.v));
}

// 2^(i / 32)
alignas(64) constexpr float kPowersOfTwo[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f,
    0x1.2387a6p+0f, 0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f,
    0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f,
    0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
    0x1.ea4afap+0f, 0x1.f50766p+0f,
};

// 2^x = 2^(n + f) with n a multiple of 1/32: a table in two registers and a parabola (relative
// error 5.3e-8 on |f| <= 1/64). On Zen 5 17 billion a second, where a polynomial of degree 5
// makes 12. The low bits of x + shift choose the entry; beyond |x| = 2^17 they are wrong, but the
// result is 0 or inf by n alone. Infinities: f is NaN, which scale2 takes by n. fraction(n): x - n.
template <class Fraction>
KD_LANES VecF exp2_by_table(VecF x, const Fraction& fraction) {
  const VecF shift(0x1.8p18f);  // its last bit is 1/32
  const VecF t = x + shift, n = t - shift, f = fraction(n);
  const VecF power(_mm512_permutex2var_ps(_mm512_load_ps(kPowersOfTwo), _mm512_castps_si512(t.v),
                                          _mm512_load_ps(kPowersOfTwo + 16)));
  const VecF p = fma(VecF(0x1.ebfbe0p-3f), f, VecF(0x1.62e584p-1f));
  return scale2(fma(power * f, p, power), n);
}

// a = m 2^e with 3/4 <= m < 3/2. Zero: (1, -inf); infinity: (1, inf); negative: NaN.
KD_LANES VecF split_exponent(VecF a, VecF* e) {
  const __m512 m = _mm512_getmant_ps(a.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  *e = VecF(_mm512_sub_ps(_mm512_getexp_ps(a.v), _mm512_getexp_ps(m)));
  return VecF(m);
}

// 1 / c and log2(c) for the middles c of 32 parts of [1, 2); 1 and 2 themselves for the first and
// the last part, so that a logarithm near 0 keeps its relative accuracy.
alignas(64) constexpr float kReciprocals[32] = {
    0x1.000000p+0f, 0x1.e9131ap-1f, 0x1.dae608p-1f, 0x1.cd8568p-1f, 0x1.c0e070p-1f, 0x1.b4e81cp-1f,
    0x1.a98ef6p-1f, 0x1.9ec8eap-1f, 0x1.948b10p-1f, 0x1.8acb90p-1f, 0x1.818182p-1f, 0x1.78a4c8p-1f,
    0x1.702e06p-1f, 0x1.681682p-1f, 0x1.605816p-1f, 0x1.58ed24p-1f, 0x1.51d07ep-1f, 0x1.4afd6ap-1f,
    0x1.446f86p-1f, 0x1.3e22ccp-1f, 0x1.381382p-1f, 0x1.323e34p-1f, 0x1.2c9fb4p-1f, 0x1.27350cp-1f,
    0x1.21fb78p-1f, 0x1.1cf06ap-1f, 0x1.181182p-1f, 0x1.135c82p-1f, 0x1.0ecf56p-1f, 0x1.0a6810p-1f,
    0x1.0624dep-1f, 0x1.000000p-1f,
};
alignas(64) constexpr float kLogarithms[32] = {
    0x0.000000p+0f, 0x1.0eb392p-4f, 0x1.bc841cp-4f, 0x1.32aea2p-3f, 0x1.84c2bep-3f, 0x1.d49ee0p-3f,
    0x1.11307ep-2f, 0x1.37124ap-2f, 0x1.5c01a2p-2f, 0x1.800a5ap-2f, 0x1.a3375ep-2f, 0x1.c592fcp-2f,
    0x1.e726aap-2f, 0x1.03fda8p-1f, 0x1.140ca0p-1f, 0x1.23c41cp-1f, 0x1.3327c8p-1f, 0x1.423b08p-1f,
    0x1.51011ap-1f, 0x1.5f7cfep-1f, 0x1.6db194p-1f, 0x1.7ba192p-1f, 0x1.894f76p-1f, 0x1.96bdacp-1f,
    0x1.a3ee80p-1f, 0x1.b0e414p-1f, 0x1.bda070p-1f, 0x1.ca258cp-1f, 0x1.d67540p-1f, 0x1.e29144p-1f,
    0x1.ee7b44p-1f, 0x1.000000p+0f,
};

// log2(x) with an absolute error of 5e-8 and a relative one of 2e-7 beside the result's rounding:
// the upper five bits of the mantissa m choose c, and log2(m / c) is a polynomial of degree 4 on
// -1/64 <= m / c - 1 <= 1/32.
KD_LANES VecF log2_by_table(VecF x) {
  const __m512 m = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_nan);
  const __m512i part = _mm512_srli_epi32(_mm512_castps_si512(m), 18);
  const VecF reciprocal(_mm512_permutex2var_ps(_mm512_load_ps(kReciprocals), part,
                                               _mm512_load_ps(kReciprocals + 16)));
  const VecF log2_c(
      _mm512_permutex2var_ps(_mm512_load_ps(kLogarithms), part, _mm512_load_ps(kLogarithms + 16)));
  const VecF r = fms(VecF(m), reciprocal, VecF(1.0f));
  VecF p = fma(VecF(-0x1.6bba2ap-2f), r, VecF(0x1.ec9024p-2f));
  p = fma(p, r, VecF(-0x1.715488p-1f));
  p = fma(p, r, VecF(0x1.715476p+0f));
  return fma(p, r, VecF(_mm512_getexp_ps(x.v)) + log2_c);
}

}  // namespace detail

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
