// divergence_fwd / divergence_bwd on the GPU (and, compiled for the host, in the emulator).
//
// A forward call is one to three launches, without host synchronisation or allocation:
//   select   factor of every row where the divisor depends on data (labels, mask, weights)
//   row      values, statistics and gradients (divergence_kernel.cuh)
//   reduce   sum of factor x value, for a scalar reduction
// A backward call is the row kernel alone. A sum of several divergences is a forward call a part,
// without gradients, and the kernel of divergence_sum.cuh.
#include "common/launch.h"
#include "common/reduce.cuh"
#include "divergence/divergence_check.h"
#include "divergence/divergence_rows.cuh"
#include "divergence/divergence_sum.cuh"

namespace kd::cuda {
namespace {

// One block each: their order of addition must not depend on the GPU. Sums are double, which costs
// nothing over so few numbers.
constexpr int kSingleBlockThreads = 512;

Reduction reduction_of(const DivergenceSpec& spec) {
  return static_cast<Reduction>(static_cast<int>(spec.reduction));
}

// ---- kernels -----------------------------------------------------------------------------------

template <class F>
struct SelectParams {
  int64_t rows;
  int64_t entries, length;  // mean: one entry; sequence_mean: one an element of dimension 0
  const int64_t* labels;
  int64_t labels_stride, ignore_index;
  const bool* mask;
  int64_t mask_stride;
  PerRow<F> weight;
  bool count_weights;
  F* stats;
  int64_t stats_stride;

  KD_DEVICE bool selected(int64_t row) const {
    return (labels == nullptr || labels[row * labels_stride] != ignore_index) &&
           (mask == nullptr || mask[row * mask_stride]);
  }
  KD_DEVICE double counted(int64_t row) const {
    if (!selected(row)) return 0;
    return count_weights ? static_cast<double>(weight.at(row)) : 1;
  }
  KD_DEVICE F& unit(int64_t row) const { return stats[row * stats_stride + kUnit]; }
};

// kUnit of every row: 1 / divisor if it is selected, else 0. An entry that counts nothing has no
// part in the mean over entries.
template <class F>
__global__ void __launch_bounds__(kSingleBlockThreads, 1)
    divergence_select_kernel(const __grid_constant__ SelectParams<F> params) {
  const int64_t length = params.length;
  if (params.entries == 1) {
    double total = 0;
    for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) {
      total += params.counted(row);
    }
    total = block_sum(total);
    const F unit = total > 0 ? F(1) / static_cast<F>(total) : F(0);
    for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) {
      params.unit(row) = params.selected(row) ? unit : F(0);
    }
    return;
  }
  // A warp an entry. The totals rest in kUnit of each entry's first row until all are known.
  const int64_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double counting = 0;
  for (int64_t entry = warp; entry < params.entries; entry += warps) {
    double total = 0;
    for (int64_t i = lane; i < length; i += 32) total += params.counted(entry * length + i);
    total = warp_sum(total);
    if (lane == 0) {
      params.unit(entry * length) = static_cast<F>(total);
      counting += total > 0 ? 1 : 0;
    }
  }
  counting = block_sum(counting);
  for (int64_t entry = warp; entry < params.entries; entry += warps) {
    const double total = static_cast<double>(params.unit(entry * length));
    __syncwarp();  // everybody has read the total before lane 0 writes there
    const F unit = total > 0 ? F(1) / static_cast<F>(total * counting) : F(0);
    for (int64_t i = lane; i < length; i += 32) {
      const int64_t row = entry * length + i;
      params.unit(row) = params.selected(row) ? unit : F(0);
    }
  }
}

// value = sum of factor x row value; rows of factor 0 add nothing, even where their value is inf.
template <class F>
__global__ void __launch_bounds__(kSingleBlockThreads, 1)
    divergence_reduce_kernel(const F* stats, int64_t stats_stride, int64_t rows, F* value) {
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    const F factor = stats[row * stats_stride + kFactor];
    if (factor != F(0)) {
      sum += static_cast<double>(factor) * static_cast<double>(stats[row * stats_stride + kValue]);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) *value = static_cast<F>(sum);
}

