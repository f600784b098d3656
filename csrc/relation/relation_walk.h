// The whole walk over two relation maps on the CPU: for one block of rows after the other the
// products, the row kernel of relation.h and the products of the gradients, while the block lies in
// the L2 cache. The tokens are float32.
//
// Memory beside inputs and gradients: the keys once more in panels, and one gradient of the keys
// for each further part that a graph's rows are cut into (parts run in parallel and are added in
// order, so the bits do not depend on the number of threads).
#pragma once

#include "relation/relation.h"

namespace kd {

// Widths are multiples of this many numbers (zeros change no product).
constexpr int64_t kWidthUnit = 16;
// Columns of the panels are, too.
constexpr int64_t kPanelUnit = 32;

struct RelationWalkSide {
  View q;        // (H, N, d) float32, contiguous
  View k;        // (H, M, d), or none: the queries themselves
  View panels;   // (H, M up to kPanelUnit, d) workspace
  View dq;       // (H, N, d): gradient, or none; without keys it is the whole one
  View dk;       // (H, M, d), with keys
  View further;  // (P - 1, H, M, d) workspace
};

struct RelationWalkArgs {
  RelationWalkSide student, teacher;
  bool symmetric = false;  // without keys: the map of the gradients is its own transpose
  int64_t parts = 1;       // P, a graph's; no more than it has rows
  // Scales, masks, blocks, row_weight, norms, means, rows (H, N, kRelationRow) and spec of
  // relation_rows; its products are not used. Distance kinds: symmetric ones.
  RelationArgs map;
};

namespace cpu {
void relation_walk(const RelationWalkArgs& args);
}  // namespace cpu

}  // namespace kd
