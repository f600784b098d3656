// The feature loops against SIMD lanes, compiled once per ISA. A row pair is read from memory by
// its first walk and lies in cache for the others.
#include "relation/feature_math.h"
#include "relation/feature_rows.h"
#include "relation/lane_sum.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

using feature::Kind;
using feature::Normalize;
using feature::Side;

constexpr int64_t kBlock = 512;

// One side of a row and how it is read.
template <class T>
struct Reader {
  using V = Lanes<T>;
  using F = typename V::Scalar;
  const T* entries;  // (d)
  const F* mean;     // (d) standardize, else none
  const F* inverse;  // (d)
  const T* next;     // the following row: rows are short, hardware does not look past a page
  V shift = V::zero(), rate = V(F(1));

  // x of the lanes from column j; lanes past the end are 0.
  KD_LANES V operator()(int64_t j, int64_t n) const {
    V x = load_lanes<V>(entries + j, n);
    if (mean) x = (x - load_lanes<V>(mean + j, n)) * load_lanes<V>(inverse + j, n);
    x = (x - shift) * rate;
    return n == V::kLanes ? x : select(V::Mask::first(n), x, V::zero());
  }
  KD_LANES void prefetch_next(int64_t j) const { prefetch(next + j); }
  KD_LANES void set(const Side& side) {
    shift = V(static_cast<F>(side.shift)), rate = V(static_cast<F>(side.rate));
  }
};

// Calls fn(j, n) for the vectors of a row and flush() after each block of columns.
template <class V, class Fn, class Flush>
KD_LANES void each_vector(int64_t width, const Fn& fn, const Flush& flush) {
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t end = begin + kBlock < width ? begin + kBlock : width;
    for (int64_t j = begin; j < end; j += V::kLanes) {
      fn(j, end - j < V::kLanes ? end - j : int64_t{V::kLanes});
    }
    flush();
  }
}

template <class T>
KD_LANES Reader<T> reader_of(const FeatureRows& call, int64_t row, bool is_teacher) {
  using F = typename Reader<T>::F;
  const void* data = is_teacher ? call.teacher : call.student;
  const int64_t stride = is_teacher ? call.teacher_stride : call.student_stride;
  const T* entries = static_cast<const T*>(data) + row * stride;
  Reader<T> out{entries, nullptr, nullptr, row + 1 < call.count ? entries + stride : entries};
  if (call.columns) {
    out.mean = static_cast<const F*>(call.columns) + (is_teacher ? 2 : 0) * call.column_plane +
               row / call.group_rows * call.width;
    out.inverse = out.mean + call.column_plane;
  }
  return out;
}

// Means, norms and unit norms of both sides, by up to three walks.
template <bool kVector, class T>
KD_LANES void normalise(const FeatureRows& call, Reader<T>& s, Reader<T>& t, Side& side_s,
                        Side& side_t) {
  using V = Lanes<T>;
  Sum<V> a, b;
  const auto flush = [&] { a.flush(), b.flush(); };
  if (call.normalize == Normalize::kLayerNorm) {
    each_vector<V>(
        call.width, [&](int64_t j, int64_t n) { a.add(s(j, n)), b.add(t(j, n)); }, flush);
    side_s.shift = a.total / static_cast<double>(call.width);
    side_t.shift = b.total / static_cast<double>(call.width);
    s.set(side_s), t.set(side_t);
  }
  const auto squares = [&] {
    a.total = b.total = 0;
    each_vector<V>(
        call.width,
        [&](int64_t j, int64_t n) {
          const V x = s(j, n), y = t(j, n);
          a.add(x * x), b.add(y * y);
          s.prefetch_next(j), t.prefetch_next(j);
        },
        flush);
  };
  if (call.normalize == Normalize::kLayerNorm || call.normalize == Normalize::kL2) {
    squares();
    feature::set_rate(side_s, call.normalize, a.total, call.width);
    feature::set_rate(side_t, call.normalize, b.total, call.width);
    s.set(side_s), t.set(side_t);
  }
  if constexpr (kVector) {
    squares();
    side_s.unit = feature::inverse_norm(a.total, &side_s.unit_floored);
    side_t.unit = feature::inverse_norm(b.total, &side_t.unit_floored);
  }
}

// Where a side's gradient goes: in the rows' dtype, or in the compute dtype for standardize.
template <class T>
struct Writer {
  using V = Lanes<T>;
  using F = typename V::Scalar;
  T* narrow = nullptr;
  F* wide = nullptr;