// ---- launchers ---------------------------------------------------------------------------------

int single_block_threads(int64_t items) {
  return items >= kSingleBlockThreads ? kSingleBlockThreads
                                      : static_cast<int>((items + 31) / 32 * 32);
}

std::string shape_of(const DivergenceArgs& args) {
  return "N=" + std::to_string(args.student.shape[0]) +
         ", V=" + std::to_string(args.student.shape[1]);
}

template <class F>
PerRow<F> per_row(const View& view, double number) {
  if (!view) return {nullptr, 0, static_cast<F>(number)};
  return {view.as<F>(), view.ndim == 1 ? view.stride[0] : 0, F(0)};
}

Rows rows_of(const View& view) {
  if (!view) return {nullptr, 0, 0, DType::kOther};
  return {view.data, view.stride[0], view.shape[1], view.dtype};
}

// The mean's divisor where the host knows it.
double known_divisor(const DivergenceArgs& args) {
  switch (reduction_of(args.spec)) {
    case Reduction::kNone:
    case Reduction::kSum:
      return 1;
    default:
      break;
  }
  if (args.spec.num_items > 0) return args.spec.num_items;
  if (reduction_of(args.spec) == Reduction::kBatchMean) return args.spec.batch;
  return static_cast<double>(args.student.shape[0]);
}

bool divisor_depends_on_data(const DivergenceArgs& args) {
  const Reduction reduction = reduction_of(args.spec);
  if (reduction != Reduction::kMean && reduction != Reduction::kSequenceMean) return false;
  if (args.num_items || args.spec.num_items > 0) return false;
  return args.labels || args.mask || (args.weight && args.spec.normalize_weights != 0);
}

template <class F>
void launch_select(const DivergenceArgs& args) {
  SelectParams<F> params;
  params.rows = args.student.shape[0];
  params.entries = reduction_of(args.spec) == Reduction::kSequenceMean
                       ? static_cast<int64_t>(args.spec.batch)
                       : 1;
  params.length = params.rows / params.entries;
  params.labels = args.labels ? args.labels.as<int64_t>() : nullptr;
  params.labels_stride = args.labels ? args.labels.stride[0] : 0;
  params.ignore_index = static_cast<int64_t>(args.spec.ignore_index);
  params.mask = args.mask ? args.mask.as<bool>() : nullptr;
  params.mask_stride = args.mask ? args.mask.stride[0] : 0;
  params.weight = per_row<F>(args.weight, 1);
  params.count_weights = args.weight && args.spec.normalize_weights != 0;
  params.stats = args.stats.as<F>();
  params.stats_stride = args.stats.stride[0];
  const int threads = params.entries == 1 ? single_block_threads(params.rows)
                                          : single_block_threads(params.entries * 32);
  launch({"divergence_select", dim3(1), dim3(static_cast<unsigned>(threads)), 0,
          static_cast<Stream>(args.stream), shape_of(args)},
         divergence_select_kernel<F>, params);
}

template <class F>
void launch_reduce(const DivergenceArgs& args) {
  const int64_t rows = args.student.shape[0];
  const int threads = rows == 0 ? 32 : single_block_threads(rows);
  launch({"divergence_reduce", dim3(1), dim3(static_cast<unsigned>(threads)), 0,
          static_cast<Stream>(args.stream), shape_of(args)},
         divergence_reduce_kernel<F>, args.stats.as<F>(), args.stats.stride[0], rows,
         args.value.as<F>());
}

