// token_stats and label_log_probs on the GPU (and, compiled for the host, in the emulator): a block
// a row, rows beyond the grid in strides.
//
//   normalise  one read: largest entries, their ids, sums of exponentials
//   pair       a second read: every sum
//   gradient   (labels) a second read beside the write
#include <algorithm>

#include "common/dispatch.h"
#include "common/reduce.cuh"
#include "divergence/divergence_rows.cuh"
#include "divergence/token_stats_check.h"
#include "divergence/token_stats_math.h"

namespace kd::cuda {
namespace {

// The largest logit of a row, the lowest of its ids, and the sum of exponentials about it.
template <class F>
struct Normaliser {
  LogitSums<F, 1> sums;
  int64_t at;

  KD_HOST_DEVICE Normaliser() : at(0) {}

  KD_HOST_DEVICE void merge(const Normaliser& other) {
    const bool tie = other.sums.max == sums.max && other.at < at;
    if (other.sums.max > sums.max || tie) at = other.at;
    sums.merge(other.sums);
  }

  KD_DEVICE void push(const F (&x)[kChunk], int64_t begin) {
    F top = x[0];
    int id = 0;
#pragma unroll
    for (int i = 1; i < kChunk; ++i) {
      id = x[i] > top ? i : id;
      top = x[i] > top ? x[i] : top;
    }
    // NaN never raises; it arrives in the sums. What lies before the row's start is -inf.
    if (top > sums.max) {
      sums.raise(top);
      at = begin + id;
    }
    const F reference = sums.reference();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums.add(exp2((x[i] - reference) * sums.scale));
  }
};

template <class F>
struct BothNormalisers {
  Normaliser<F> student, teacher;

  KD_HOST_DEVICE void merge(const BothNormalisers& other) {
    student.merge(other.student);
    teacher.merge(other.teacher);
  }
};

template <class F>
struct BlockSums {
  PairSums<F> pair;

  KD_HOST_DEVICE void merge(const BlockSums& other) {
    pair.each(other.pair, [](F& mine, F theirs) { mine += theirs; });
  }
};

template <class F>
struct StatsParams {
  RowParams<F> rows;
  float* numbers;  // (kTokenNumbers, N)
  int64_t stride;
  int64_t* ids;  // (2, N)
  int64_t id_stride;
  int64_t ignore_index;
};

template <class F>
KD_DEVICE bool is_selected(const RowParams<F>& params, int64_t row, int64_t ignore_index) {
  return (params.mask == nullptr || params.mask[row * params.mask_stride]) &&
         (params.labels == nullptr || params.labels[row * params.labels_stride] != ignore_index);
}

template <class F>
KD_DEVICE bool is_temperature(F tau) {
  return tau > F(0) && tau < F(kInfinity);
}

// ---- statistics --------------------------------------------------------------------------------

template <class Pair, class F>
KD_DEVICE BothNormalisers<F> normalise(const Pair& pair, F student_tau, F teacher_tau) {
  BothNormalisers<F> both;
  both.student.sums.scale = F(kLog2E) / student_tau;
  both.teacher.sums.scale = F(kLog2E) / teacher_tau;
  for (int64_t c = threadIdx.x; c < pair.count(); c += blockDim.x) {
    F z[kChunk], a[kChunk];
    pair.load(c, z, a);
    both.student.push(z, pair.begin(c));
    both.teacher.push(a, pair.begin(c));
  }
  return block_reduce(both);
}

template <class Pair, class F>
KD_DEVICE PairSums<F> pair_sums(const Pair& pair, const RowSoftmax<F>& softmax) {
  BlockSums<F> sums;
  for (int64_t c = threadIdx.x; c < pair.count(); c += blockDim.x) {
    F z[kChunk], a[kChunk];
    pair.load(c, z, a);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums.pair.add(softmax.entry(z[i], a[i]));
  }
  return block_reduce(sums).pair;
}

template <class F>
struct Output {
  float* numbers;
  int64_t stride;
  int64_t* ids;
  int64_t id_stride;

