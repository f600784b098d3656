// A loop over the columns of a row in vectors, for sources compiled once per ISA:
// for_lanes<V>(count, KD_BODY { .. at.load(p, fill) .. at.save(p, v) .. }) runs the body on whole
// vectors, then on one partial one; `at` knows which.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

template <class V>
struct Whole {
  int64_t j;
  KD_LANES V load(const typename V::Scalar* p, typename V::Scalar) const { return V::load(p + j); }
  KD_LANES void save(typename V::Scalar* p, V v) const { store(p + j, v); }
  // Lanes that do not exist must not reach a maximum or a sum.
  KD_LANES V keep(V v, typename V::Scalar) const { return v; }
};

template <class V>
struct Tail {
  int64_t j, n;
  KD_LANES V load(const typename V::Scalar* p, typename V::Scalar fill) const {
    return V::load_partial(p + j, n, fill);
  }
  KD_LANES void save(typename V::Scalar* p, V v) const { store_partial(p + j, v, n); }
  KD_LANES V keep(V v, typename V::Scalar fill) const {
    return select(V::Mask::first(n), v, V(fill));
  }
};

template <class V, class Body>
KD_LANES void for_lanes(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + V::kLanes <= count; j += V::kLanes) body(Whole<V>{j});
  if (j < count) body(Tail<V>{j, count - j});
}

#define KD_BODY [&](auto at) __attribute__((always_inline))

}  // namespace
}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
