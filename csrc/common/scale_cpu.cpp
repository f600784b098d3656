// Loops of scale.h, compiled once per CPU ISA.
#include "common/scale.h"
#include "common/simd.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

template <class T>
void scale_typed(T* p, int64_t n, double factor) {
  using V = Lanes<T>;
  const V by(static_cast<compute_t<T>>(factor));
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) store(p + i, V::load(p + i) * by);
  if (i < n) {
    const compute_t<T> zero = 0;
    store_partial(p + i, V::load_partial(p + i, n - i, zero) * by, n - i);
  }
}

}  // namespace

void scale_entries(void* data, DType dtype, int64_t n, double factor) {
  switch (dtype) {
    case DType::kFloat64:
      return scale_typed(static_cast<double*>(data), n, factor);
    case DType::kFloat16:
      return scale_typed(static_cast<f16*>(data), n, factor);
    case DType::kBFloat16:
      return scale_typed(static_cast<bf16*>(data), n, factor);
    default:
      return scale_typed(static_cast<float*>(data), n, factor);
  }
}

void add_entries(float* dst, const float* a, const float* b, int64_t n) {
  constexpr int64_t kStep = 64 / sizeof(float);
  int64_t i = 0;
  for (; i < n && !is_aligned(dst + i); ++i) dst[i] = a[i] + b[i];
  for (; i + kStep <= n; i += kStep) {
    prefetch(reinterpret_cast<const char*>(a + i) + 4096);
    prefetch(reinterpret_cast<const char*>(b + i) + 4096);
    for (int64_t j = i; j < i + kStep; j += VecF::kLanes) {
      stream(dst + j, VecF::load(a + j) + VecF::load(b + j));
    }
  }
  for (; i < n; ++i) dst[i] = a[i] + b[i];
  stream_fence();
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
