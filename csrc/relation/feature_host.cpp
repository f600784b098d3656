// CPU: checks, then rows (or strips of columns) in parallel. Each is summed by itself, so the bits
// do not depend on the number of threads.
#include "common/parallel.h"
#include "relation/feature_check.h"

namespace kd::cpu {

// A piece of work shorter than this is not worth waking a thread for.
constexpr int64_t kEntries = 16384;

void feature_rows(const FeatureArgs& args) {
  const FeatureRows call = resolve_feature(args);
  const auto run = KD_PICK_ISA(feature_row_range);
  parallel_for(0, call.count, 1 + kEntries / (call.width + 1),
               [&](int64_t begin, int64_t end) { run(call, begin, end); });
}

void feature_columns(const FeatureColumnsArgs& args) {
  const FeatureColumns call = resolve_feature_columns(args);
  const auto run = KD_PICK_ISA(feature_column_range);
  const int64_t strips = (call.width + kFeatureStrip - 1) / kFeatureStrip;
  parallel_for(0, call.groups * strips, 1 + kEntries / (call.rows * kFeatureStrip + 1),
               [&](int64_t begin, int64_t end) { run(call, begin, end); });
}

}  // namespace kd::cpu
