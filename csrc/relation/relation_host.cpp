// CPU: checks, then rows in parallel. Each row is summed by itself, so the bits do not depend on
// the number of threads.
#include "common/parallel.h"
#include "relation/relation_check.h"

namespace kd::cpu {

void relation_rows(const RelationArgs& args) {
  const RelationRows call = resolve_relation_inline(args);
  const int64_t total = call.graphs * call.chunk_rows;
  const auto run = KD_PICK_ISA(relation_row_range);
  // A piece of work shorter than this is not worth waking a thread for.
  constexpr int64_t kEntries = 16384;
  const int64_t grain = call.columns > 0 ? 1 + kEntries / call.columns : total;
  parallel_for(0, total, grain > 0 ? grain : 1,
               [&](int64_t begin, int64_t end) { run(call, begin, end); });
}

}  // namespace kd::cpu
