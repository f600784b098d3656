// What the CPU and the CUDA entry check alike, and where each side of the clouds lies.
#pragma once

#include "common/check.h"
#include "common/macros.h"
#include "transport/sinkhorn_checks.h"
#include "transport/transport.h"
#include "transport/transport_math.h"

namespace kd {

// The sides of transport.h: how large they are, and where they lie.
struct AnnealedSides {
  int64_t n, m;
  int count;  // 2, or 4 with debias

  KD_HOST_DEVICE static bool rows_are_x(int side) { return side % 2 == 0; }
  KD_HOST_DEVICE static bool columns_are_x(int side) { return side == 1 || side == 2; }
  KD_HOST_DEVICE static int partner(int side) { return side < 2 ? 1 - side : side; }
  KD_HOST_DEVICE int64_t rows(int side) const { return rows_are_x(side) ? n : m; }
  KD_HOST_DEVICE int64_t columns(int side) const { return columns_are_x(side) ? n : m; }
  // Where the side's rows begin in (B, S); its columns are its partner's rows.
  KD_HOST_DEVICE int64_t offset(int side) const {
    return (side < 2 ? 0 : n + m) + (side % 2 == 0 ? 0 : n);
  }
  KD_HOST_DEVICE int64_t column_offset(int side) const { return offset(partner(side)); }
  KD_HOST_DEVICE int64_t total() const { return count / 2 * (n + m); }
};

inline AnnealedSides sides_of(const AnnealedArgs& args) {
  return {args.x.shape[2], args.y.shape[2], args.debias ? 4 : 2};
}

inline void check_annealed(const AnnealedArgs& args) {
  KD_CHECK(args.x.ndim == 3 && args.y.ndim == 3, "x: expected points (B, d, N), got ",
           shape_text(args.x));
  const DType dtype = args.x.dtype;
  KD_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64,
           "x: expected float32 or float64, got ", name(dtype));
  const AnnealedSides sides = sides_of(args);
  const int64_t batch = args.x.shape[0], dims = args.x.shape[1];
  const bool given = static_cast<bool>(args.costs[0]);
  KD_CHECK(given || dims <= kMostCoordinates, "costs: expected for points of ", dims,
           " coordinates");
  KD_CHECK(!args.epsilons.empty(), "epsilons: expected at least one");
  for (double epsilon : args.epsilons) {
    KD_CHECK(epsilon > 0, "epsilons: expected numbers > 0, got ", epsilon);
  }
  detail::check_dense(args.x, "x", {batch, dims, sides.n}, dtype);
  detail::check_dense(args.y, "y", {batch, dims, sides.m}, dtype);
  detail::check_dense(args.log_a, "log_a", {batch, sides.n}, dtype);
  detail::check_dense(args.log_b, "log_b", {batch, sides.m}, dtype);
  for (int side = 0; side < sides.count; ++side) {
    KD_CHECK(given == static_cast<bool>(args.costs[side]), "costs: expected of every side or none");
    detail::check_dense(args.costs[side], "costs", {batch, sides.rows(side), sides.columns(side)},
                        dtype);
  }
  detail::check_dense(args.potentials, "potentials", {batch, sides.total()}, dtype);
  detail::check_dense(args.slopes, "slopes", {batch, dims, sides.total()}, dtype);
  detail::check_dense(args.workspace, "workspace", {2, batch, sides.total()}, dtype);
  KD_CHECK(!(given && args.slopes), "slopes: expected none with costs");
}

}  // namespace kd