  KD_LANES Writer(const FeatureRows& call, void* gradient, int64_t row) {
    if (!gradient) return;
    if (call.normalize == Normalize::kStandardize) {
      wide = static_cast<F*>(gradient) + row * call.width;
    } else {
      narrow = static_cast<T*>(gradient) + row * call.width;
    }
  }
  KD_LANES explicit operator bool() const { return narrow || wide; }
  KD_LANES void operator()(int64_t j, int64_t n, V value) const {
    if (narrow) store_lanes(narrow + j, value, n);
    if (wide) store_lanes(wide + j, value, n);
  }
  KD_LANES void clear(int64_t width) const {
    if (narrow) memset(narrow, 0, static_cast<size_t>(width) * sizeof(T));
    if (wide) memset(wide, 0, static_cast<size_t>(width) * sizeof(F));
  }
};

// The coefficients of feature::Through as lanes.
template <class V>
struct ThroughLanes {
  V rate, offset, along;
  KD_LANES explicit ThroughLanes(const feature::Through& x)
      : rate(static_cast<typename V::Scalar>(x.rate)),
        offset(static_cast<typename V::Scalar>(x.offset)),
        along(static_cast<typename V::Scalar>(x.along)) {}
  KD_LANES V operator()(V g, V x) const { return rate * ((g - offset) - along * x); }
};

template <Kind kKind, class T>
KD_LANES void element_row(const FeatureRows& call, int64_t row, const Writer<T>& to_s,
                          const Writer<T>& to_t) {
  using V = Lanes<T>;
  using F = typename V::Scalar;
  constexpr RelationKind kRho = feature::rho_of(kKind);
  Reader<T> s = reader_of<T>(call, row, false), t = reader_of<T>(call, row, true);
  Side side_s, side_t;
  normalise<false>(call, s, t, side_s, side_t);
  const V beta(static_cast<F>(call.beta)), none = V::zero();
  const F* weight =
      call.weight ? static_cast<const F*>(call.weight) + row * call.weight_stride[0] : nullptr;
  const F* upstream = call.element_upstream
                          ? static_cast<const F*>(call.element_upstream) + row * call.width
                          : nullptr;
  const F factor =
      call.row_upstream ? static_cast<F>(call.row_upstream[row * call.row_upstream_stride]) : F(1);
  F* elements = call.elements ? static_cast<F*>(call.elements) + row * call.width : nullptr;
  F* to_weight =
      call.weight_gradient ? static_cast<F*>(call.weight_gradient) + row * call.width : nullptr;
  const auto weight_at = [&](int64_t j, int64_t n) {
    if (call.weight_stride[1] == 1) return load_lanes<V>(weight + j, n);
    F gathered[V::kLanes] = {};
    for (int64_t i = 0; i < n; ++i) gathered[i] = weight[(j + i) * call.weight_stride[1]];
    return V::load(gathered);
  };
  // The element's own upstream.
  const auto share = [&](int64_t j, int64_t n) {
    V out = upstream ? load_lanes<V>(upstream + j, n) : V(factor);
    if (weight) out *= weight_at(j, n);
    return out;
  };
  const bool gradients = to_s || to_t;
  const bool sums =
      gradients && (call.normalize == Normalize::kL2 || call.normalize == Normalize::kLayerNorm);
  Sum<V> value, g_sum, gx, gy;
  if (call.rows || elements || to_weight || sums) {
    each_vector<V>(
        call.width,
        [&](int64_t j, int64_t n) {
          const V x = s(j, n), y = t(j, n);
          const V rho = relation::rho<kRho>(x - y, beta, none);
          s.prefetch_next(j), t.prefetch_next(j);
          value.add(weight ? rho * weight_at(j, n) : rho);
          if (elements) store_lanes(elements + j, rho, n);
          if (to_weight) store_lanes(to_weight + j, rho * V(factor), n);
          if (sums) {
            const V g = share(j, n) * relation::rho_slope<kRho>(x - y, beta, none);
            g_sum.add(g), gx.add(g * x), gy.add(g * y);
          }
        },
        [&] { value.flush(), g_sum.flush(), gx.flush(), gy.flush(); });
  }
  if (call.rows) call.rows[row] = value.total;
  if (!gradients) return;
  const ThroughLanes<V> through_s(
      feature::through_normaliser(side_s, call.normalize, g_sum.total, gx.total, call.width));
  const ThroughLanes<V> through_t(
      feature::through_normaliser(side_t, call.normalize, -g_sum.total, -gy.total, call.width));
  each_vector<V>(
      call.width,
      [&](int64_t j, int64_t n) {
        const V x = s(j, n), y = t(j, n);
        const V g = share(j, n) * relation::rho_slope<kRho>(x - y, beta, none);
        if (to_s) to_s(j, n, through_s(g, x));
        if (to_t) to_t(j, n, through_t(-g, y));
      },
      [] {});
}

