// What divergence_host.cpp hands to the per-ISA row kernels: everything checked and resolved, plain
// numbers and pointers. Strides count elements.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "divergence/divergence.h"

namespace kd {

struct DivergenceRows {
  // A matrix of rows: logits or a gradient. null: not given.
  struct Rows {
    void* data = nullptr;
    int64_t stride = 0;
    DType dtype = DType::kOther;
  };
  // One number a row in the compute dtype; null: the spec's number.
  struct PerRow {
    const void* data = nullptr;
    int64_t stride = 0;
  };

  Rows student, teacher;            // without a teacher: the student's rows again
  Rows grad_student, grad_teacher;  // dtypes of the logits
  bool has_teacher = false;         // false: only the entropy's coefficient is not 0
  bool fresh_gradient = false;      // grad_student is written for the first time and large
  int64_t student_width = 0, teacher_width = 0;      // allocated columns
  int64_t student_columns = 0, teacher_columns = 0;  // valid columns, <= width
  int64_t widest = 0;                                // valid columns of the widest row of all parts
  const int64_t* labels = nullptr;                   // only with label_weight != 0
  int64_t label_stride = 0;
  PerRow student_temperature, teacher_temperature, first, second, upstream;
  void* stats = nullptr;  // (N, kStats) compute dtype
  int64_t stats_stride = 0;
  void* grad_temperature = nullptr;  // (N, 2) compute dtype
  int64_t grad_temperature_stride[2] = {0, 0};

  // Forward only, one entry a row.
  const uint8_t* selected = nullptr;
  const double* factor = nullptr;
  const double* unit = nullptr;
  double* values = nullptr;  // out: factor * row value

  DivergenceSpec spec;
};

// Forward or backward of rows [begin, end). Rows are independent of each other. The parts of a sum
// share student, grad_student and what selects rows; `count` 1 is a plain call.
KD_DECLARE_PER_ISA(void divergence_forward_rows(const DivergenceRows* parts, int64_t count,
                                                int64_t begin, int64_t end))
KD_DECLARE_PER_ISA(void divergence_backward_rows(const DivergenceRows* parts, int64_t count,
                                                 int64_t begin, int64_t end))

}  // namespace kd
