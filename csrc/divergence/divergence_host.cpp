// CPU entry of the divergences: checks, selected rows, factors, threads, the final sum. What runs
// per row is in divergence_cpu.cpp.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "divergence/divergence_check.h"
#include "divergence/divergence_rows.h"

namespace kd::cpu {
namespace {

// A gradient is written around the cache if it would not stay in it anyway.
constexpr int64_t kAroundCache = int64_t{1} << 20;
// Huge pages are asked for above this size: below, one zeroed page would be mostly waste.
constexpr int64_t kHugeFrom = int64_t{8} << 20;
// Entries a thread must have before a second one is worth waking.
constexpr int64_t kGrain = int64_t{1} << 14;

bool is_logits(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16 ||
         dtype == DType::kFloat64;
}

int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

void check_cpu(const View& view, const char* argument) {
  KD_CHECK(!view || view.device == Device::kCpu, argument, ": expected a tensor on cpu, got ",
           name(view.device));
}

DivergenceRows::Rows rows_of(const View& view, const char* argument, int64_t rows,
                             int64_t columns) {
  if (!view) return {};
  check_cpu(view, argument);
  check_rows(view, argument, rows, columns);
  return {view.data, view.stride[0], view.dtype};
}

DivergenceRows::PerRow per_row_of(const View& view, const char* argument, int64_t rows,
                                  DType compute) {
  if (!view) return {};
  check_cpu(view, argument);
  check_per_row(view, argument, rows);
  check_dtype(view, argument, compute);
  return {view.data, view.stride[0]};
}

double number(const View& view, int64_t index) {
  return view.dtype == DType::kFloat64 ? view.as<double>()[index] : view.as<float>()[index];
}

int64_t valid_columns(double given, int64_t width, const char* argument) {
  KD_CHECK(given >= 0 && given <= static_cast<double>(width), argument, ": expected 0 (all) to ",
           width, " columns, got ", given);
  return given == 0 ? width : static_cast<int64_t>(given);
}

// What forward and backward share: shapes, dtypes, devices, pointers.
DivergenceRows prepare(const DivergenceArgs& args) {
  const DivergenceSpec& spec = args.spec;
  DivergenceRows call;
  call.spec = spec;
  KD_CHECK(args.student.ndim == 2, "student: expected shape (N, V), got ",
           shape_text(args.student));
  const int64_t rows = args.student.shape[0], width = args.student.shape[1];
  KD_CHECK(is_logits(args.student.dtype),
           "student: expected float32, float16, bfloat16 or float64, got ",
           name(args.student.dtype));
  KD_CHECK(width > 0 || rows == 0, "student: expected at least one column");
  const bool wide = args.student.dtype == DType::kFloat64;
  const DType compute = wide ? DType::kFloat64 : DType::kFloat32;
  call.student = rows_of(args.student, "student", rows, width);
  call.student_width = call.teacher_width = width;
  call.has_teacher = static_cast<bool>(args.teacher);
  if (call.has_teacher) {
    KD_CHECK(args.teacher.ndim == 2 && args.teacher.shape[0] == rows, "teacher: expected shape (",
             rows, ", V), got ", shape_text(args.teacher));
    KD_CHECK(
        is_logits(args.teacher.dtype) && (args.teacher.dtype == DType::kFloat64) == wide,
        "teacher: float64 goes with float64 and float32, float16 and bfloat16 with each other; "
        "student is ",
        name(args.student.dtype), ", teacher ", name(args.teacher.dtype));
    call.teacher_width = args.teacher.shape[1];
    KD_CHECK(call.teacher_width > 0 || rows == 0, "teacher: expected at least one column");
    call.teacher = rows_of(args.teacher, "teacher", rows, call.teacher_width);
  } else {
    KD_CHECK(
        spec.forward_kl == 0 && spec.reverse_kl == 0 && spec.cross_entropy == 0 && spec.kind == 0,
        "teacher: expected logits, got none; only entropy goes without");
    KD_CHECK(!args.grad_teacher, "grad_teacher: there is no teacher");
    call.teacher = call.student;
  }
  call.student_columns = valid_columns(spec.student_columns, width, "student_columns");
  call.teacher_columns =
      call.has_teacher ? valid_columns(spec.teacher_columns, call.teacher_width, "teacher_columns")
                       : call.student_columns;
  const DivergenceRows::Rows none;
  call.grad_student =
      args.grad_student ? rows_of(args.grad_student, "grad_student", rows, width) : none;
  call.grad_teacher = args.grad_teacher
                          ? rows_of(args.grad_teacher, "grad_teacher", rows, call.teacher_width)
                          : none;
  if (args.grad_student) check_dtype(args.grad_student, "grad_student", args.student.dtype);
  if (args.grad_teacher) check_dtype(args.grad_teacher, "grad_teacher", args.teacher.dtype);
  call.student_temperature = per_row_of(args.student_temperature, "temperature", rows, compute);
  call.teacher_temperature =
      per_row_of(args.teacher_temperature, "teacher_temperature", rows, compute);
  call.first = per_row_of(args.first, "first", rows, compute);
  call.second = per_row_of(args.second, "second", rows, compute);
  KD_CHECK(args.stats && args.stats.ndim == 2 && args.stats.shape[0] == rows &&
               args.stats.shape[1] == kStats && args.stats.stride[1] == 1,
           "stats: expected contiguous rows of shape (", rows, ", ", int{kStats}, "), got ",
           shape_text(args.stats));
  check_cpu(args.stats, "stats");
  check_dtype(args.stats, "stats", compute);
  call.stats = args.stats.data;
  call.stats_stride = args.stats.stride[0];
  if (args.grad_temperature) {
    const View& view = args.grad_temperature;
    check_cpu(view, "grad_temperature");
    check_dtype(view, "grad_temperature", compute);
    KD_CHECK(view.ndim == 2 && view.shape[0] == rows && view.shape[1] == 2,
             "grad_temperature: expected shape (", rows, ", 2), got ", shape_text(view));
    call.grad_temperature = view.data;
    call.grad_temperature_stride[0] = view.stride[0];
    call.grad_temperature_stride[1] = view.stride[1];
  }
  if (args.labels) {
    check_cpu(args.labels, "labels");
    check_per_row(args.labels, "labels", rows);
    check_dtype(args.labels, "labels", DType::kInt64);
  }
  if (args.mask) {
    check_cpu(args.mask, "mask");
    check_per_row(args.mask, "mask", rows);
    check_dtype(args.mask, "mask", DType::kBool);
  }
  if (spec.label_weight != 0) {
    KD_CHECK(args.labels, "labels: expected a tensor, because label_weight is not 0");
    call.labels = args.labels.as<int64_t>();
    call.label_stride = args.labels.stride[0];
  }
  return call;
}

// A fresh gradient that does not fit the cache is written around it, onto huge pages.
void prepare_gradient(const View& gradient, const View& logits, bool* fresh) {
  if (!gradient || gradient.data == logits.data) return;
  const int64_t bytes = gradient.size() * item_size(gradient.dtype);
  *fresh = bytes >= kAroundCache;
  const bool contiguous = gradient.shape[0] <= 1 || gradient.stride[0] == gradient.shape[1];
  if (bytes >= kHugeFrom && contiguous) advise_huge(gradient.data, static_cast<size_t>(bytes));
}

void check_temperature(const View& temperature, double number_given, const char* argument,
                       const std::vector<uint8_t>& selected) {
  const auto good = [](double tau) { return tau > 0 && std::isfinite(tau); };
  if (!temperature) {
    KD_CHECK(good(number_given), argument, ": expected a finite number above 0, got ",
             number_given);
    return;
  }
  for (size_t row = 0; row < selected.size(); ++row) {
    if (!selected[row]) continue;
    const double tau = number(temperature, static_cast<int64_t>(row) * temperature.stride[0]);
    KD_CHECK(good(tau), argument, ": expected finite numbers above 0, got ", tau, " in row ", row);
  }
}

std::vector<uint8_t> selected_rows(const DivergenceArgs& args, int64_t rows) {
  std::vector<uint8_t> selected(static_cast<size_t>(rows), 1);
  const int64_t ignored = static_cast<int64_t>(args.spec.ignore_index);
  for (int64_t i = 0; i < rows; ++i) {
    bool on = true;
    if (args.labels) on = args.labels.as<int64_t>()[i * args.labels.stride[0]] != ignored;
    if (args.mask) on = on && args.mask.as<uint8_t>()[i * args.mask.stride[0]] != 0;
    selected[i] = on;
  }
  return selected;
}

void check_labels(const DivergenceArgs& args, const DivergenceRows& call,
                  const std::vector<uint8_t>& selected) {
  if (call.labels == nullptr) return;
  for (size_t row = 0; row < selected.size(); ++row) {
    if (!selected[row]) continue;
    const int64_t label = call.labels[static_cast<int64_t>(row) * call.label_stride];
    KD_CHECK(label >= 0 && label < call.student_columns, "labels: expected ",
             static_cast<int64_t>(args.spec.ignore_index), " or 0 to ", call.student_columns - 1,
             ", got ", label, " in row ", row);
  }
}

// unit[i] = selected / divisor: what multiplies weight x row value.
void unit_factors(const DivergenceArgs& args, const std::vector<uint8_t>& selected, double* unit) {
  const DivergenceSpec& spec = args.spec;
  const int64_t rows = static_cast<int64_t>(selected.size());
  const auto fill = [&](int64_t begin, int64_t end, double scale) {
    for (int64_t i = begin; i < end; ++i) unit[i] = selected[i] ? scale : 0;
  };
  const bool weighted = spec.normalize_weights != 0 && args.weight;
  const auto counted = [&](int64_t begin, int64_t end) {
    double total = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (selected[i]) total += weighted ? number(args.weight, i * args.weight.stride[0]) : 1;
    }
    return total;
  };
  const Reduction reduction = static_cast<Reduction>(static_cast<int>(spec.reduction));
  if (reduction == Reduction::kNone || reduction == Reduction::kSum) return fill(0, rows, 1);
  if (args.num_items) {
    const double items = number(args.num_items, 0);
    KD_CHECK(items > 0, "num_items: expected a number above 0, got ", items);
    return fill(0, rows, 1 / items);
  }
  KD_CHECK(spec.num_items >= 0, "num_items: expected a number above 0, got ", spec.num_items);
  if (spec.num_items > 0) return fill(0, rows, 1 / spec.num_items);
  if (reduction == Reduction::kBatchMean) return fill(0, rows, 1 / spec.batch);
  if (reduction == Reduction::kMean) {
    const double total = counted(0, rows);
    return fill(0, rows, total > 0 ? 1 / total : 0);
  }
  const int64_t batch = static_cast<int64_t>(spec.batch);
  KD_CHECK(batch > 0 && rows % batch == 0, "batch: ", rows, " rows do not divide into ", spec.batch,
           " entries");
  const int64_t length = rows / batch;
  std::vector<double> per_entry(static_cast<size_t>(batch));
  int64_t entries = 0;
  for (int64_t b = 0; b < batch; ++b) {
    per_entry[b] = counted(b * length, (b + 1) * length);
    entries += per_entry[b] > 0;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const double total = per_entry[b] * static_cast<double>(std::max<int64_t>(entries, 1));
    fill(b * length, (b + 1) * length, per_entry[b] > 0 ? 1 / total : 0);
  }
}

void put(const View& view, int64_t index, double number) {
  if (view.dtype == DType::kFloat64) {
    view.as<double>()[index] = number;
  } else {
    view.as<float>()[index] = static_cast<float>(number);
  }
}

int64_t grain(const DivergenceRows& call) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, call.student_width));
}

