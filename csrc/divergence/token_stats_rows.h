// What token_stats_host.cpp calls per ISA: rows [begin, end) of a checked call. Rows are
// independent of each other.
#pragma once

#include "common/isa.h"
#include "divergence/token_stats.h"

namespace kd {

KD_DECLARE_PER_ISA(void token_stats_rows(const TokenStatsArgs& args, int64_t begin, int64_t end))
KD_DECLARE_PER_ISA(void label_log_probs_forward_rows(const LabelLogProbsArgs& args, int64_t begin,
                                                     int64_t end))
KD_DECLARE_PER_ISA(void label_log_probs_backward_rows(const LabelLogProbsArgs& args, int64_t begin,
                                                      int64_t end))

}  // namespace kd
