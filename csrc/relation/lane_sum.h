// What the row loops of this family share: vectors at the end of a row, and sums over a row.
#pragma once

#include "common/simd.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

// n valid lanes at p; the others are 0.
template <class V, class T>
KD_LANES V load_lanes(const T* p, int64_t n) {
  using S = typename V::Scalar;
  return n == V::kLanes ? V::load(p) : V::load_partial(p, n, S(0));
}
template <class V, class T>
KD_LANES void store_lanes(T* p, V v, int64_t n) {
  if (n == V::kLanes) {
    store(p, v);
  } else {
    store_partial(p, v, n);
  }
}

// A sum over a row: lanes within a block of columns, a double over the blocks.
template <class V>
struct Sum {
  V block = V::zero();
  double total = 0;
  KD_LANES void add(V x) { block += x; }
  KD_LANES void flush() { total += reduce_add_double(block), block = V::zero(); }
};

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