  KD_DEVICE void put(int field, F number) const {
    numbers[field * stride] = static_cast<float>(number);
  }
  KD_DEVICE void fill(float number) const {
    for (int i = 0; i < kTokenNumbers; ++i) numbers[i * stride] = number;
    ids[0] = ids[id_stride] = 0;
  }
  // What one side has for itself.
  KD_DEVICE void put_side(int side, const Softmax<F>& softmax, F tau, const Normaliser<F>& row,
                          bool labelled, F label_logit) const {
    const bool empty = softmax.is_empty();
    put(kStudentLse + side,
        empty ? F(-kInfinity) : fma(F(kLn2), softmax.log2_sum, softmax.reference / tau));
    put(kStudentMaxLogit + side, row.sums.max);
    put(kStudentMaxProb + side, softmax.inverse);
    const F log_prob = F(kLn2) * (softmax.exponent(label_logit) - softmax.log2_sum);
    put(kStudentLabelLogProb + side, !labelled ? F(0) : empty ? F(-kInfinity) : log_prob);
    ids[side * id_stride] = row.at;
  }
};

template <class T, class F>
KD_DEVICE void stats_row(const StatsParams<F>& params, int64_t row) {
  const RowParams<F>& rows = params.rows;
  const Output<F> out{params.numbers + row, params.stride, params.ids + row, params.id_stride};
  const F tau_s = rows.student_temperature.at(row);
  const F tau_t = rows.teacher.data ? rows.teacher_temperature.at(row) : tau_s;
  const bool labelled = rows.labels != nullptr;
  const int64_t label = labelled ? rows.labels[row * rows.labels_stride] : 0;
  const bool selected = is_selected(rows, row, params.ignore_index);
  const bool valid = is_temperature(tau_s) && is_temperature(tau_t) &&
                     (!labelled || (label >= 0 && label < rows.valid_student));
  if (!selected || !valid) {
    if (threadIdx.x == 0) out.fill(selected ? NAN : 0.0f);
    return;
  }
  const RowPair<T, F> pair(rows, row);
  const BothNormalisers<F> both = normalise(pair, tau_s, tau_t);
  const RowSoftmax<F> softmax(Softmax<F>(tau_s, both.student.sums.max, both.student.sums.sum[0]),
                              Softmax<F>(tau_t, both.teacher.sums.max, both.teacher.sums.sum[0]),
                              tau_s == tau_t);
  if (is_nan(softmax.student.sum + softmax.teacher.sum)) {
    if (threadIdx.x == 0) out.fill(NAN);
    return;
  }
  // Before the second read, to keep it out of that loop's registers.
  if (threadIdx.x == 0) {
    out.put_side(0, softmax.student, tau_s, both.student, labelled, pair.student_at(label));
    out.put_side(1, softmax.teacher, tau_t, both.teacher, labelled, pair.teacher_at(label));
    out.put(kAgreement, both.student.at == both.teacher.at ? F(1) : F(0));
  }
  PairSums<F> sums = pair_sums(pair, softmax);
  if (threadIdx.x != 0) return;
  out.put(kStudentEntropy, sums.student_entropy);
  out.put(kTeacherEntropy, sums.teacher_entropy);
  out.put(kStudentSquare, sums.student_square);
  out.put(kTeacherSquare, sums.teacher_square);
  if (softmax.teacher.is_empty()) sums = PairSums<F>();
  out.put(kForwardKl, sums.forward_kl);
  out.put(kReverseKl, sums.reverse_kl);
  out.put(kTotalVariationOf, sums.corrected_total_variation());
  out.put(kHellinger, sqrt(sums.squared_hellinger));
  out.put(kDot, sums.dot);
}

template <class T, class F>
__global__ void __launch_bounds__(kMaxThreads, 2)
    token_stats_kernel(const __grid_constant__ StatsParams<F> params) {
  for (int64_t row = blockIdx.x; row < params.rows.rows; row += gridDim.x) {
    stats_row<T>(params, row);
  }
}

// ---- labels ------------------------------------------------------------------------------------

template <class F>
struct LabelParams {
  RowParams<F> rows;  // stats (N, 2), value, upstream, grad_student; grad_temperature (N,)
  int64_t ignore_index;
};

template <class T, class F>
KD_DEVICE void label_forward_row(const LabelParams<F>& params, int64_t row) {
  const RowParams<F>& rows = params.rows;
  const F tau = rows.student_temperature.at(row);
  const int64_t label = rows.labels[row * rows.labels_stride];
  F* stats = rows.stats + row * rows.stats_stride;
  F* value = rows.value + row * rows.value_stride;
  const bool selected = is_selected(rows, row, params.ignore_index);
  if (!selected || !is_temperature(tau) || label < 0 || label >= rows.valid_student) {
    if (threadIdx.x == 0) {
      stats[0] = F(0);
      stats[1] = F(-1);
      *value = selected ? F(NAN) : F(0);
    }
    return;
  }
  const RowPair<T, F> pair(rows, row);
  LogitSums<F, 1> sums;
  sums.scale = F(kLog2E) / tau;
  for (int64_t c = threadIdx.x; c < pair.count(); c += blockDim.x) {
    F z[kChunk], none[kChunk];
    pair.load(c, z, none);
    F top = z[0];
#pragma unroll
    for (int i = 1; i < kChunk; ++i) top = max(top, z[i]);
    if (top > sums.max) sums.raise(top);
    const F reference = sums.reference();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums.add(exp2((z[i] - reference) * sums.scale));
  }
  sums = block_reduce(sums);
  if (threadIdx.x != 0) return;
  const Softmax<F> softmax(tau, sums.max, sums.sum[0]);
  stats[0] = softmax.reference;
  stats[1] = softmax.sum;
  // NaN in the sum arrives here by itself.
  *value = F(kLn2) * (softmax.exponent(pair.student_at(label)) - softmax.log2_sum);
}

template <class T, class F>
KD_DEVICE void label_backward_row(const LabelParams<F>& params, int64_t row) {
  const RowParams<F>& rows = params.rows;
  const RowPair<T, F> pair(rows, row);
  const F* stats = rows.stats + row * rows.stats_stride;
  const F upstream = rows.upstream.at(row), tau = rows.student_temperature.at(row);
  F* grad_tau =
      rows.grad_temperature ? rows.grad_temperature + row * rows.grad_temperature_stride : nullptr;
  const bool refused = stats[1] < F(0) || upstream == F(0);
  if (refused || is_nan(stats[1])) {
    F g[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) g[i] = refused ? F(0) : F(NAN);
    if (pair.wants_student()) {
      for (int64_t c = threadIdx.x; c < pair.count(); c += blockDim.x) pair.store_student(c, g);
    }
    if (grad_tau && threadIdx.x == 0) *grad_tau = g[0];
    return;
  }
  const int64_t label = rows.labels[row * rows.labels_stride];
  const F logit = pair.student_at(label);
  const bool possible = logit > F(-kInfinity);
  const Softmax<F> softmax(tau, stats[0], stats[1]);
  const F by = upstream / tau;
  F moment = F(0);  // sum of q (z - reference)
  for (int64_t c = threadIdx.x; c < pair.count(); c += blockDim.x) {
    F z[kChunk], none[kChunk], g[kChunk];
    pair.load(c, z, none);
    const int64_t begin = pair.begin(c);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const F q = exp2(softmax.exponent(z[i])) * softmax.inverse;
      if (grad_tau && q > F(0)) moment += q * (z[i] - softmax.reference);
      g[i] = by * ((possible && begin + i == label ? F(1) : F(0)) - q);
    }
    if (pair.wants_student()) pair.store_student(c, g);
  }
  if (!grad_tau) return;
  moment = block_sum(moment);
  if (threadIdx.x != 0) return;
  *grad_tau = possible ? -by / tau * ((logit - softmax.reference) - moment) : F(0);
}

template <bool kForward, class T, class F>
__global__ void __launch_bounds__(kMaxThreads, 2)
    label_log_probs_kernel(const __grid_constant__ LabelParams<F> params) {
  for (int64_t row = blockIdx.x; row < params.rows.rows; row += gridDim.x) {
    if constexpr (kForward) {
      label_forward_row<T>(params, row);
    } else {
      label_backward_row<T>(params, row);
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------

template <class F>
PerRow<F> per_row(const View& view, double number) {
  if (!view) return {nullptr, 0, static_cast<F>(number)};
  return {view.as<F>(), view.stride[0], F(0)};
}

Rows rows_of(const View& view) {
  if (!view) return {nullptr, 0, 0, DType::kOther};
  return {view.data, view.stride[0], view.shape[1], view.dtype};
}

LaunchInfo info_of(const char* name, const View& logits, int64_t columns, void* stream) {
  const int64_t blocks =
      std::min<int64_t>(logits.shape[0], int64_t{256} * simt::multiprocessor_count());
  return {name,
          dim3(static_cast<unsigned>(blocks)),
          dim3(static_cast<unsigned>(threads_for(columns))),
          0,
          static_cast<Stream>(stream),
          "N=" + std::to_string(logits.shape[0]) + ", V=" + std::to_string(columns)};
}

// Everything that is the same for both: rows, labels, mask.
template <class F>
RowParams<F> row_params(const View& logits, const View& labels, const View& mask) {
  RowParams<F> rows = {};
  rows.rows = logits.shape[0];
  rows.student = rows_of(logits);
  rows.labels = labels ? labels.as<int64_t>() : nullptr;
  rows.labels_stride = labels ? labels.stride[0] : 0;
  rows.mask = mask ? mask.as<bool>() : nullptr;
  rows.mask_stride = mask ? mask.stride[0] : 0;
  return rows;
}

template <class F>
void run_stats(const TokenStatsArgs& a) {
  if (a.student.shape[0] == 0) return;
  const DeviceGuard guard(a.student.device_index);
  StatsParams<F> params;
  RowParams<F>& rows = params.rows = row_params<F>(a.student, a.labels, a.mask);
  rows.teacher = rows_of(a.teacher);
  rows.valid_student = valid_columns(a.student_columns, rows.student.columns);
  rows.valid_teacher = valid_columns(a.teacher_columns, rows.teacher.columns);
  rows.student_temperature = per_row<F>(a.student_temperature, a.tau_s);
  rows.teacher_temperature = per_row<F>(a.teacher_temperature, a.tau_t);
  params.numbers = a.numbers.as<float>();
  params.stride = a.numbers.stride[0];
  params.ids = a.ids.as<int64_t>();
  params.id_stride = a.ids.stride[0];
  params.ignore_index = static_cast<int64_t>(a.ignore_index);
  const LaunchInfo info = info_of("token_stats", a.student,
                                  std::max(rows.student.columns, rows.teacher.columns), a.stream);
  if constexpr (std::is_same<F, float>::value) {
    const DType type = a.student.dtype;
    if (!a.teacher || a.teacher.dtype == type) {
      return dispatch_half_float(type, "student", [&](auto zero) {
        launch(info, token_stats_kernel<decltype(zero), F>, params);
      });
    }
  }
  launch(info, token_stats_kernel<AnyFloat, F>, params);
}

template <class F>
void run_labels(const LabelLogProbsArgs& a, bool forward) {
  if (a.logits.shape[0] == 0) return;
  const DeviceGuard guard(a.logits.device_index);
  LabelParams<F> params;
  RowParams<F>& rows = params.rows = row_params<F>(a.logits, a.labels, a.mask);
  rows.valid_student = valid_columns(a.columns, rows.student.columns);
  rows.student_temperature = per_row<F>(a.temperature, a.tau);
  rows.stats = a.stats.as<F>();
  rows.stats_stride = a.stats.stride[0];
  if (forward) {
    rows.value = a.value.as<F>();
    rows.value_stride = a.value.stride[0];
  } else {
    rows.upstream = per_row<F>(a.upstream, 1);
    rows.grad_student = rows_of(a.gradient);
    rows.grad_temperature = a.grad_temperature ? a.grad_temperature.as<F>() : nullptr;
    rows.grad_temperature_stride = a.grad_temperature ? a.grad_temperature.stride[0] : 0;
  }
  params.ignore_index = static_cast<int64_t>(a.ignore_index);
  const char* name = forward ? "label_log_probs_fwd" : "label_log_probs_bwd";
  const LaunchInfo info = info_of(name, a.logits, rows.student.columns, a.stream);
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    forward ? launch(info, label_log_probs_kernel<true, T, F>, params)
            : launch(info, label_log_probs_kernel<false, T, F>, params);
  };
  if constexpr (std::is_same<F, double>::value) {
    go(AnyFloat{});
  } else {
    dispatch_half_float(a.logits.dtype, "logits", go);
  }
}

// float64 is served by the emulator only.
template <class Args>
void run(const View& logits, const Args& args, void (*floats)(const Args&),
         void (*doubles)(const Args&)) {
  if (logits.dtype != DType::kFloat64) return floats(args);
  KD_CHECK(doubles != nullptr,
           "student: expected float32, float16 or bfloat16 on CUDA, got float64 (backend torch "
           "serves it)");
  doubles(args);
}

#if defined(__CUDACC__)
#define KD_DOUBLES(function) nullptr
#else
#define KD_DOUBLES(function) function
#endif

template <class F>
void run_forward(const LabelLogProbsArgs& args) {
  run_labels<F>(args, true);
}
template <class F>
void run_backward(const LabelLogProbsArgs& args) {
  run_labels<F>(args, false);
}

}  // namespace

// ---- entry points ------------------------------------------------------------------------------

void token_stats(const TokenStatsArgs& args) {
  check_token_stats(args);
  run<TokenStatsArgs>(args.student, args, run_stats<float>, KD_DOUBLES(run_stats<double>));
}

void label_log_probs_fwd(const LabelLogProbsArgs& args) {
  check_label_log_probs(args, true);
  run<LabelLogProbsArgs>(args.logits, args, run_forward<float>, KD_DOUBLES(run_forward<double>));
}

void label_log_probs_bwd(const LabelLogProbsArgs& args) {
  check_label_log_probs(args, false);
  run<LabelLogProbsArgs>(args.logits, args, run_backward<float>, KD_DOUBLES(run_backward<double>));
}

}  // namespace kd::cuda
