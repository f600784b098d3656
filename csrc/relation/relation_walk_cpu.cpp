// The walk of relation_walk.h, compiled once per ISA.
#include "common/parallel.h"
#include "relation/relation_math.h"
#include "relation/relation_walk_rows.h"
#include "relation/tile_product.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

using Side = RelationWalk::Side;

void clear(float* data, int64_t size) {
  memset(data, 0, static_cast<size_t>(size) * sizeof(float));
}

// The rows [first, first + rows) of graph h as a chunk of relation_rows.
RelationRows block_of(const RelationWalk& walk, int64_t h, int64_t first, int64_t rows,
                      int64_t columns, float* student, float* teacher) {
  RelationRows call = walk.map;
  call.student = student;
  call.teacher = walk.teacher.q == nullptr ? nullptr : teacher;
  call.graphs = 1, call.chunk_rows = rows, call.columns = columns, call.row_stride = walk.stride;
  call.rows += (h * walk.rows + first) * kRelationRow;
  if (call.row_weight != nullptr) {
    call.row_weight = static_cast<const float*>(call.row_weight) + h * call.row_weight_stride[0] +
                      first * call.row_weight_stride[1];
  }
  if (call.norms != nullptr) {
    call.norms = static_cast<const float*>(call.norms) + h * call.norms_stride[1];
  }
  if (call.means != nullptr) call.means += h * call.means_stride[0];
  RelationSelection& s = call.selection;
  s.first_row += first;
  if (s.row_mask != nullptr) s.row_mask += h * s.row_stride[0] + first * s.row_stride[1];
  if (s.column_mask != nullptr) s.column_mask += h * s.column_stride[0];
  if (s.pair_mask != nullptr) {
    const int64_t p = s.pair_index == nullptr ? h : s.pair_index[h * s.index_stride];
    s.pair_mask += p * s.pair_stride[0] + first * s.pair_stride[1];
    s.pair_index = nullptr;
  }
  if (s.row_block != nullptr) {
    s.row_block += h * s.row_block_stride[0] + first * s.row_block_stride[1];
    s.column_block += h * s.column_block_stride[0];
  }
  return call;
}

void products(const RelationWalk& walk, const Side& side, int64_t h, int64_t first, int64_t rows,
              int64_t columns, float* strips, float* out) {
  const int64_t d = side.width;
  pack_strips(side.q + (h * walk.rows + first) * d, rows, d, strips);
  outer(strips, rows, side.panels + h * walk.padded_columns() * d, columns, d, out, walk.stride);
}

// Where the gradient of graph h's keys is added up in one part of its rows.
float* keys_of(const RelationWalk& walk, const Side& side, int64_t h, int64_t part) {
  const int64_t size = walk.columns * side.width;
  return part == 0 ? side.dk + h * size : side.further + ((part - 1) * walk.graphs + h) * size;
}

void gradients(const RelationWalk& walk, const Side& side, int64_t h, int64_t part, int64_t first,
               int64_t rows, int64_t columns, const float* slopes) {
  const int64_t d = side.width;
  const float* k = side.k + h * walk.columns * d;
  if (side.dk == nullptr) {  // symmetric: the keys' share is the queries'
    const int64_t row = h * walk.rows + first;
    float* to = side.dq + row * d;
    clear(to, rows * d);
    inner<false>(slopes, walk.stride, k, columns, d, to, rows);
    const int weight = &side == &walk.student ? kRowWeightS : kRowWeightT;
    for (int64_t r = 0; r < rows; ++r) {
      // Distances: the slopes are weights W of differences, sum_j W_ij (x_i - x_j).
      const bool distance = relation::is_distance(walk.map.kind);
      const double* report = walk.map.rows + (row + r) * kRelationRow;
      const VecF own(distance ? static_cast<float>(report[weight]) : 0.0f);
      const VecF factor(distance ? -2.0f : 2.0f);
      const float* x = side.q + (row + r) * d;
      for (int64_t i = 0; i < d; i += VecF::kLanes) {
        const VecF sum = VecF::load(to + r * d + i) - own * VecF::load(x + i);
        store(to + r * d + i, factor * sum);
      }
    }
    return;
  }
  float* const keys = keys_of(walk, side, h, part);
  const bool itself = side.dk == side.dq;
  float* to = itself ? keys + first * d : side.dq + (h * walk.rows + first) * d;
  if (!itself) clear(to, rows * d);
  inner<false>(slopes, walk.stride, k, columns, d, to, rows);
  inner<true>(slopes, walk.stride, side.q + (h * walk.rows + first) * d, rows, d, keys, columns);
}

void walk_part(const RelationWalk& walk, int64_t h, int64_t part, float* block) {
  const int64_t blocks = (walk.rows + walk.block_rows - 1) / walk.block_rows;
  const int64_t size = walk.block_rows * walk.stride;
  float* const student = block;
  float* const teacher = block + size;
  float* const strips = walk.teacher.q == nullptr ? teacher : teacher + size;
  const Side* const sides[] = {&walk.student, &walk.teacher};
  for (const Side* side : sides) {
    if (side->dk != nullptr) clear(keys_of(walk, *side, h, part), walk.columns * side->width);
  }
  for (int64_t b = blocks * part / walk.parts; b < blocks * (part + 1) / walk.parts; ++b) {
    const int64_t first = b * walk.block_rows, left = walk.rows - first;
    const int64_t rows = left < walk.block_rows ? left : walk.block_rows;
    int64_t columns = walk.columns;
    if (walk.map.selection.causal) {  // nothing right of the last row's own column is selected
      const int64_t end = walk.map.selection.first_row + first + rows + walk.map.selection.diagonal;
      columns = end < 0 ? 0 : end < columns ? end : columns;
    }
    products(walk, walk.student, h, first, rows, columns, strips, student);
    if (walk.teacher.q != nullptr) {
      products(walk, walk.teacher, h, first, rows, columns, strips, teacher);
    }
    relation_row_range(block_of(walk, h, first, rows, columns, student, teacher), 0, rows);
    if (walk.student.dq != nullptr) {
      gradients(walk, walk.student, h, part, first, rows, columns, student);
    }
    if (walk.teacher.dq != nullptr) {
      gradients(walk, walk.teacher, h, part, first, rows, columns, teacher);
    }
  }
}

}  // namespace

void relation_walk_pack(const RelationWalk& walk, int64_t begin, int64_t end) {
  const int64_t each = walk.padded_columns() / kPanel;
  const Side* const sides[] = {&walk.student, &walk.teacher};
  for (const Side* side : sides) {
    if (side->q == nullptr) continue;
    const int64_t d = side->width;
    for (int64_t i = begin; i < end; ++i) {
      // A unit of kPanelUnit columns is one panel of the products or several.
      const int64_t h = i / walk.panels(), unit = i % walk.panels();
      for (int64_t p = unit * kPanelUnit / kPanel; p < (unit + 1) * kPanelUnit / kPanel; ++p) {
        pack_panel(side->k + h * walk.columns * d, walk.columns, d, p * kPanel,
                   side->panels + (h * each + p) * kPanel * d);
      }
    }
  }
}

void relation_walk_parts(const RelationWalk& walk, int64_t begin, int64_t end, float* block) {
  for (int64_t i = begin; i < end; ++i) walk_part(walk, i / walk.parts, i % walk.parts, block);
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
