// CUDA: a warp a row for narrow rows, a block a row for wide ones. The first walk brings the row
// pair from DRAM, the others find it in L1 or L2.
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "relation/feature_check.h"
#include "relation/feature_math.h"

namespace kd::cuda {
namespace {

using feature::Kind;
using feature::Normalize;
using feature::Side;

constexpr int kThreads = 256;
// Rows up to this width are served by a warp.
constexpr int64_t kWarpWidth = 1024;

template <int n>
struct FeatureSums {
  double value[n];
  KD_HOST_DEVICE FeatureSums() {
    for (int i = 0; i < n; ++i) value[i] = 0;
  }
  KD_HOST_DEVICE void merge(const FeatureSums& other) {
    for (int i = 0; i < n; ++i) value[i] += other.value[i];
  }
};

// A thread's shares in F, over the row's threads in double.
template <bool kWarp, int n, class F>
KD_DEVICE FeatureSums<n> row_sums(const F (&shares)[n]) {
  FeatureSums<n> sums;
  for (int i = 0; i < n; ++i) sums.value[i] = static_cast<double>(shares[i]);
  if constexpr (kWarp) return warp_reduce(sums);
  return block_reduce(sums);
}

// One side of a row and how it is read.
template <class T>
struct RowReader {
  using F = compute_t<T>;
  const T* entries;
  const F *mean, *inverse;
  F shift = F(0), rate = F(1);

  KD_DEVICE RowReader(const FeatureRows& call, int64_t row, bool is_teacher)
      : entries(static_cast<const T*>(is_teacher ? call.teacher : call.student) +
                row * (is_teacher ? call.teacher_stride : call.student_stride)),
        mean(nullptr),
        inverse(nullptr) {
    if (call.columns) {
      mean = static_cast<const F*>(call.columns) + (is_teacher ? 2 : 0) * call.column_plane +
             row / call.group_rows * call.width;
      inverse = mean + call.column_plane;
    }
  }
  KD_DEVICE F operator()(int64_t j) const {
    F x = to_float(entries[j]);
    if (mean) x = (x - mean[j]) * inverse[j];
    return (x - shift) * rate;
  }
  KD_DEVICE void set(const Side& side) {
    shift = static_cast<F>(side.shift), rate = static_cast<F>(side.rate);
  }
};

template <class T>
struct RowWriter {
  using F = compute_t<T>;
  T* narrow = nullptr;
  F* wide = nullptr;

