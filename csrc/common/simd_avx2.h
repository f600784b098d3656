// AVX2 with FMA and F16C: 8 float lanes, masks as full vectors.
#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "KDK_ISA=avx2 needs -mavx2 -mfma -mf16c"
#endif

#include "common/simd_generic.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

using VecD = GenericVec<double, 4>;
using MaskD = VecD::Mask;

struct MaskF {
  __m256 m;  // all bits or none, a lane

  static KD_LANES MaskF first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {
        _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), lane))};
  }
};

KD_LANES MaskF operator&(MaskF a, MaskF b) {
  return {_mm256_and_ps(a.m, b.m)};
}
KD_LANES MaskF operator|(MaskF a, MaskF b) {
  return {_mm256_or_ps(a.m, b.m)};
}
KD_LANES MaskF operator^(MaskF a, MaskF b) {
  return {_mm256_xor_ps(a.m, b.m)};
}
KD_LANES MaskF operator!(MaskF a) {
  return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
KD_LANES bool any(MaskF a) {
  return _mm256_movemask_ps(a.m) != 0;
}
KD_LANES bool all(MaskF a) {
  return _mm256_movemask_ps(a.m) == 0xff;
}
KD_LANES bool none(MaskF a) {
  return _mm256_movemask_ps(a.m) == 0;
}

struct VecF {
  using Scalar = float;
  using Mask = MaskF;
  static constexpr int kLanes = 8;

  __m256 v;

  VecF() = default;
  KD_LANES explicit VecF(__m256 native) : v(native) {}
  KD_LANES VecF(float s) : v(_mm256_set1_ps(s)) {}

  static KD_LANES VecF zero() { return VecF(_mm256_setzero_ps()); }
  static KD_LANES VecF iota() { return VecF(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)); }

  static KD_LANES VecF load(const float* p) { return VecF(_mm256_loadu_ps(p)); }
  static KD_LANES VecF load(const bf16* p) { return widen(p, load128(p)); }
  static KD_LANES VecF load(const f16* p) { return widen(p, load128(p)); }

  // A masked-off lane is not accessed: no fault, also across a page.
  static KD_LANES VecF load_partial(const float* p, int64_t n, float fill) {
    const __m256 m = MaskF::first(n).m;
    const __m256 x = _mm256_maskload_ps(p, _mm256_castps_si256(m));
    return VecF(_mm256_blendv_ps(_mm256_set1_ps(fill), x, m));
  }
  // There is no masked load of 16-bit elements: the tail passes through the stack.
  template <class T>  // bf16 or f16
  static KD_LANES VecF load_partial(const T* p, int64_t n, float fill) {
    alignas(16) T buffer[kLanes] = {};
    for (int i = 0; i < kLanes; ++i) {
      if (i < n) buffer[i] = p[i];
    }
    return VecF(_mm256_blendv_ps(_mm256_set1_ps(fill), load(buffer).v, MaskF::first(n).m));
  }

  KD_LANES VecF& operator+=(VecF b) { return v = _mm256_add_ps(v, b.v), *this; }
  KD_LANES VecF& operator-=(VecF b) { return v = _mm256_sub_ps(v, b.v), *this; }
  KD_LANES VecF& operator*=(VecF b) { return v = _mm256_mul_ps(v, b.v), *this; }

 private:
  template <class T>
  static KD_LANES __m128i load128(const T* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static KD_LANES VecF widen(const bf16*, __m128i halves) {
    return VecF(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
  }
  static KD_LANES VecF widen(const f16*, __m128i halves) { return VecF(_mm256_cvtph_ps(halves)); }
};

KD_LANES VecF operator+(VecF a, VecF b) {
  return VecF(_mm256_add_ps(a.v, b.v));
}
KD_LANES VecF operator-(VecF a, VecF b) {
  return VecF(_mm256_sub_ps(a.v, b.v));
}
KD_LANES VecF operator*(VecF a, VecF b) {
  return VecF(_mm256_mul_ps(a.v, b.v));
}
KD_LANES VecF operator/(VecF a, VecF b) {
  return VecF(_mm256_div_ps(a.v, b.v));
}
KD_LANES VecF operator-(VecF a) {
  return VecF(_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)));
}

KD_LANES MaskF operator<(VecF a, VecF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)};
}
KD_LANES MaskF operator<=(VecF a, VecF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)};
}
KD_LANES MaskF operator>(VecF a, VecF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)};
}
KD_LANES MaskF operator>=(VecF a, VecF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)};
}
KD_LANES MaskF operator==(VecF a, VecF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)};
}
KD_LANES MaskF operator!=(VecF a, VecF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)};
}

