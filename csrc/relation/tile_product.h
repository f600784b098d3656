// Matrix products of one block of rows whose results stay in the cache: what a walk over relation
// maps needs in place of a general GEMM, which would write and read a chunk of the map through
// memory and is slow at widths of 64.
//
//   outer    out (rows, M) = a (rows, d) b (M, d)^T       a in strips, b in panels
//   inner    to (rows, d) += g (rows, M) b (M, d), or, turned, to (M, d) += g (rows, M)^T a (rows,
//   d)
//
// Each result is kept in registers (12 x 2 vectors or 6 x 4 with 32 registers) while the sum runs.
// d is a multiple of kWidthUnit.
#pragma once

#include "common/simd.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

constexpr int kStrip = KDK_ISA_LEVEL == 2 ? 12 : 6;  // rows of an outer product in registers
constexpr int kPanel = 2 * VecF::kLanes;             // and its columns
constexpr int kInnerRows = 6;                        // results of inner
constexpr int kInnerVectors = KDK_ISA_LEVEL == 2 ? 4 : 2;
// Rows of b that stay in the L1 cache while all results of the block pass.
constexpr int64_t kInnerBlock = 128;

// (rows, d), row-major -> strips [rows / kStrip][d][kStrip]; rows beyond are 0.
KD_LANES void pack_strips(const float* a, int64_t rows, int64_t d, float* strips) {
  for (int64_t first = 0; first < rows; first += kStrip, strips += kStrip * d) {
    for (int64_t r = 0; r < kStrip; ++r) {
      const float* from = first + r < rows ? a + (first + r) * d : nullptr;
      for (int64_t k = 0; k < d; ++k) strips[k * kStrip + r] = from ? from[k] : 0.0f;
    }
  }
}

// Columns [first, first + kPanel) of b^T, b (M, d) -> [d][kPanel]; columns beyond are 0.
KD_LANES void pack_panel(const float* b, int64_t columns, int64_t d, int64_t first, float* panel) {
  for (int64_t c = 0; c < kPanel; ++c) {
    const float* from = first + c < columns ? b + (first + c) * d : nullptr;
    for (int64_t k = 0; k < d; ++k) panel[k * kPanel + c] = from ? from[k] : 0.0f;
  }
}

KD_LANES void outer_tile(const float* strip, const float* panel, int64_t d, float* out,
                         int64_t stride) {
  using V = VecF;
  V sum[kStrip][2];
#pragma GCC unroll 12
  for (int r = 0; r < kStrip; ++r) sum[r][0] = sum[r][1] = V::zero();
  for (int64_t k = 0; k < d; ++k) {
    const V left = V::load(panel + k * kPanel), right = V::load(panel + k * kPanel + V::kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kStrip; ++r) {
      const V x(strip[k * kStrip + r]);
      sum[r][0] = fma(x, left, sum[r][0]);
      sum[r][1] = fma(x, right, sum[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kStrip; ++r) {
    store(out + r * stride, sum[r][0]);
    store(out + r * stride + V::kLanes, sum[r][1]);
  }
}

// out: (strips * kStrip, panels * kPanel) with rows `stride` apart.
KD_LANES void outer(const float* strips, int64_t rows, const float* panels, int64_t columns,
                    int64_t d, float* out, int64_t stride) {
  for (int64_t c = 0; c < columns; c += kPanel) {
    for (int64_t r = 0; r < rows; r += kStrip) {
      outer_tile(strips + r * d, panels + c * d, d, out + r * stride + c, stride);
    }
  }
}

// R rows and C vectors of `to` += sum over n of g times rows of b. g(r, i) lies at g[r * stride +
// i] or, turned, at g[i * stride + r].
template <bool kTurned, int R, int C>
KD_LANES void inner_tile(const float* g, int64_t stride, const float* b, int64_t b_stride,
                         int64_t n, float* to, int64_t d) {
  using V = VecF;
  V sum[R][C];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = V::load(to + r * d + c * V::kLanes);
  }
  for (int64_t i = 0; i < n; ++i) {
    V y[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) y[c] = V::load(b + i * b_stride + c * V::kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const V x(kTurned ? g[i * stride + r] : g[r * stride + i]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fma(x, y[c], sum[r][c]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(to + r * d + c * V::kLanes, sum[r][c]);
  }
}

template <bool kTurned, int C>
KD_LANES void inner_rows(const float* g, int64_t stride, const float* b, int64_t b_stride,
                         int64_t n, float* to, int64_t d, int64_t rows) {
  const int64_t step = kTurned ? 1 : stride;
  int64_t r = 0;
  for (; r + kInnerRows <= rows; r += kInnerRows) {
    if (r + 2 * kInnerRows <= rows) {  // the next results may come from memory
      for (int64_t i = 0; i < kInnerRows; ++i) {
        for (int c = 0; c < C; ++c) prefetch(to + (r + kInnerRows + i) * d + c * VecF::kLanes);
      }
    }
    inner_tile<kTurned, kInnerRows, C>(g + r * step, stride, b, b_stride, n, to + r * d, d);
  }
  for (; r < rows; ++r) {
    inner_tile<kTurned, 1, C>(g + r * step, stride, b, b_stride, n, to + r * d, d);
  }
}

// to (rows, d) += g (rows, columns) b (columns, d), or, turned, g (columns, rows)^T b.
template <bool kTurned>
KD_LANES void inner(const float* g, int64_t stride, const float* b, int64_t columns, int64_t d,
                    float* to, int64_t rows) {
  constexpr int64_t kWide = kInnerVectors * VecF::kLanes;
  // Wide tokens: their rows lie kilobytes apart, where they would evict each other.
  alignas(64) float near[kInnerBlock * kWide];
  for (int64_t i = 0; i < columns; i += kInnerBlock) {
    const int64_t n = columns - i < kInnerBlock ? columns - i : kInnerBlock;
    const float* part = kTurned ? g + i * stride : g + i;
    int64_t k = 0;
    for (; k + kWide <= d; k += kWide) {
      const float* from = b + i * d + k;
      if (d > kWide) {
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t l = 0; l < kWide; l += VecF::kLanes) {
            store(near + j * kWide + l, VecF::load(from + j * d + l));
          }
        }
      }
      inner_rows<kTurned, kInnerVectors>(part, stride, d > kWide ? near : from, kWide, n, to + k, d,
                                         rows);
    }
    for (; k < d; k += VecF::kLanes) {
      inner_rows<kTurned, 1>(part, stride, b + i * d + k, d, n, to + k, d, rows);
    }
  }
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