template <class F>
void launch_row(const DivergenceArgs& args, bool forward) {
  const DivergenceSpec& spec = args.spec;
  RowParams<F> params;
  params.rows = args.student.shape[0];
  params.student = rows_of(args.student);
  params.teacher = rows_of(args.teacher);
  params.grad_student = rows_of(args.grad_student);
  params.grad_teacher = rows_of(args.grad_teacher);
  params.valid_student = valid_columns(spec.student_columns, params.student.columns);
  params.valid_teacher = valid_columns(spec.teacher_columns, params.teacher.columns);
  params.student_temperature = per_row<F>(args.student_temperature, spec.student_temperature);
  params.teacher_temperature = per_row<F>(args.teacher_temperature, spec.teacher_temperature);
  params.first = per_row<F>(args.first, spec.first);
  params.second = per_row<F>(args.second, spec.second);
  params.weight = per_row<F>(args.weight, 1);
  const bool mean = reduction_of(spec) > Reduction::kSum;
  params.divisor = per_row<F>(mean ? args.num_items : View{}, known_divisor(args));
  params.upstream = per_row<F>(args.upstream, 1);
  params.labels = args.labels ? args.labels.as<int64_t>() : nullptr;
  params.labels_stride = args.labels ? args.labels.stride[0] : 0;
  params.mask = args.mask ? args.mask.as<bool>() : nullptr;
  params.mask_stride = args.mask ? args.mask.stride[0] : 0;
  params.stats = args.stats.as<F>();
  params.stats_stride = args.stats.stride[0];
  const bool by_row = forward && reduction_of(spec) == Reduction::kNone;
  params.value = by_row ? args.value.as<F>() : nullptr;
  params.value_stride = by_row ? args.value.stride[0] : 0;
  params.grad_temperature = args.grad_temperature ? args.grad_temperature.as<F>() : nullptr;
  params.grad_temperature_stride = args.grad_temperature ? args.grad_temperature.stride[0] : 0;
  params.unit_is_ready = divisor_depends_on_data(args);
  params.kind_per_row = args.first || args.second;
  params.kind = row_kind(spec, static_cast<F>(spec.first), static_cast<F>(spec.second));
  params.spec = spec;

  const int64_t columns = std::max(params.student.columns, params.teacher.columns);
  // Rows beyond the grid are taken in strides.
  const int64_t blocks =
      std::min<int64_t>(params.rows, int64_t{256} * simt::multiprocessor_count());
  const LaunchInfo info{forward ? "divergence_fwd_row" : "divergence_bwd_row",
                        dim3(static_cast<unsigned>(blocks)),
                        dim3(static_cast<unsigned>(threads_for(columns))),
                        0,
                        static_cast<Stream>(args.stream),
                        shape_of(args)};
  switch (group_of(static_cast<Kind>(static_cast<int>(spec.kind)))) {
    case DivergenceGroup::kLinear:
      if (spec.reverse_kl == 0 && spec.cross_entropy == 0 && spec.entropy == 0 &&
          spec.clip_element == 0) {
        return launch_rows<Variant::kForward, F>(params, forward, info);
      }
      return launch_rows<Variant::kLinear, F>(params, forward, info);
    case DivergenceGroup::kMixture:
      return launch_rows<Variant::kMixture, F>(params, forward, info);
    case DivergenceGroup::kProbability:
      return launch_rows<Variant::kProbability, F>(params, forward, info);
    case DivergenceGroup::kPower:
      return launch_rows<Variant::kPower, F>(params, forward, info);
  }
}

template <class F>
void run(const DivergenceArgs& args, bool forward) {
  const DeviceGuard guard(args.student.device_index);
  const bool any = args.student.shape[0] > 0;
  if (forward && any && divisor_depends_on_data(args)) launch_select<F>(args);
  if (any) launch_row<F>(args, forward);
  if (forward && reduction_of(args.spec) != Reduction::kNone) launch_reduce<F>(args);
}

