// What relation_walk_host.cpp hands to relation_walk_cpu.cpp: everything checked and resolved.
#pragma once

#include "relation/relation_rows.h"
#include "relation/relation_walk.h"

namespace kd {

struct RelationWalk {
  struct Side {
    const float* q = nullptr;  // (H, N, d); none: there is no such side
    const float* k = nullptr;  // (H, M, d)
    float* panels = nullptr;
    float* dq = nullptr;
    float* dk = nullptr;       // = dq where the keys are the queries; none: not wanted
    float* further = nullptr;  // (P - 1, H, M, d)
    int64_t width = 0;
  };
  Side student, teacher;
  bool symmetric = false;
  int64_t graphs = 0, rows = 0, columns = 0, parts = 1;
  int64_t block_rows = 0, stride = 0;  // of one block; stride: numbers between its rows
  RelationRows map;                    // of whole maps, without products

  KD_HOST_DEVICE int64_t panels() const { return (columns + kPanelUnit - 1) / kPanelUnit; }
  KD_HOST_DEVICE int64_t padded_columns() const { return panels() * kPanelUnit; }
};

// Panels [begin, end), of kPanelUnit columns, of the H * panels() of each side.
KD_DECLARE_PER_ISA(void relation_walk_pack(const RelationWalk& walk, int64_t begin, int64_t end))
// Parts [begin, end) of the H * parts; `block` holds the products of one block, both sides, and the
// strips of its queries.
KD_DECLARE_PER_ISA(void relation_walk_parts(const RelationWalk& walk, int64_t begin, int64_t end,
                                            float* block))

}  // namespace kd
