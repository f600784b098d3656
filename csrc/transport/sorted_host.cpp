// Sorted transport on CPU: rows over slots of scratch, one thread a slot at a time.
#include <cstring>

#include "common/check.h"
#include "common/parallel.h"
#include "transport/sorted_checks.h"
#include "transport/sorted_cpu.h"
#include "transport/transport.h"

namespace kd::cpu {
namespace {

int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
bool is_half(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

double read(const View& view, int64_t row, double otherwise) {
  if (!view) return otherwise;
  const int64_t at = row * view.stride[0];
  return view.dtype == DType::kFloat64 ? view.as<double>()[at]
                                       : static_cast<double>(view.as<float>()[at]);
}
void write(const View& view, int64_t at, double value) {
  if (view.dtype == DType::kFloat64) {
    view.as<double>()[at] = value;
  } else {
    view.as<float>()[at] = static_cast<float>(value);
  }
}

SortedSide side_of(const View& logits, const View& excluded, const View& scale, double temperature,
                   int64_t row) {
  SortedSide side{};
  side.row =
      static_cast<const char*>(logits.data) + row * logits.stride[0] * bytes_of(logits.dtype);
  side.dtype = logits.dtype;
  side.columns = logits.shape[1];
  side.excluded = excluded ? excluded.as<uint8_t>() : nullptr;
  side.scale = read(scale, row, 1);
  side.temperature = temperature;
  return side;
}

}  // namespace

int64_t sorted_workspace(int64_t student_columns, int64_t teacher_columns, bool) {
  return sorted_scratch(student_columns, teacher_columns);
}

void sorted_transport(const SortedArgs& args) {
  check_sorted(args, sorted_scratch(args.student.shape[1], args.teacher.shape[1]));
  const int64_t rows = args.student.shape[0], slots = args.workspace.shape[0];
  const SortedTable* table = KD_PICK_ISA(sorted_table)();
  const auto kernel = args.student.dtype == DType::kFloat64                        ? table->dbl
                      : is_half(args.student.dtype) && is_half(args.teacher.dtype) ? table->half
                                                                                   : table->single;
  const int64_t row_bytes =
      args.grad_student ? args.grad_student.stride[0] * bytes_of(args.student.dtype) : 0;
  const auto run = [&](int64_t n, int32_t* scratch) {
    SortedRow row{};
    row.gradient =
        args.grad_student ? static_cast<char*>(args.grad_student.data) + n * row_bytes : nullptr;
    if (args.mask && !args.mask.as<uint8_t>()[n * args.mask.stride[0]]) {
      if (row.gradient != nullptr) {
        memset(row.gradient, 0,
               static_cast<size_t>(args.student.shape[1] * bytes_of(args.student.dtype)));
      }
    } else {
      row.student = side_of(args.student, args.student_excluded, args.student_scale,
                            args.student_temperature, n);
      row.teacher = side_of(args.teacher, args.teacher_excluded, args.teacher_scale,
                            args.teacher_temperature, n);
      row.coefficient = read(args.coefficient, n, 1);
      row.scratch = scratch;
      kernel(row);
    }
    write(args.value, n, row.value);
    write(args.slopes, 2 * n, row.student_slope);
    write(args.slopes, 2 * n + 1, row.teacher_slope);
  };
  parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      int32_t* scratch = args.workspace.as<int32_t>() + slot * args.workspace.stride[0];
      for (int64_t n = slot; n < rows; n += slots) run(n, scratch);
    }
  });
}

}  // namespace kd::cpu