template <class T>
KD_LANES void vector_row(const FeatureRows& call, int64_t row, const Writer<T>& to_s,
                         const Writer<T>& to_t) {
  using V = Lanes<T>;
  using F = typename V::Scalar;
  Reader<T> s = reader_of<T>(call, row, false), t = reader_of<T>(call, row, true);
  Side side_s, side_t;
  normalise<true>(call, s, t, side_s, side_t);
  const V unit_s(static_cast<F>(side_s.unit)), unit_t(static_cast<F>(side_t.unit));
  Sum<V> square, along_s, along_t, inner;
  each_vector<V>(
      call.width,
      [&](int64_t j, int64_t n) {
        const V u = s(j, n) * unit_s, v = t(j, n) * unit_t, gap = u - v;
        square.add(gap * gap), along_s.add(gap * u), along_t.add(gap * v), inner.add(u * v);
      },
      [&] { square.flush(), along_s.flush(), along_t.flush(), inner.flush(); });
  const feature::VectorValue found =
      feature::vector_value(call.kind, {square.total, along_s.total, along_t.total, inner.total},
                            side_s, side_t, call.margin);
  if (call.rows) call.rows[row] = found.value;
  if (!to_s && !to_t) return;
  const double factor = found.slope * call.row_upstream[row * call.row_upstream_stride];
  const V scale_s(static_cast<F>(factor * side_s.unit * side_s.rate));
  const V scale_t(static_cast<F>(factor * side_t.unit * side_t.rate));
  const V tail_s(static_cast<F>(found.along_s)), tail_t(static_cast<F>(found.along_t));
  each_vector<V>(
      call.width,
      [&](int64_t j, int64_t n) {
        const V u = s(j, n) * unit_s, v = t(j, n) * unit_t;
        if (to_s) to_s(j, n, feature::vector_gradient(u, v, scale_s, tail_s));
        if (to_t) to_t(j, n, feature::vector_gradient(v, u, scale_t, tail_t));
      },
      [] {});
}

template <class T>
void run_rows(const FeatureRows& call, int64_t begin, int64_t end) {
  using F = typename Reader<T>::F;
  for (int64_t row = begin; row < end; ++row) {
    const Writer<T> to_s(call, call.student_gradient, row), to_t(call, call.teacher_gradient, row);
    if (call.mask && !call.mask[row * call.mask_stride]) {
      const size_t bytes = static_cast<size_t>(call.width) * sizeof(F);
      if (call.rows) call.rows[row] = 0;
      if (call.elements) memset(static_cast<F*>(call.elements) + row * call.width, 0, bytes);
      if (call.weight_gradient) {
        memset(static_cast<F*>(call.weight_gradient) + row * call.width, 0, bytes);
      }
      to_s.clear(call.width), to_t.clear(call.width);
      continue;
    }
    switch (call.kind) {
      case Kind::kMse:
        element_row<Kind::kMse, T>(call, row, to_s, to_t);
        break;
      case Kind::kL1:
        element_row<Kind::kL1, T>(call, row, to_s, to_t);
        break;
      case Kind::kSmoothL1:
        element_row<Kind::kSmoothL1, T>(call, row, to_s, to_t);
        break;
      case Kind::kHuber:
        element_row<Kind::kHuber, T>(call, row, to_s, to_t);
        break;
      default:
        vector_row<T>(call, row, to_s, to_t);
    }
  }
}