// One entry a row.
struct Numbers {
  std::vector<uint8_t> selected;
  std::vector<double> all;  // unit, factor, values
};

DivergenceRows prepare_forward(const DivergenceArgs& args, Numbers* numbers) {
  DivergenceRows call = prepare(args);
  const int64_t rows = args.student.shape[0];
  const DType compute = args.student.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const bool none =
      static_cast<Reduction>(static_cast<int>(args.spec.reduction)) == Reduction::kNone;
  KD_CHECK(
      args.value && args.value.ndim == (none ? 1 : 0) && (!none || args.value.shape[0] == rows),
      "value: expected ", none ? "one number a row" : "a single number", ", got shape ",
      shape_text(args.value));
  check_cpu(args.value, "value");
  check_dtype(args.value, "value", compute);
  if (args.weight) per_row_of(args.weight, "weight", rows, compute);
  if (args.num_items) {
    check_cpu(args.num_items, "num_items");
    check_dtype(args.num_items, "num_items", compute);
  }
  numbers->selected = selected_rows(args, rows);
  const std::vector<uint8_t>& selected = numbers->selected;
  check_labels(args, call, selected);
  check_temperature(args.student_temperature, args.spec.student_temperature, "temperature",
                    selected);
  check_temperature(args.teacher_temperature, args.spec.teacher_temperature, "teacher_temperature",
                    selected);
  numbers->all.resize(static_cast<size_t>(3 * rows));
  double *unit = numbers->all.data(), *factor = unit + rows;
  unit_factors(args, selected, unit);
  for (int64_t i = 0; i < rows; ++i) {
    const bool used = unit[i] != 0 && args.weight;
    factor[i] = used ? unit[i] * number(args.weight, i * args.weight.stride[0]) : unit[i];
  }
  call.selected = selected.data();
  call.unit = unit;
  call.factor = factor;
  call.values = factor + rows;
  return call;
}

