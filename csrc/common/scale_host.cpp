#include <algorithm>

#include "common/check.h"
#include "common/parallel.h"
#include "common/scale.h"

namespace kd::cpu {

void scale(const View& tensor, const View& factor) {
  const bool wide = tensor.dtype == DType::kFloat64;
  KD_CHECK(wide || tensor.dtype == DType::kFloat32 || tensor.dtype == DType::kFloat16 ||
               tensor.dtype == DType::kBFloat16,
           "tensor: expected a floating dtype, got ", name(tensor.dtype));
  KD_CHECK(tensor.device == Device::kCpu && factor.device == Device::kCpu,
           "tensor, factor: expected tensors on cpu");
  KD_CHECK(factor.size() == 1, "factor: expected a single number, got shape ", shape_text(factor));
  check_dtype(factor, "factor", wide ? DType::kFloat64 : DType::kFloat32);
  const double by = wide ? *factor.as<double>() : *factor.as<float>();
  if (by == 1 || tensor.size() == 0) return;

  // The trailing dimensions that lie without gaps are one run of entries; the others are counted.
  int64_t run = 1;
  int outer = tensor.ndim;
  while (outer > 0 && (tensor.shape[outer - 1] == 1 || tensor.stride[outer - 1] == run)) {
    run *= tensor.shape[--outer];
  }
  const int64_t runs = tensor.size() / run;
  const int64_t bytes = wide ? 8 : tensor.dtype == DType::kFloat32 ? 4 : 2;
  const auto kernel = KD_PICK_ISA(scale_entries);
  constexpr int64_t kGrain = int64_t{1} << 16;
  if (outer == 0) {
    parallel_for(0, run, kGrain, [&](int64_t begin, int64_t end) {
      kernel(tensor.as<char>() + begin * bytes, tensor.dtype, end - begin, by);
    });
    return;
  }
  parallel_for(0, runs, std::max<int64_t>(1, kGrain / run), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t offset = 0, rest = i;
      for (int d = outer - 1; d >= 0; --d) {
        offset += rest % tensor.shape[d] * tensor.stride[d];
        rest /= tensor.shape[d];
      }
      kernel(tensor.as<char>() + offset * bytes, tensor.dtype, run, by);
    }
  });
}

void stream_2r1w(const View& dst, const View& a, const View& b) {
  for (const View* view : {&dst, &a, &b}) {
    KD_CHECK(view->ndim == 1 && view->stride[0] == 1 && view->size() == dst.size() &&
                 view->dtype == DType::kFloat32 && view->device == Device::kCpu,
             "dst, a, b: expected contiguous float32 vectors of one size on cpu");
  }
  const auto kernel = KD_PICK_ISA(add_entries);
  parallel_for(0, dst.size(), int64_t{1} << 16, [&](int64_t begin, int64_t end) {
    kernel(dst.as<float>() + begin, a.as<float>() + begin, b.as<float>() + begin, end - begin);
  });
}

}  // namespace kd::cpu
