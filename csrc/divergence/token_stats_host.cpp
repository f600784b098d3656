// CPU entry of token_stats and label_log_probs: checks and threads. What runs per row is in
// token_stats_cpu.cpp.
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "divergence/token_stats_check.h"
#include "divergence/token_stats_rows.h"

namespace kd::cpu {
namespace {

// Entries a thread must have before a second one is worth waking.
constexpr int64_t kGrain = int64_t{1} << 14;

template <class Kernel, class Args>
void run_rows(Kernel kernel, const Args& args, const View& logits) {
  KD_CHECK(logits.device == Device::kCpu, "student: expected a tensor on cpu, got ",
           name(logits.device));
  const int64_t columns = logits.shape[1] > 0 ? logits.shape[1] : 1;
  const int64_t grain = kGrain / columns > 0 ? kGrain / columns : 1;
  parallel_for(0, logits.shape[0], grain,
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

int64_t width(const View& rows) {
  return rows ? rows.shape[1] : 0;
}

// With the number of valid columns in place of "0: all".
LabelLogProbsArgs resolved(LabelLogProbsArgs args) {
  args.columns = static_cast<double>(valid_columns(args.columns, width(args.logits)));
  return args;
}

}  // namespace

void token_stats(const TokenStatsArgs& args) {
  check_token_stats(args);
  TokenStatsArgs call = args;
  call.student_columns =
      static_cast<double>(valid_columns(args.student_columns, width(args.student)));
  call.teacher_columns =
      static_cast<double>(valid_columns(args.teacher_columns, width(args.teacher)));
  run_rows(KD_PICK_ISA(token_stats_rows), call, args.student);
}

void label_log_probs_fwd(const LabelLogProbsArgs& args) {
  check_label_log_probs(args, true);
  run_rows(KD_PICK_ISA(label_log_probs_forward_rows), resolved(args), args.logits);
}

void label_log_probs_bwd(const LabelLogProbsArgs& args) {
  check_label_log_probs(args, false);
  run_rows(KD_PICK_ISA(label_log_probs_backward_rows), resolved(args), args.logits);
}

}  // namespace kd::cpu
