// CUDA: one block a row, each thread a contiguous stretch of the order. A stretch is one
// log-sum-exp from behind and one affine map P -> A P + B from the front, so that two short scans
// over the threads join the stretches.
#include "common/launch.h"
#include "common/reduce.cuh"
#include "relation/plackett_luce_check.h"

namespace kd::cuda {
namespace {

constexpr int kThreads = 256;

struct PlackettLuceCall {
  const void *scores, *weights;
  const int64_t* order;
  void* gradient;
  double *value, *suffix;
  int64_t score_stride, order_stride, weight_stride, gradient_stride, value_stride;
  int64_t width, count;
};

// ---- kernels -----------------------------------------------------------------------------------

// Rows: one block each. Threads: kThreads. An id out of range makes the row NaN, gradient zero.
template <class T, class F>
__global__ void __launch_bounds__(kThreads) plackett_luce_row_kernel(PlackettLuceCall call) {
  const int64_t row = blockIdx.x;
  const T* scores = static_cast<const T*>(call.scores) + row * call.score_stride;
  const int64_t* order = call.order + row * call.order_stride;
  const F* weights =
      call.weights ? static_cast<const F*>(call.weights) + row * call.weight_stride : nullptr;
  double* suffix = call.suffix ? call.suffix + row * call.count : nullptr;
  const int64_t length = (call.count + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * length < call.count ? threadIdx.x * length : call.count;
  const int64_t end = begin + length < call.count ? begin + length : call.count;
  const auto weight_of = [&](int64_t k) { return weights ? static_cast<double>(weights[k]) : 1.0; };
  const auto score_of = [&](int64_t k) { return static_cast<double>(to_float(scores[order[k]])); };

  double bad = 0;
  for (int64_t k = begin; k < end; ++k) bad += order[k] < 0 || order[k] >= call.width ? 1 : 0;
  bad = block_sum(bad);
  if (bad > 0) {
    if (threadIdx.x == 0) call.value[row * call.value_stride] = kInfinity - kInfinity;
    return;
  }

  SuffixLse own;
  for (int64_t k = end - 1; k >= begin; --k) own.push(score_of(k));
  using Slots = double[kThreads];
  KD_SHARED(Slots, first);
  KD_SHARED(Slots, second);
  first[threadIdx.x] = own.lse;
  __syncthreads();
  SuffixLse running;  // of everything behind this stretch
  for (int t = kThreads - 1; t > static_cast<int>(threadIdx.x); --t) running.push(first[t]);
  __syncthreads();

  const double behind = running.lse;
  double value = 0, entering = 0;
  for (int64_t k = end - 1; k >= begin; --k) {
    const double score = score_of(k), weight = weight_of(k);
    running.push(score);
    if (weight != 0) value += weight * (running.lse - score);
    if (suffix) suffix[k] = running.lse;
    if (behind != -kInfinity) entering += weight * exp(behind - running.lse);
  }
  value = block_sum(value);
  if (threadIdx.x == 0) call.value[row * call.value_stride] = value;
  if (!call.gradient) return;

  // P after this stretch = first * (P before) + second; behind = -inf: nobody asks.
  first[threadIdx.x] = begin == end ? 1.0 : behind == -kInfinity ? 0.0 : exp(behind - running.lse);
  second[threadIdx.x] = entering;
  __syncthreads();
  double prefix = 0;
  for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) prefix = prefix * first[t] + second[t];
  F* gradient = static_cast<F*>(call.gradient) + row * call.gradient_stride;
  for (int64_t k = begin; k < end; ++k) {
    const double score = score_of(k), weight = weight_of(k), here = suffix[k];
    prefix += weight;
    const double chance = score == -kInfinity ? 0.0 : exp(score - here);
    gradient[order[k]] = static_cast<F>(prefix * chance - weight);
    const double next = k + 1 < end ? suffix[k + 1] : behind;
    prefix *= here == -kInfinity ? 1.0 : exp(next - here);
  }
}

}  // namespace

// ---- entry points ------------------------------------------------------------------------------

void plackett_luce(const PlackettLuceArgs& a) {
  check_plackett_luce(a);
  PlackettLuceCall call;
  call.scores = a.scores.data, call.weights = a.weights ? a.weights.data : nullptr;
  call.order = a.order.as<const int64_t>();
  call.gradient = a.gradient ? a.gradient.data : nullptr;
  call.value = a.value.as<double>();
  call.suffix = nullptr;
  if (a.gradient) {
    KD_CHECK(a.suffix.size() == a.order.size() && a.suffix.dtype == DType::kFloat64,
             "suffix: expected a float64 workspace of the order's size, got ",
             shape_text(a.suffix));
    call.suffix = a.suffix.as<double>();
  }
  call.score_stride = a.scores.stride[0], call.order_stride = a.order.stride[0];
  call.weight_stride = a.weights ? a.weights.stride[0] : 0;
  call.gradient_stride = a.gradient ? a.gradient.stride[0] : 0;
  call.value_stride = a.value.stride[0];
  call.width = a.scores.shape[1], call.count = a.order.shape[1];
  if (a.scores.shape[0] == 0) return;
  DeviceGuard guard(a.scores.device_index);
  LaunchInfo info{"plackett_luce_row",
                  dim3(static_cast<unsigned>(a.scores.shape[0])),
                  dim3(kThreads),
                  0,
                  static_cast<Stream>(a.stream),
                  "N=" + std::to_string(a.scores.shape[0]) + ", K=" + std::to_string(call.count)};
  dispatch_half_float(a.scores.dtype == DType::kFloat64 ? DType::kFloat32 : a.scores.dtype,
                      "student", [&](auto zero) {
                        using T = decltype(zero);
                        if (a.scores.dtype == DType::kFloat64) {
                          launch(info, plackett_luce_row_kernel<double, double>, call);
                        } else {
                          launch(info, plackett_luce_row_kernel<T, float>, call);
                        }
                      });
}

}  // namespace kd::cuda
