// CPU entry of relation_walk: checks, the size of a block, threads over parts, the sum of parts.
#include <algorithm>

#include "common/parallel.h"
#include "relation/relation_check.h"
#include "relation/relation_walk.h"
#include "relation/relation_walk_rows.h"

namespace kd::cpu {
namespace {

// Products of a block, both sides: half of a common L2 cache. Where the keys, which pass once for
// each block, come from beyond that cache, fewer passes are worth more than the block's nearness.
constexpr int64_t kBlockBytes = int64_t{512} << 10, kFarBlockBytes = int64_t{2} << 20;
constexpr int64_t kFarKeys = int64_t{2} << 20;
constexpr int64_t kRowsUnit = 12, kFewestRows = 24, kMostRows = 192;

float* tokens(const View& v, const char* argument, int64_t parts, int64_t graphs, int64_t rows,
              int64_t width) {
  const bool fits =
      parts < 0 ? v.ndim == 3 && v.shape[0] == graphs && v.shape[1] == rows && v.shape[2] == width
                : v.ndim == 4 && v.shape[0] == parts && v.shape[1] == graphs &&
                      v.shape[2] == rows && v.shape[3] == width;
  KD_CHECK(fits, argument, ": expected ", graphs, " graphs of ", rows, " rows of ", width, ", got ",
           shape_text(v));
  check_dtype(v, argument, DType::kFloat32);
  KD_CHECK(v.device == Device::kCpu, argument, ": expected a tensor on cpu");
  int64_t stride = 1;
  for (int i = v.ndim - 1; i >= 0; --i) {
    KD_CHECK(v.size() == 0 || v.shape[i] == 1 || v.stride[i] == stride, argument,
             ": expected a contiguous tensor");
    stride *= v.shape[i];
  }
  return v.as<float>();
}

RelationWalk::Side resolve_side(const RelationWalkSide& a, const char* which, int64_t graphs,
                                int64_t rows, int64_t columns, bool symmetric, int64_t parts) {
  RelationWalk::Side out;
  KD_CHECK(a.q.ndim == 3 && a.q.shape[2] > 0 && a.q.shape[2] % kWidthUnit == 0, which,
           ": expected tokens (H, N, d) with d a multiple of ", kWidthUnit, ", got ",
           shape_text(a.q));
  out.width = a.q.shape[2];
  out.q = tokens(a.q, which, -1, graphs, rows, out.width);
  out.k = a.k ? tokens(a.k, which, -1, graphs, columns, out.width) : out.q;
  KD_CHECK(a.k || rows == columns, which, ": expected keys, for ", rows, " rows and ", columns,
           " columns");
  const int64_t padded = (columns + kPanelUnit - 1) / kPanelUnit * kPanelUnit;
  out.panels = tokens(a.panels, which, -1, graphs, padded, out.width);
  if (!a.dq) return out;
  out.dq = tokens(a.dq, which, -1, graphs, rows, out.width);
  if (symmetric) return out;
  out.dk = a.k ? tokens(a.dk, which, -1, graphs, columns, out.width) : out.dq;
  if (parts > 1) {
    out.further = tokens(a.further, which, parts - 1, graphs, columns, out.width);
    advise_huge(out.further, static_cast<size_t>(a.further.size()) * sizeof(float));
  }
  return out;
}

void add_parts(const RelationWalk& walk, const RelationWalk::Side& side) {
  if (side.dk == nullptr || walk.parts == 1) return;
  const int64_t size = walk.graphs * walk.columns * side.width;
  parallel_for(0, size, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part + 1 < walk.parts; ++part) {
      const float* from = side.further + part * size;
      for (int64_t i = begin; i < end; ++i) side.dk[i] += from[i];
    }
  });
}

}  // namespace

void relation_walk(const RelationWalkArgs& args) {
  RelationWalk walk;
  KD_CHECK(args.student.q.ndim == 3, "q_s: expected tokens (H, N, d), got ",
           shape_text(args.student.q));
  const View& keys = args.student.k ? args.student.k : args.student.q;
  KD_CHECK(keys.ndim == 3, "k_s: expected tokens (H, M, d), got ", shape_text(keys));
  walk.graphs = args.student.q.shape[0];
  walk.rows = args.student.q.shape[1];
  walk.columns = keys.shape[1];
  walk.parts = args.parts;
  walk.symmetric = args.symmetric;
  KD_CHECK(args.parts >= 1 && args.parts <= std::max<int64_t>(walk.rows, 1),
           "parts: expected 1 to ", walk.rows, ", got ", args.parts);

  const bool distance =
      relation::is_distance(static_cast<RelationKind>(static_cast<int>(args.map.spec.kind)));
  KD_CHECK(!distance || args.symmetric, "kind: distances are walked in blocks where symmetric");

  // The map's own arguments are checked as those of one chunk of all rows. It has no products: the
  // tokens stand where their address is asked for.
  RelationArgs map = args.map;
  map.student = args.student.q;
  map.student.shape[2] = map.student.stride[1] = walk.columns;
  map.student.stride[0] = walk.rows * walk.columns;
  map.student.stride[2] = 1;
  map.teacher = map.student;
  map.pair_weight = map.pair_value = View();
  walk.map = resolve_relation_inline(map);

  walk.student = resolve_side(args.student, "student", walk.graphs, walk.rows, walk.columns,
                              args.symmetric, args.parts);
  const bool two = relation::has_teacher(walk.map.kind);
  if (two) {
    walk.teacher = resolve_side(args.teacher, "teacher", walk.graphs, walk.rows, walk.columns,
                                args.symmetric, args.parts);
  }
  KD_CHECK(!walk.map.need_student || args.student.dq, "student: expected a gradient to write");
  KD_CHECK(!walk.map.need_teacher || args.teacher.dq, "teacher: expected a gradient to write");
  walk.map.need_student = walk.student.dq != nullptr;
  walk.map.need_teacher = walk.teacher.dq != nullptr;
  if (walk.graphs == 0 || walk.rows == 0) {
    for (const RelationWalk::Side* side : {&walk.student, &walk.teacher}) {
      if (side->dk != nullptr) {
        std::fill_n(side->dk, walk.graphs * walk.columns * side->width, 0.0f);
      }
    }
    return;
  }

  // Rows of a block start 64 bytes apart from multiples of 4 KiB, which would share cache sets.
  walk.stride = walk.padded_columns() + 16;
  const int64_t bytes = walk.stride * 4 * (two ? 2 : 1);
  const int64_t width = std::max(walk.student.width, walk.teacher.width);
  const int64_t budget = walk.columns * width * 4 > kFarKeys ? kFarBlockBytes : kBlockBytes;
  walk.block_rows = std::clamp(budget / bytes / kRowsUnit * kRowsUnit, kFewestRows, kMostRows);
  const size_t block = static_cast<size_t>(walk.block_rows * (bytes + width * 4));

  const auto pack = KD_PICK_ISA(relation_walk_pack);
  const auto run = KD_PICK_ISA(relation_walk_parts);
  parallel_for(0, walk.graphs * walk.panels(), 16,
               [&](int64_t begin, int64_t end) { pack(walk, begin, end); });
  parallel_for(0, walk.graphs * walk.parts, 1,
               [&](int64_t begin, int64_t end) { run(walk, begin, end, block_scratch(block)); });
  add_parts(walk, walk.student);
  add_parts(walk, walk.teacher);
}

}  // namespace kd::cpu