template <class F>
void launch_sum(const DivergenceArgs* parts, int64_t count) {
  SumParams<F> params;
  params.rows = parts->student.shape[0];
  params.student = rows_of(parts->student);
  params.grad_student = rows_of(parts->grad_student);
  params.valid_student = valid_columns(parts->spec.student_columns, params.student.columns);
  params.labels = parts->labels ? parts->labels.as<int64_t>() : nullptr;
  params.labels_stride = parts->labels ? parts->labels.stride[0] : 0;
  params.upstream = per_row<F>(parts->upstream, 1);
  params.count = static_cast<int>(count);
  for (int64_t k = 0; k < count; ++k) {
    const DivergenceArgs& args = parts[k];
    const DivergenceSpec& spec = args.spec;
    SumPart<F>& part = params.parts[k];
    part.teacher = rows_of(args.teacher);
    part.valid_teacher = valid_columns(spec.teacher_columns, part.teacher.columns);
    part.student_temperature = per_row<F>(args.student_temperature, spec.student_temperature);
    part.teacher_temperature = per_row<F>(args.teacher_temperature, spec.teacher_temperature);
    part.first = per_row<F>(args.first, spec.first);
    part.second = per_row<F>(args.second, spec.second);
    part.stats = args.stats.as<F>();
    part.stats_stride = args.stats.stride[0];
    part.group = group_of(static_cast<Kind>(static_cast<int>(spec.kind)));
    part.kind_per_row = args.first || args.second;
    part.kind = row_kind(spec, static_cast<F>(spec.first), static_cast<F>(spec.second));
    part.spec = spec;
  }
  const int64_t blocks =
      std::min<int64_t>(params.rows, int64_t{256} * simt::multiprocessor_count());
  launch({"divergence_sum_row", dim3(static_cast<unsigned>(blocks)),
          dim3(static_cast<unsigned>(threads_for(params.student.columns))), 0,
          static_cast<Stream>(parts->stream), shape_of(*parts)},
         divergence_sum_row_kernel<F>, params);
}

template <class F>
void run_sum(const DivergenceArgs* parts, int64_t count, bool forward) {
  const DeviceGuard guard(parts->student.device_index);
  for (int64_t k = 0; forward && k < count; ++k) {
    DivergenceArgs args = parts[k];
    args.grad_student = View{};
    run<F>(args, true);
  }
  if (parts->grad_student && parts->student.shape[0] > 0) launch_sum<F>(parts, count);
}

// ---- entry points ------------------------------------------------------------------------------

bool is_double(const DivergenceArgs& args, bool forward) {
  check_divergence(args, forward);
#if defined(__CUDACC__)
  KD_CHECK(args.student.dtype != DType::kFloat64,
           "student: expected float32, float16 or bfloat16 on CUDA, got float64 (backend torch "
           "serves it)");
#endif
  if (args.student.dtype == DType::kFloat64) return true;
  KD_CHECK(args.teacher.dtype != DType::kFloat64,
           "teacher: expected float32, float16 or bfloat16 beside a ", name(args.student.dtype),
           " student, got float64");
  return false;
}

void run_as(const DivergenceArgs& args, bool forward) {
  const bool wide = is_double(args, forward);
#if !defined(__CUDACC__)
  if (wide) return run<double>(args, forward);
#endif
  static_cast<void>(wide);
  run<float>(args, forward);
}

void run_sum_as(const DivergenceArgs* parts, int64_t count, bool forward) {
  check_sum(parts, count);
  KD_CHECK(count <= kMostSumParts, "parts: expected at most ", int{kMostSumParts}, ", got ", count);
  const bool wide = is_double(*parts, forward);
  for (int64_t k = 1; k < count; ++k) is_double(parts[k], forward);
#if !defined(__CUDACC__)
  if (wide) return run_sum<double>(parts, count, forward);
#endif
  static_cast<void>(wide);
  run_sum<float>(parts, count, forward);
}

}  // namespace

void divergence_fwd(const DivergenceArgs& args) {
  run_as(args, true);
}
void divergence_bwd(const DivergenceArgs& args) {
  run_as(args, false);
}
void divergence_sum_fwd(const DivergenceArgs* parts, int64_t count) {
  run_sum_as(parts, count, true);
}
void divergence_sum_bwd(const DivergenceArgs* parts, int64_t count) {
  run_sum_as(parts, count, false);
}

}  // namespace kd::cuda
