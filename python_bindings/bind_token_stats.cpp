// token_stats and label_log_probs: tensors to views, nothing else.
#include "bind.h"
#include "common/check.h"
#include "divergence/token_stats.h"
#include "view_caster.h"

namespace kd::binding {
namespace {

#if defined(KDK_BUILD_SIMT)
constexpr bool kSimulated = true;  // runs the CUDA sources on CPU memory
#else
constexpr bool kSimulated = false;
#endif

// Calls the entry of the backend that reads `logits`.
#if defined(KDK_BUILD_SIMT)
#define KD_ENTRY(function, args) cuda::function(args)
#elif defined(KDK_WITH_CUDA)
#define KD_ENTRY(function, args) (on_gpu ? cuda::function(args) : cpu::function(args))
#else
#define KD_ENTRY(function, args) cpu::function(args)
#endif

bool is_on_gpu(const View& logits) {
  const bool on_gpu = !kSimulated && logits.device == Device::kCuda;
#if !defined(KDK_WITH_CUDA)
  KD_CHECK(!on_gpu, "student: this build has no CUDA kernels");
#endif
  return on_gpu;
}

void run(const TokenStatsArgs& args) {
  py::gil_scoped_release release;
  [[maybe_unused]] const bool on_gpu = is_on_gpu(args.student);
  KD_ENTRY(token_stats, args);
}

void run(const LabelLogProbsArgs& args, bool forward) {
  py::gil_scoped_release release;
  [[maybe_unused]] const bool on_gpu = is_on_gpu(args.logits);
  forward ? KD_ENTRY(label_log_probs_fwd, args) : KD_ENTRY(label_log_probs_bwd, args);
}

LabelLogProbsArgs label_args(const py::object& logits, View labels, View mask, View temperature,
                             View stats, double tau, double ignore_index, double columns) {
  LabelLogProbsArgs args;
  args.logits = view_from(logits.ptr());
  args.stream = current_stream(logits.ptr(), args.logits);
  args.labels = labels;
  args.mask = mask;
  args.temperature = temperature;
  args.stats = stats;
  args.tau = tau;
  args.ignore_index = ignore_index;
  args.columns = columns;
  return args;
}

}  // namespace

void bind_token_stats(py::module_& m) {
  m.attr("TOKEN_NUMBERS") = static_cast<int>(kTokenNumbers);

  m.def(
      "token_stats",
      [](py::object student, View teacher, View labels, View mask, View student_temperature,
         View teacher_temperature, View numbers, View ids, double tau_s, double tau_t,
         double ignore_index, double student_columns, double teacher_columns) {
        TokenStatsArgs args;
        args.student = view_from(student.ptr());
        args.stream = current_stream(student.ptr(), args.student);
        args.teacher = teacher;
        args.labels = labels;
        args.mask = mask;
        args.student_temperature = student_temperature;
        args.teacher_temperature = teacher_temperature;
        args.numbers = numbers;
        args.ids = ids;
        args.tau_s = tau_s;
        args.tau_t = tau_t;
        args.ignore_index = ignore_index;
        args.student_columns = student_columns;
        args.teacher_columns = teacher_columns;
        run(args);
      },
      "Statistics of each row pair (csrc/divergence/token_stats.h).");

  m.def(
      "label_log_probs_fwd",
      [](py::object logits, View labels, View mask, View temperature, View value, View stats,
         double tau, double ignore_index, double columns) {
        LabelLogProbsArgs args =
            label_args(logits, labels, mask, temperature, stats, tau, ignore_index, columns);
        args.value = value;
        run(args, true);
      },
      "log softmax(logits / tau)[label] of each row, and what the backward needs.");

  m.def(
      "label_log_probs_bwd",
      [](py::object logits, View labels, View mask, View temperature, View stats, View upstream,
         View gradient, View grad_temperature, double tau, double ignore_index, double columns) {
        LabelLogProbsArgs args =
            label_args(logits, labels, mask, temperature, stats, tau, ignore_index, columns);
        args.upstream = upstream;
        args.gradient = gradient;
        args.grad_temperature = grad_temperature;
        run(args, false);
      },
      "Gradients of label_log_probs_fwd for `upstream`.");
}

}  // namespace kd::binding
