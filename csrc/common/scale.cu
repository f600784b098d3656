// tensor *= factor, with the factor on the device: no synchronisation, so a CUDA graph can hold it.
#include <algorithm>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/scale.h"
#include "common/vec.h"

namespace kd::cuda {
namespace {

constexpr int kChunk = 8;
constexpr int kThreads = 256;

// ---- kernel ------------------------------------------------------------------------------------

// Rows by blockIdx.y, chunks of a row by blockIdx.x. The usual factor is 1: then this is one cached
// load a thread.
template <class T, class S>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(T* tensor, int64_t rows, int64_t columns, int64_t stride, const S* factor) {
  using F = compute_t<T>;
  const F by = static_cast<F>(*factor);
  if (by == F(1)) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    T* start = tensor + row * stride;
    const RowChunks<kChunk> chunks(columns, start);
    for (int64_t c = blockIdx.x * int64_t{kThreads} + threadIdx.x; c < chunks.count();
         c += int64_t{kThreads} * gridDim.x) {
      F x[kChunk];
      chunks.load(start, c, F(0), x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] *= by;
      chunks.store(start, c, x);
    }
  }
}

// ---- launcher ----------------------------------------------------------------------------------

template <class T, class S>
void launch_scale(T* tensor, int64_t rows, int64_t columns, int64_t stride, const S* factor,
                  void* stream) {
  constexpr int64_t kPerBlock = int64_t{kThreads} * kChunk;
  // One chunk more: a misaligned row begins in the middle of one.
  const int64_t across = (columns + kChunk + kPerBlock - 1) / kPerBlock;
  const int64_t enough = int64_t{32} * simt::multiprocessor_count();
  const dim3 grid(static_cast<unsigned>(std::min(across, enough)),
                  static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
  launch({"scale", grid, dim3(kThreads), 0, static_cast<Stream>(stream),
          "N=" + std::to_string(rows) + ", V=" + std::to_string(columns)},
         scale_kernel<T, S>, tensor, rows, columns, stride, factor);
}

}  // namespace

// ---- entry point -------------------------------------------------------------------------------

void scale(const View& tensor, const View& factor, void* stream) {
  KD_CHECK(tensor.ndim >= 0 && tensor.ndim <= 2, "tensor: expected up to 2 dimensions, got shape ",
           shape_text(tensor));
  KD_CHECK(factor.size() == 1, "factor: expected one number, got shape ", shape_text(factor));
  KD_CHECK(factor.dtype == DType::kFloat32 || factor.dtype == DType::kFloat64,
           "factor: expected float32 or float64, got ", name(factor.dtype));
  KD_CHECK(factor.device == tensor.device && factor.device_index == tensor.device_index,
           "factor: expected a number on ", name(tensor.device), ':', tensor.device_index, ", got ",
           name(factor.device), ':', factor.device_index);
  int64_t rows = tensor.ndim == 2 ? tensor.shape[0] : 1;
  int64_t columns = tensor.ndim >= 1 ? tensor.shape[tensor.ndim - 1] : 1;
  const int64_t stride = tensor.ndim == 2 ? tensor.stride[0] : 0;
  KD_CHECK(tensor.ndim == 0 || columns <= 1 || tensor.stride[tensor.ndim - 1] == 1,
           "tensor: the last dimension must be contiguous, got stride ",
           tensor.stride[std::max(tensor.ndim - 1, 0)]);
  KD_CHECK(rows <= 1 || stride >= columns, "tensor: rows overlap, stride ", stride, " for ",
           columns, " columns");
  if (tensor.size() == 0) return;
  if (stride == columns) {
    columns *= rows;
    rows = 1;
  }
  const DeviceGuard guard(tensor.device_index);
  dispatch_float(tensor.dtype, "tensor", [&](auto tag) {
    using T = decltype(tag);
    if (factor.dtype == DType::kFloat64) {
      launch_scale(tensor.as<T>(), rows, columns, stride, factor.as<double>(), stream);
    } else {
      launch_scale(tensor.as<T>(), rows, columns, stride, factor.as<float>(), stream);
    }
  });
}

}  // namespace kd::cuda