DivergenceRows prepare_backward(const DivergenceArgs& args) {
  DivergenceRows call = prepare(args);
  const int64_t rows = args.student.shape[0];
  const DType compute = args.student.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  KD_CHECK(args.upstream && args.upstream.ndim <= 1, "upstream: expected shape () or (", rows,
           ",), got ", shape_text(args.upstream));
  check_cpu(args.upstream, "upstream");
  check_dtype(args.upstream, "upstream", compute);
  if (args.upstream.ndim == 1) check_per_row(args.upstream, "upstream", rows);
  call.upstream = {args.upstream.data, args.upstream.ndim == 1 ? args.upstream.stride[0] : 0};
  return call;
}

// What the parts of a sum have in common: the gradient, and the layout of the scratch.
void share(const DivergenceArgs* parts, std::vector<DivergenceRows>* calls) {
  bool fresh = false;
  prepare_gradient(parts->grad_student, parts->student, &fresh);
  int64_t widest = 0;
  for (const DivergenceRows& call : *calls) {
    widest = std::max({widest, call.student_columns, call.teacher_columns});
  }
  for (DivergenceRows& call : *calls) {
    call.fresh_gradient = fresh;
    call.widest = widest;
  }
}

}  // namespace

void divergence_fwd(const DivergenceArgs& args) {
  divergence_sum_fwd(&args, 1);
}

