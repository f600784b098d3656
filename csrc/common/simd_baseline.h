// Baseline: 4 float lanes and 2 double lanes, which every x86-64 (SSE2) and every AArch64 (NEON)
// has.
#pragma once

#include "common/simd_generic.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

using VecF = GenericVec<float, 4>;
using MaskF = VecF::Mask;
using VecD = GenericVec<double, 2>;
using MaskD = VecD::Mask;

// Lanes i and i + kLanes / 2 of a, as doubles, added.
KD_LANES VecD widen_sum(VecF a) {
  VecD out;
  for (int i = 0; i < 2; ++i) {
    out.v[i] = static_cast<double>(a.v[i]) + static_cast<double>(a.v[i + 2]);
  }
  return out;
}

namespace detail {

// Largest integer <= a, for |a| < 2^30.
KD_LANES VecF floor_small(VecF a) {
  const VecF truncated(
      __builtin_convertvector(__builtin_convertvector(a.v, VecF::NativeInt), VecF::Native));
  return truncated - select(truncated > a, VecF(1.0f), VecF::zero());
}

// 2^n for an integer -127 <= n <= 128; 0 and +inf at the two ends.
KD_LANES VecF power_of_two(VecF n) {
  return VecF::from_bits((__builtin_convertvector(n.v, VecF::NativeInt) + 127) << 23);
}

// p * 2^n where 1 <= p < 2 and n is an integer in [-127, 0], by adding to the exponent.
KD_LANES VecF add_exponent(VecF p, VecF n) {
  return VecF::from_bits(p.bits() + (__builtin_convertvector(n.v, VecF::NativeInt) << 23));
}

// p * 2^n for an integer |n| < 250, rounded once: two factors reach the subnormals and beyond.
KD_LANES VecF scale2(VecF p, VecF n) {
  const VecF::NativeInt whole = __builtin_convertvector(n.v, VecF::NativeInt);
  const VecF::NativeInt half = whole >> 1;
  return p * VecF::from_bits((half + 127) << 23) * VecF::from_bits((whole - half + 127) << 23);
}

// a = m 2^e with 3/4 <= m < 3/2, for positive finite a.
KD_LANES VecF split_exponent(VecF a, VecF* e) {
  const MaskF subnormal = a < VecF(0x1p-126f);
  // Unsigned: the bits of a negative number, for which no answer is needed, may wrap around.
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  const Unsigned bits = (Unsigned)select(subnormal, a * VecF(0x1p23f), a).bits();
  const VecF::NativeInt exponent = (VecF::NativeInt)(bits - 0x3f400000u) >> 23;
  *e = VecF(__builtin_convertvector(exponent, VecF::Native)) -
       select(subnormal, VecF(23.0f), VecF::zero());
  return VecF::from_bits((VecF::NativeInt)(bits - ((Unsigned)exponent << 23)));
}

}  // namespace detail

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