// One strip of columns of one group: sums over its tokens in lanes, tokens in order.
template <class T>
void run_strip(const FeatureColumns& call, int64_t group, int64_t first, int64_t last) {
  using V = Lanes<T>;
  using F = typename V::Scalar;
  const T* tokens = static_cast<const T*>(call.tokens) + group * call.rows * call.width;
  F* mean = static_cast<F*>(call.columns) + group * call.width;
  F* inverse = mean + call.groups * call.width;
  const auto on = [&](int64_t r) {
    return !call.mask || call.mask[group * call.mask_stride[0] + r * call.mask_stride[1]] != 0;
  };
  double count = 0;
  for (int64_t r = 0; r < call.rows; ++r) count += on(r) ? 1 : 0;
  // Adds fn(r, j, n) over the selected tokens, column by column, into totals.
  constexpr int64_t kTokens = 64;  // added in lanes before they go to doubles
  double totals[2][V::kLanes];
  const auto sum = [&](int64_t j, int64_t n, const auto& fn) {
    memset(totals, 0, sizeof(totals));
    for (int64_t begin = 0; begin < call.rows; begin += kTokens) {
      const int64_t end = begin + kTokens < call.rows ? begin + kTokens : call.rows;
      V a = V::zero(), b = V::zero();
      for (int64_t r = begin; r < end; ++r) {
        if (on(r)) fn(r, j, n, &a, &b);
      }
      F lanes[2][V::kLanes];
      store(lanes[0], a), store(lanes[1], b);
      for (int i = 0; i < V::kLanes; ++i) {
        totals[0][i] += static_cast<double>(lanes[0][i]);
        totals[1][i] += static_cast<double>(lanes[1][i]);
      }
    }
  };
  const auto entry = [&](int64_t r, int64_t j, int64_t n) {
    return load_lanes<V>(tokens + r * call.width + j, n);
  };
  for (int64_t j = first; j < last; j += V::kLanes) {
    const int64_t n = last - j < V::kLanes ? last - j : int64_t{V::kLanes};
    if (!call.gradient) {
      sum(j, n, [&](int64_t r, int64_t at, int64_t m, V* a, V*) { *a += entry(r, at, m); });
      for (int64_t i = 0; i < n; ++i) {
        mean[j + i] = static_cast<F>(totals[0][i] / (count > 0 ? count : 1));
      }
      const V centre = load_lanes<V>(mean + j, n);
      sum(j, n, [&](int64_t r, int64_t at, int64_t m, V* a, V*) {
        const V c = entry(r, at, m) - centre;
        *a += c * c;
      });
      for (int64_t i = 0; i < n; ++i) {
        inverse[j + i] = static_cast<F>(feature::inverse_deviation(totals[0][i], count));
      }
      continue;
    }
    const F* gradient = static_cast<const F*>(call.gradient) + group * call.rows * call.width;
    T* out = static_cast<T*>(call.out) + group * call.rows * call.width;
    const V centre = load_lanes<V>(mean + j, n), scale = load_lanes<V>(inverse + j, n);
    sum(j, n, [&](int64_t r, int64_t at, int64_t m, V* a, V* b) {
      const V g = load_lanes<V>(gradient + r * call.width + at, m);
      *a += g;
      *b += g * (entry(r, at, m) - centre);
    });
    F offset[V::kLanes] = {}, pull[V::kLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      offset[i] = static_cast<F>(totals[0][i] / (count > 0 ? count : 1));
      pull[i] = static_cast<F>(
          feature::column_pull(static_cast<double>(inverse[j + i]), totals[1][i], count));
    }
    const V back = V::load(offset), along = V::load(pull);
    for (int64_t r = 0; r < call.rows; ++r) {
      V value = V::zero();
      if (on(r)) {
        const V g = load_lanes<V>(gradient + r * call.width + j, n);
        value = scale * (g - back) - along * (entry(r, j, n) - centre);
      }
      store_lanes(out + r * call.width + j, value, n);
    }
  }
}

template <class T>
void run_strips(const FeatureColumns& call, int64_t begin, int64_t end) {
  const int64_t strips = (call.width + kFeatureStrip - 1) / kFeatureStrip;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i % strips * kFeatureStrip;
    const int64_t last = first + kFeatureStrip < call.width ? first + kFeatureStrip : call.width;
    run_strip<T>(call, i / strips, first, last);
  }
}

}  // namespace

void feature_row_range(const FeatureRows& call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DType::kFloat64:
      return run_rows<double>(call, begin, end);
    case DType::kFloat16:
      return run_rows<f16>(call, begin, end);
    case DType::kBFloat16:
      return run_rows<bf16>(call, begin, end);
    default:
      return run_rows<float>(call, begin, end);
  }
}

void feature_column_range(const FeatureColumns& call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DType::kFloat64:
      return run_strips<double>(call, begin, end);
    case DType::kFloat16:
      return run_strips<f16>(call, begin, end);
    case DType::kBFloat16:
      return run_strips<bf16>(call, begin, end);
    default:
      return run_strips<float>(call, begin, end);
  }
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