void divergence_bwd(const DivergenceArgs& args) {
  divergence_sum_bwd(&args, 1);
}

void divergence_sum_fwd(const DivergenceArgs* parts, int64_t count) {
  check_sum(parts, count);
  const int64_t rows = parts->student.shape[0];
  std::vector<Numbers> numbers(static_cast<size_t>(count));
  std::vector<DivergenceRows> calls;
  calls.reserve(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) calls.push_back(prepare_forward(parts[k], &numbers[k]));
  share(parts, &calls);
  const auto kernel = KD_PICK_ISA(divergence_forward_rows);
  parallel_for(0, rows, grain(calls[0]),
               [&](int64_t begin, int64_t end) { kernel(calls.data(), count, begin, end); });
  for (int64_t k = 0; k < count; ++k) {
    const double* values = calls[k].values;
    const View& value = parts[k].value;
    if (value.ndim == 1) {
      for (int64_t i = 0; i < rows; ++i) put(value, i * value.stride[0], values[i]);
      continue;
    }
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += values[i];
    put(value, 0, total);
  }
}

void divergence_sum_bwd(const DivergenceArgs* parts, int64_t count) {
  check_sum(parts, count);
  const int64_t rows = parts->student.shape[0];
  std::vector<DivergenceRows> calls;
  calls.reserve(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) calls.push_back(prepare_backward(parts[k]));
  share(parts, &calls);
  const auto kernel = KD_PICK_ISA(divergence_backward_rows);
  parallel_for(0, rows, grain(calls[0]),
               [&](int64_t begin, int64_t end) { kernel(calls.data(), count, begin, end); });
}

}  // namespace kd::cpu