  KD_DEVICE RowWriter(const FeatureRows& call, void* gradient, int64_t row) {
    if (!gradient) return;
    if (call.normalize == Normalize::kStandardize) {
      wide = static_cast<F*>(gradient) + row * call.width;
    } else {
      narrow = static_cast<T*>(gradient) + row * call.width;
    }
  }
  KD_DEVICE explicit operator bool() const { return narrow || wide; }
  KD_DEVICE void operator()(int64_t j, F value) const {
    if (narrow) narrow[j] = cast<T>(value);
    if (wide) wide[j] = value;
  }
};

// ---- kernels -----------------------------------------------------------------------------------

// kKind: an element kind, or kCosine for all vector kinds. Rows: kThreads / 32 (kWarp) or one a
// block.
template <Kind kKind, bool kWarp, class T>
__global__ void __launch_bounds__(kThreads, 2) feature_row_kernel(FeatureRows call) {
  using F = compute_t<T>;
  constexpr int kRows = kWarp ? kThreads / 32 : 1, kWidth = kThreads / kRows;
  constexpr bool kVector = !feature::is_element(kKind);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + (kWarp ? threadIdx.x / 32 : 0);
  const int64_t lane = threadIdx.x % kWidth;
  if (row >= call.count) return;  // a whole warp, or the whole block
  const RowWriter<T> to_s(call, call.student_gradient, row), to_t(call, call.teacher_gradient, row);
  F* elements = call.elements ? static_cast<F*>(call.elements) + row * call.width : nullptr;
  F* to_weight =
      call.weight_gradient ? static_cast<F*>(call.weight_gradient) + row * call.width : nullptr;
  if (call.mask && !call.mask[row * call.mask_stride]) {
    for (int64_t j = lane; j < call.width; j += kWidth) {
      if (elements) elements[j] = F(0);
      if (to_weight) to_weight[j] = F(0);
      to_s(j, F(0)), to_t(j, F(0));
    }
    if (call.rows && lane == 0) call.rows[row] = 0;
    return;
  }

  RowReader<T> s(call, row, false), t(call, row, true);
  Side side_s, side_t;
  const auto squares = [&] {
    F shares[2] = {F(0), F(0)};
    for (int64_t j = lane; j < call.width; j += kWidth) {
      const F x = s(j), y = t(j);
      shares[0] += x * x, shares[1] += y * y;
    }
    return row_sums<kWarp>(shares);
  };
  if (call.normalize == Normalize::kLayerNorm) {
    F shares[2] = {F(0), F(0)};
    for (int64_t j = lane; j < call.width; j += kWidth) shares[0] += s(j), shares[1] += t(j);
    const FeatureSums<2> sums = row_sums<kWarp>(shares);
    side_s.shift = sums.value[0] / static_cast<double>(call.width);
    side_t.shift = sums.value[1] / static_cast<double>(call.width);
    s.set(side_s), t.set(side_t);
  }
  if (call.normalize == Normalize::kLayerNorm || call.normalize == Normalize::kL2) {
    const FeatureSums<2> sums = squares();
    feature::set_rate(side_s, call.normalize, sums.value[0], call.width);
    feature::set_rate(side_t, call.normalize, sums.value[1], call.width);
    s.set(side_s), t.set(side_t);
  }
  const double factor = call.row_upstream ? call.row_upstream[row * call.row_upstream_stride] : 1.0;

  if constexpr (kVector) {
    const FeatureSums<2> norms = squares();
    side_s.unit = feature::inverse_norm(norms.value[0], &side_s.unit_floored);
    side_t.unit = feature::inverse_norm(norms.value[1], &side_t.unit_floored);
    const F unit_s = static_cast<F>(side_s.unit), unit_t = static_cast<F>(side_t.unit);
    F shares[4] = {F(0), F(0), F(0), F(0)};
    for (int64_t j = lane; j < call.width; j += kWidth) {
      const F u = s(j) * unit_s, v = t(j) * unit_t, gap = u - v;
      shares[0] += gap * gap, shares[1] += gap * u, shares[2] += gap * v, shares[3] += u * v;
    }
    const FeatureSums<4> sums = row_sums<kWarp>(shares);
    const feature::VectorValue found = feature::vector_value(
        call.kind, {sums.value[0], sums.value[1], sums.value[2], sums.value[3]}, side_s, side_t,
        call.margin);
    if (call.rows && lane == 0) call.rows[row] = found.value;
    if (!to_s && !to_t) return;
    const F scale_s = static_cast<F>(found.slope * factor * side_s.unit * side_s.rate);
    const F scale_t = static_cast<F>(found.slope * factor * side_t.unit * side_t.rate);
    const F tail_s = static_cast<F>(found.along_s), tail_t = static_cast<F>(found.along_t);
    for (int64_t j = lane; j < call.width; j += kWidth) {
      const F u = s(j) * unit_s, v = t(j) * unit_t;
      if (to_s) to_s(j, feature::vector_gradient(u, v, scale_s, tail_s));
      if (to_t) to_t(j, feature::vector_gradient(v, u, scale_t, tail_t));
    }
  } else {
    constexpr RelationKind kRho = feature::rho_of(kKind);
    const F beta = static_cast<F>(call.beta);
    const F* weight =
        call.weight ? static_cast<const F*>(call.weight) + row * call.weight_stride[0] : nullptr;
    const F* upstream = call.element_upstream
                            ? static_cast<const F*>(call.element_upstream) + row * call.width
                            : nullptr;
    // The gradient of element j by x - y.
    const auto slope = [&](F x, F y, int64_t j) {
      F share = upstream ? upstream[j] : static_cast<F>(factor);
      if (weight) share *= weight[j * call.weight_stride[1]];
      return share * relation::rho_slope<kRho>(x - y, beta, F(0));
    };
    // value, sum g, sum g x, sum g y
    F shares[4] = {F(0), F(0), F(0), F(0)};
    const bool gradients = to_s || to_t;
    for (int64_t j = lane; j < call.width; j += kWidth) {
      const F x = s(j), y = t(j);
      const F rho = relation::rho<kRho>(x - y, beta, F(0));
      shares[0] += weight ? rho * weight[j * call.weight_stride[1]] : rho;
      if (elements) elements[j] = rho;
      if (to_weight) to_weight[j] = rho * static_cast<F>(factor);
      if (gradients) {
        const F g = slope(x, y, j);
        shares[1] += g, shares[2] += g * x, shares[3] += g * y;
      }
    }
    const FeatureSums<4> sums = row_sums<kWarp>(shares);
    if (call.rows && lane == 0) call.rows[row] = sums.value[0];
    if (!gradients) return;
    const feature::Through ways[2] = {
        feature::through_normaliser(side_s, call.normalize, sums.value[1], sums.value[2],
                                    call.width),
        feature::through_normaliser(side_t, call.normalize, -sums.value[1], -sums.value[3],
                                    call.width)};
    const auto through = [&](int i, F g, F x) {
      return static_cast<F>(ways[i].rate) *
             ((g - static_cast<F>(ways[i].offset)) - static_cast<F>(ways[i].along) * x);
    };
    for (int64_t j = lane; j < call.width; j += kWidth) {
      const F x = s(j), y = t(j), g = slope(x, y, j);
      if (to_s) to_s(j, through(0, g, x));
      if (to_t) to_t(j, through(1, -g, y));
    }
  }
}

constexpr int kColumns = 32, kTokenLanes = kThreads / kColumns;

// Adds a thread's two numbers over the block's token lanes; every thread gets its column's sums.
KD_DEVICE void column_sums(double& a, double& b) {
  using Slots = double[2][kTokenLanes][kColumns];
  KD_SHARED(Slots, slots);
  slots[0][threadIdx.y][threadIdx.x] = a, slots[1][threadIdx.y][threadIdx.x] = b;
  __syncthreads();
  a = b = 0;
  for (int i = 0; i < kTokenLanes; ++i) {
    a += slots[0][i][threadIdx.x], b += slots[1][i][threadIdx.x];
  }
  __syncthreads();
}

// Blocks: 32 columns of one group (x), groups (y). Threads: 32 columns x 8 tokens.
template <class T>
__global__ void __launch_bounds__(kThreads) feature_column_kernel(FeatureColumns call) {
  using F = compute_t<T>;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const int64_t j = column < call.width ? column : call.width - 1;  // all threads meet the barriers
  for (int64_t group = blockIdx.y; group < call.groups; group += gridDim.y) {
    const T* tokens = static_cast<const T*>(call.tokens) + group * call.rows * call.width + j;
    F* mean = static_cast<F*>(call.columns) + group * call.width + j;
    F* inverse = mean + call.groups * call.width;
    const auto on = [&](int64_t r) {
      return !call.mask || call.mask[group * call.mask_stride[0] + r * call.mask_stride[1]] != 0;
    };
    const auto entry = [&](int64_t r) {
      return static_cast<double>(to_float(tokens[r * call.width]));
    };
    double first = 0, second = 0, count = 0, unused = 0;
    if (!call.gradient) {
      for (int64_t r = threadIdx.y; r < call.rows; r += kTokenLanes) {
        if (on(r)) first += entry(r), count += 1;
      }
      column_sums(first, count);
      const double centre = static_cast<double>(static_cast<F>(first / (count > 0 ? count : 1)));
      for (int64_t r = threadIdx.y; r < call.rows; r += kTokenLanes) {
        const double c = entry(r) - centre;
        if (on(r)) second += c * c;
      }
      column_sums(second, unused);
      if (threadIdx.y == 0 && column < call.width) {
        *mean = static_cast<F>(centre);
        *inverse = static_cast<F>(feature::inverse_deviation(second, count));
      }
      continue;
    }
    const F* gradient = static_cast<const F*>(call.gradient) + group * call.rows * call.width + j;
    T* out = static_cast<T*>(call.out) + group * call.rows * call.width + j;
    const double centre = static_cast<double>(*mean), scale = static_cast<double>(*inverse);
    for (int64_t r = threadIdx.y; r < call.rows; r += kTokenLanes) {
      if (!on(r)) continue;
      const double g = static_cast<double>(gradient[r * call.width]);
      first += g, second += g * (entry(r) - centre), count += 1;
    }
    column_sums(first, second);
    column_sums(count, unused);
    const double back = first / (count > 0 ? count : 1);
    const double along = feature::column_pull(scale, second, count);
    if (column >= call.width) continue;
    for (int64_t r = threadIdx.y; r < call.rows; r += kTokenLanes) {
      F value(0);
      if (on(r)) {
        const double g = static_cast<double>(gradient[r * call.width]);
        value = static_cast<F>(scale * (g - back) - along * (entry(r) - centre));
      }
      out[r * call.width] = cast<T>(value);
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------

template <class Fn>
void dispatch_rows(DType dtype, const Fn& fn) {
#if defined(__CUDACC__)
  KD_CHECK(dtype != DType::kFloat64, "student: CUDA kernels take no float64");
  dispatch_half_float(dtype, "student", fn);
#else
  dispatch_float(dtype, "student", fn);
#endif
}

template <Kind kKind>
void launch_feature_row(const FeatureRows& call, Stream stream) {
  dispatch_rows(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool warp = call.width <= kWarpWidth;
    const int64_t blocks = warp ? (call.count + kThreads / 32 - 1) / (kThreads / 32) : call.count;
    const LaunchInfo info{
        "feature_row",  dim3(static_cast<unsigned>(blocks)),
        dim3(kThreads), 0,
        stream,         "N=" + std::to_string(call.count) + ", d=" + std::to_string(call.width)};
    if (warp) {
      launch(info, feature_row_kernel<kKind, true, T>, call);
    } else {
      launch(info, feature_row_kernel<kKind, false, T>, call);
    }
  });
}

}  // namespace

// ---- entry points ------------------------------------------------------------------------------

void feature_rows(const FeatureArgs& args) {
  const FeatureRows call = resolve_feature(args);
  if (call.count == 0 || call.width == 0) return;
  const DeviceGuard guard(args.student.device_index);
  const Stream stream = static_cast<Stream>(args.stream);
  switch (call.kind) {
    case Kind::kMse:
      return launch_feature_row<Kind::kMse>(call, stream);
    case Kind::kL1:
      return launch_feature_row<Kind::kL1>(call, stream);
    case Kind::kSmoothL1:
      return launch_feature_row<Kind::kSmoothL1>(call, stream);
    case Kind::kHuber:
      return launch_feature_row<Kind::kHuber>(call, stream);
    default:
      return launch_feature_row<Kind::kCosine>(call, stream);
  }
}

void feature_columns(const FeatureColumnsArgs& args) {
  const FeatureColumns call = resolve_feature_columns(args);
  if (call.groups == 0 || call.width == 0) return;
  const DeviceGuard guard(args.tokens.device_index);
  const int64_t down = call.groups < 65535 ? call.groups : 65535;
  const LaunchInfo info{"feature_column",
                        dim3(static_cast<unsigned>((call.width + kColumns - 1) / kColumns),
                             static_cast<unsigned>(down)),
                        dim3(kColumns, kTokenLanes),
                        0,
                        static_cast<Stream>(args.stream),
                        "G=" + std::to_string(call.groups) + ", L=" + std::to_string(call.rows) +
                            ", d=" + std::to_string(call.width)};
  dispatch_rows(call.dtype,
                [&](auto tag) { launch(info, feature_column_kernel<decltype(tag)>, call); });
}

}  // namespace kd::cuda