KD_LANES VecF fma(VecF a, VecF b, VecF c) {
  return VecF(_mm256_fmadd_ps(a.v, b.v, c.v));
}
KD_LANES VecF fms(VecF a, VecF b, VecF c) {
  return VecF(_mm256_fmsub_ps(a.v, b.v, c.v));
}
KD_LANES VecF fnma(VecF a, VecF b, VecF c) {
  return VecF(_mm256_fnmadd_ps(a.v, b.v, c.v));
}
KD_LANES VecF min(VecF a, VecF b) {
  return VecF(_mm256_min_ps(a.v, b.v));
}
KD_LANES VecF max(VecF a, VecF b) {
  return VecF(_mm256_max_ps(a.v, b.v));
}
KD_LANES VecF abs(VecF a) {
  return VecF(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v));
}
KD_LANES VecF sqrt(VecF a) {
  return VecF(_mm256_sqrt_ps(a.v));
}
KD_LANES VecF select(MaskF m, VecF a, VecF b) {
  return VecF(_mm256_blendv_ps(b.v, a.v, m.m));
}
KD_LANES MaskF is_nan(VecF a) {
  return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)};
}
KD_LANES MaskF is_finite(VecF a) {
  return abs(a) < VecF(__builtin_inff());
}

namespace detail {

KD_LANES __m128 low_half(VecF a) {
  return _mm256_castps256_ps128(a.v);
}
KD_LANES __m128 high_half(VecF a) {
  return _mm256_extractf128_ps(a.v, 1);
}

// bf16 bits in the low half of each 32-bit lane.
KD_LANES __m256i round_bf16(VecF a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  // A NaN keeps its upper bits and becomes quiet; rounding could carry it into infinity.
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, _mm256_castps_si256(is_nan(a).m));
}

KD_LANES __m256i narrow2(const bf16*, VecF a, VecF b) {
  // The pack works within 128-bit lanes; the permutation puts the quarters in order.
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(a), round_bf16(b)), 0xd8);
}
KD_LANES __m128i narrow(const bf16*, VecF a) {
  const __m256i bits = round_bf16(a);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
KD_LANES __m128i narrow(const f16*, VecF a) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
KD_LANES __m256i narrow2(const f16* p, VecF a, VecF b) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(narrow(p, a)), narrow(p, b), 1);
}

}  // namespace detail

KD_LANES void store(float* p, VecF a) {
  _mm256_storeu_ps(p, a.v);
}
KD_LANES void store_partial(float* p, VecF a, int64_t n) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(MaskF::first(n).m), a.v);
}
KD_LANES void stream(float* p, VecF a) {
  _mm256_stream_ps(p, a.v);
}
KD_LANES void stream2(float* p, VecF a, VecF b) {
  stream(p, a);
  stream(p + VecF::kLanes, b);
}

template <class T>  // bf16 or f16
KD_LANES void store(T* p, VecF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), detail::narrow(p, a));
}
template <class T>
KD_LANES void store_partial(T* p, VecF a, int64_t n) {
  T buffer[VecF::kLanes];
  store(buffer, a);
  for (int i = 0; i < VecF::kLanes; ++i) {
    if (i < n) p[i] = buffer[i];
  }
}
template <class T>
KD_LANES void stream(T* p, VecF a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), detail::narrow(p, a));
}
template <class T>
KD_LANES void stream2(T* p, VecF a, VecF b) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), detail::narrow2(p, a, b));
}

// Lanes i and i + kLanes / 2 of a, as doubles, added.
KD_LANES VecD widen_sum(VecF a) {
  return VecD((VecD::Native)_mm256_add_pd(_mm256_cvtps_pd(detail::low_half(a)),
                                          _mm256_cvtps_pd(detail::high_half(a))));
}

KD_LANES float reduce_add(VecF a) {
  __m128 x = _mm_add_ps(detail::low_half(a), detail::high_half(a));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
KD_LANES float reduce_max(VecF a) {
  __m128 x = _mm_max_ps(detail::low_half(a), detail::high_half(a));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
KD_LANES float reduce_min(VecF a) {
  return -reduce_max(-a);
}

namespace detail {

KD_LANES VecF floor_small(VecF a) {
  return VecF(_mm256_floor_ps(a.v));
}

// 2^n for an integer -127 <= n <= 128; 0 and +inf at the two ends.
KD_LANES VecF power_of_two(VecF n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return VecF(_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

// p * 2^n where 1 <= p < 2 and n is an integer in [-127, 0], by adding to the exponent.
KD_LANES VecF add_exponent(VecF p, VecF n) {
  return VecF(_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23))));
}

// p * 2^n for an integer |n| < 250, rounded once: two factors reach the subnormals and beyond.
KD_LANES VecF scale2(VecF p, VecF n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return p * VecF(_mm256_castsi256_ps(first)) * VecF(_mm256_castsi256_ps(second));
}

// a = m 2^e with 3/4 <= m < 3/2, for positive finite a.
KD_LANES VecF split_exponent(VecF a, VecF* e) {
  const MaskF subnormal = a < VecF(0x1p-126f);
  const __m256i bits = _mm256_castps_si256(select(subnormal, a * VecF(0x1p23f), a).v);
  const __m256i exponent =
      _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000)), 23);
  *e = VecF(_mm256_cvtepi32_ps(exponent)) - select(subnormal, VecF(23.0f), VecF::zero());
  return VecF(_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23))));
}

}  // namespace detail

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
