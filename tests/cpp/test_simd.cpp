// The SIMD layer of one ISA; this file is compiled once for each, test_simd_main.cpp runs them all.
// A test may include the standard library: every inline function here stays in this program.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "check_main.h"
#include "common/simd.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

void test_simd();

namespace {

using ::kd::detail::bits_float;
using ::kd::detail::float_bits;

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kTiny = 0x1p-126f;  // smallest normal number

// ---- elementary functions -----------------------------------------------------------------------

// Every `step`-th float between two numbers of one sign: each binade is swept as densely.
std::vector<float> sweep(float a, float b, uint32_t step) {
  const uint32_t first = std::min(float_bits(a), float_bits(b));
  const uint32_t last = std::max(float_bits(a), float_bits(b));
  std::vector<float> out;
  for (uint64_t bits = first; bits <= last; bits += step) {
    out.push_back(bits_float(static_cast<uint32_t>(bits)));
  }
  return out;
}

long double ulp_of(long double y) {
  const int exponent = std::max(std::ilogb(std::fabs(y)), -126);
  return std::ldexp(1.0L, exponent - 23);
}

struct Worst {
  double relative = 0, ulp = 0;
  float at = 0;
};

template <class Fast, class Exact>
Worst worst_error(const std::vector<float>& points, Fast fast, Exact exact) {
  Worst worst;
  for (size_t i = 0; i < points.size(); i += VecF::kLanes) {
    const int n = static_cast<int>(std::min<size_t>(VecF::kLanes, points.size() - i));
    float out[VecF::kLanes];
    store(out, fast(VecF::load_partial(&points[i], n, 1.0f)));
    for (int k = 0; k < n; ++k) {
      const long double y = exact(static_cast<long double>(points[i + k]));
      if (std::fabs(y) > std::numeric_limits<float>::max()) {
        CHECK_SHOW(out[k] == (y > 0 ? kInf : -kInf), points[i + k], out[k]);
        continue;
      }
      const long double error = std::fabs(out[k] - y);
      const double ulp = static_cast<double>(error / ulp_of(y));
      if (!(ulp <= worst.ulp)) worst.ulp = ulp, worst.at = points[i + k];
      if (y != 0) {
        const double relative = static_cast<double>(error / std::fabs(y));
        if (!(relative <= worst.relative)) worst.relative = relative;
      }
    }
  }
  return worst;
}

template <class Fast, class Exact>
void check_function(const char* name, Fast fast, Exact exact, double max_ulp, double max_relative,
                    float a, float b, uint32_t step = 4001) {
  const Worst worst = worst_error(sweep(a, b, step), fast, exact);
  std::printf("  %-18s [%11.4g, %11.4g]  %.3f ulp, %.3g relative\n", name, a, b, worst.ulp,
              worst.relative);
  CHECK_SHOW(worst.ulp <= max_ulp, worst.ulp, worst.at);
  CHECK_SHOW(worst.relative <= max_relative, worst.relative, worst.at);
}

template <class Fast>
float at(Fast fast, float x) {
  float out[VecF::kLanes];
  store(out, fast(VecF(x)));
  for (int k = 1; k < VecF::kLanes; ++k) CHECK(float_bits(out[k]) == float_bits(out[0]));
  return out[0];
}

bool is_nan_value(float x) {
  return x != x;
}

void test_exponentials() {
  const double no_limit = 1e30;
  const auto f_exp2 = [](VecF x) { return exp2(x); };
  const auto f_exp2n = [](VecF x) { return exp2_nonpositive(x); };
  const auto f_exp = [](VecF x) { return exp(x); };
  const auto f_expm1 = [](VecF x) { return expm1(x); };
  const auto e_exp2 = [](long double x) { return exp2l(x); };
  const auto e_exp = [](long double x) { return expl(x); };
  const auto e_expm1 = [](long double x) { return expm1l(x); };

  check_function("exp2", f_exp2, e_exp2, no_limit, 2.0e-7, 1e-30f, 127.99999f);
  check_function("exp2", f_exp2, e_exp2, no_limit, 2.0e-7, -1e-30f, -125.99999f);
  check_function("exp2", f_exp2, e_exp2, no_limit, 2.0e-7, 0.5f, 1.0f, 13);
  check_function("exp2_nonpositive", f_exp2n, e_exp2, no_limit, 2.0e-7, -1e-30f, -125.99999f);
  check_function("exp2_nonpositive", f_exp2n, e_exp2, no_limit, 2.0e-7, 1e-30f, 126.0f);
  check_function("exp", f_exp, e_exp, 1.5, no_limit, 1e-30f, 88.7228f);
  check_function("exp", f_exp, e_exp, 1.5, no_limit, -1e-30f, -104.0f);
  check_function("expm1", f_expm1, e_expm1, 2, 2.4e-7, 1e-30f, 88.7228f);
  check_function("expm1", f_expm1, e_expm1, 2, 2.4e-7, -1e-30f, -30.0f);
  check_function("expm1", f_expm1, e_expm1, 2, 2.4e-7, -0.25f, -0.5f, 13);

  for (int n = -126; n <= 127; ++n) CHECK(at(f_exp2, n) == std::ldexp(1.0f, n));
  for (int n = -126; n <= 0; ++n) CHECK(at(f_exp2n, n) == std::ldexp(1.0f, n));
  CHECK(at(f_exp2, 128.0f) == kInf && at(f_exp2, 1e30f) == kInf);
  CHECK(at(f_exp2, -150.5f) == 0 && at(f_exp2, -1e30f) == 0);
  CHECK(std::fabs(at(f_exp2, -126.5f) - std::exp2(-126.5f)) <= kTiny);
  CHECK(at(f_exp2n, -1e30f) == 0 && at(f_exp2n, -126.5f) <= kTiny && at(f_exp2n, -126.5f) >= 0);
  CHECK(at(f_exp, 88.73f) == kInf && at(f_exp, 1e30f) == kInf && at(f_exp, -1e30f) == 0);
  CHECK(at(f_expm1, 88.73f) == kInf && at(f_expm1, 1e30f) == kInf && at(f_expm1, -1e30f) == -1);
  for (const auto& f : {+f_exp2, +f_exp2n, +f_exp}) {
    CHECK(at(f, -kInf) == 0 && at(f, 0.0f) == 1 && at(f, -0.0f) == 1 && is_nan_value(at(f, kNan)));
  }
  CHECK(at(f_exp2, kInf) == kInf && at(f_exp, kInf) == kInf && at(f_expm1, kInf) == kInf);
  CHECK(at(f_expm1, -kInf) == -1 && at(f_expm1, 0.0f) == 0 && is_nan_value(at(f_expm1, kNan)));
  CHECK(at(f_expm1, 0x1p-149f) == 0x1p-149f);  // the smallest float is its own expm1
}

void test_logarithms() {
  const double no_limit = 1e30;
  const auto f_log = [](VecF x) { return log(x); };
  const auto f_log2 = [](VecF x) { return log2(x); };
  const auto f_log1p = [](VecF x) { return log1p(x); };
  const auto e_log = [](long double x) { return logl(x); };
  const auto e_log2 = [](long double x) { return log2l(x); };
  const auto e_log1p = [](long double x) { return log1pl(x); };
  const float largest = std::numeric_limits<float>::max();

  check_function("log", f_log, e_log, 1.5, no_limit, 0x1p-149f, largest);
  check_function("log", f_log, e_log, 1.5, no_limit, 0.5f, 2.0f, 37);
  check_function("log2", f_log2, e_log2, 2.2, no_limit, 0x1p-149f, largest);
  check_function("log2", f_log2, e_log2, 2.2, no_limit, 0.5f, 2.0f, 37);
  check_function("log1p", f_log1p, e_log1p, 2, no_limit, 0x1p-149f, largest);
  check_function("log1p", f_log1p, e_log1p, 2, no_limit, -0x1p-149f, -0.99999994f);
  check_function("log1p", f_log1p, e_log1p, 2, no_limit, -0.1f, -0.6f, 37);

  for (const auto& f : {+f_log, +f_log2}) {
    CHECK(at(f, 0.0f) == -kInf && at(f, -0.0f) == -kInf && at(f, kInf) == kInf && at(f, 1.0f) == 0);
    CHECK(is_nan_value(at(f, -1.0f)) && is_nan_value(at(f, -kInf)) && is_nan_value(at(f, kNan)));
    CHECK(is_nan_value(at(f, -0x1p-149f)));
  }
  for (int n = -149; n <= 127; ++n) CHECK(at(f_log2, std::ldexp(1.0f, n)) == n);
  const auto f_absolute = [](VecF x) { return log2_absolute(x); };
  for (float x = 0x1p-125f; x < 0x1p126f; x *= 1.00037f) {
    const double exact = std::log2(double(x));
    CHECK(std::fabs(at(f_absolute, x) - exact) <= 1.5e-7 * std::fmax(1.0, std::fabs(exact)));
  }
  for (float t = 0x1p-23f; t < 0.015f; t *= 1.37f) {  // near 1 the relative error is small too
    for (const float x : {1 + t, 1 - t}) {
      const double exact = std::log2(double(x));
      CHECK(std::fabs(at(f_absolute, x) - exact) <= 4e-7 * std::fabs(exact));
    }
  }
  for (float c : {-100.3f, -20.7f, 0.0f, 13.9f, 60.1f}) {
    for (float b : {-7.3f, -1e-3f, 0.0f, 2e-5f, 3.1f}) {
      const auto f_sum = [b](VecF x) { return exp2_sum(VecF(0.37f), VecF(b), x); };
      const double exact = std::exp2(double(0.37f) * double(b) + double(c));
      CHECK_SHOW(std::fabs(at(f_sum, c) - exact) <= 4e-7 * exact, b, c);
    }
  }
  const auto f_far = [](VecF x) { return exp2_sum(VecF(0.5f), VecF(-1e9f), x); };
  CHECK(at(f_far, 0.0f) == 0 && at(f_far, -1e9f) == 0);
  CHECK(at(f_absolute, 0.0f) == -kInf && at(f_absolute, kInf) == kInf);
  CHECK(is_nan_value(at(f_absolute, -1.0f)) && is_nan_value(at(f_absolute, kNan)));
  CHECK(at(f_log1p, 0.0f) == 0 && at(f_log1p, -1.0f) == -kInf && at(f_log1p, kInf) == kInf);
  CHECK(is_nan_value(at(f_log1p, -1.5f)) && is_nan_value(at(f_log1p, kNan)));
  CHECK(is_nan_value(at(f_log1p, -kInf)));
}

void test_pow_and_sqrt() {
  const auto power = [](float x, float y) {
    return at([y](VecF v) { return pow(v, VecF(y)); }, x);
  };
  for (float x : {0.01f, 0.3f, 1.0f, 2.5f, 80.0f}) {
    for (float y : {-3.0f, -0.5f, 0.25f, 0.5f, 1.0f, 2.0f, 7.0f}) {
      const double exact = std::pow(double(x), double(y));
      const double bound = (3 + std::fabs(y * std::log2(double(x)))) * 0x1p-24;
      CHECK_SHOW(std::fabs(power(x, y) - exact) <= bound * exact, x, y);
    }
  }
  CHECK(power(0.0f, 0.0f) == 1 && power(kInf, 0.0f) == 1 && power(0.0f, 0.5f) == 0);
  CHECK(power(0.0f, -1.0f) == kInf && is_nan_value(power(-1.0f, 0.5f)));
  for (float x : {0.0f, 2.0f, 3e-40f, 1e38f}) {
    CHECK(at([](VecF v) { return sqrt(v); }, x) == std::sqrt(x));
  }
}

// ---- conversions --------------------------------------------------------------------------------

template <class T>
void check_conversions() {
  constexpr int kLanes = VecF::kLanes;
  T in[kLanes], back[2 * kLanes];
  float wide[kLanes];
  for (uint32_t start = 0; start < 65536; start += kLanes) {
    for (int i = 0; i < kLanes; ++i) in[i].bits = static_cast<uint16_t>(start + i);
    const VecF v = VecF::load(in);
    store(wide, v);
    store(back, v);
    for (int i = 0; i < kLanes; ++i) {
      const float expected = to_float(in[i]);
      if (is_nan_value(expected)) {  // signalling NaN may become quiet on the way
        CHECK(is_nan_value(wide[i]) && is_nan_value(to_float(back[i])));
        CHECK((back[i].bits & 0x8000) == (in[i].bits & 0x8000));
      } else {
        CHECK_SHOW(float_bits(wide[i]) == float_bits(expected), wide[i], expected);
        CHECK_SHOW(back[i].bits == in[i].bits, back[i].bits, in[i].bits);
      }
    }
  }
  std::mt19937 random(7);
  for (int round = 0; round < 30000; ++round) {
    float x[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) {
      uint32_t bits = random();
      // Halfway patterns often, so that ties to even and carries are met.
      if (i % 3 == 0) bits = (bits & 0xffff0000u) | 0x8000u;
      if (i % 3 == 1) bits = (bits & 0xffffe000u) | (random() % 3 ? 0x1000u : 0x0fffu);
      if (i % 5 == 4) bits = (bits & 0x87ffffffu) | 0x38000000u;  // near 1: f16 stays finite
      x[i] = bits_float(bits);
    }
    T single[2 * kLanes];
    alignas(kStreamAlignment) T pair[2 * kLanes], halves[2 * kLanes];
    const VecF a = VecF::load(x), b = VecF::load(x + kLanes);
    store(single, a), store(single + kLanes, b);
    stream2(pair, a, b);
    stream(halves, a), stream(halves + kLanes, b);
    stream_fence();
    for (int i = 0; i < 2 * kLanes; ++i) {
      CHECK(single[i].bits == pair[i].bits && single[i].bits == halves[i].bits);
      if (is_nan_value(x[i])) {
        CHECK(is_nan_value(to_float(single[i])));
      } else {
        CHECK_SHOW(single[i].bits == from_float<T>(x[i]).bits, x[i], to_float(single[i]));
      }
    }
  }
}

// ---- memory -------------------------------------------------------------------------------------

// Two pages of which the second may not be touched.
class GuardedPage {
 public:
  GuardedPage() : size_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory =
        mmap(nullptr, 2 * size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    base_ = static_cast<char*>(memory);
    CHECK(mprotect(base_ + size_, size_, PROT_NONE) == 0);
  }
  ~GuardedPage() { munmap(base_, 2 * size_); }

  template <class T>
  T* last(int64_t count) const {  // the last `count` elements before the guard
    return reinterpret_cast<T*>(base_ + size_) - count;
  }

 private:
  size_t size_;
  char* base_;
};

template <class V, class T>
void check_partial() {
  using S = typename V::Scalar;
  const GuardedPage page;
  for (int n = 0; n <= V::kLanes; ++n) {
    T* const p = page.last<T>(n + 2);
    for (int i = 0; i < n + 2; ++i) p[i] = cast<T>(S(100 + i));
    S out[V::kLanes];

    store(out, V::load_partial(p + 2, n, S(-7)));
    for (int i = 0; i < V::kLanes; ++i) CHECK(out[i] == (i < n ? S(102 + i) : S(-7)));

    store_partial(p + 2, V::iota(), n);
    for (int i = 0; i < n + 2; ++i) {
      CHECK(S(to_float(p[i])) == (i < 2 ? S(100 + i) : S(i - 2)));
    }
    // Inside the page: the element right after the tail keeps its value.
    store_partial(p, V(S(9)), n);
    for (int i = 0; i < n + 2; ++i) {
      CHECK(S(to_float(p[i])) == (i < n ? S(9) : i < 2 ? S(100 + i) : S(i - 2)));
    }
    typename V::Mask mask = V::Mask::first(n);
    CHECK(any(mask) == (n > 0) && none(mask) == (n == 0) && all(mask) == (n == V::kLanes));
  }
  T* const whole = page.last<T>(V::kLanes);  // ends exactly at the guard
  store(whole, V::iota());
  CHECK(all(V::load(whole) == V::iota()));
}

template <class V>
void check_stream() {
  using S = typename V::Scalar;
  alignas(kStreamAlignment) S out[3 * V::kLanes] = {};
  CHECK(is_aligned(out) && !is_aligned(out + 1));
  stream(out, V::iota());
  stream2(out + (V::kLanes * sizeof(S) == 64 ? V::kLanes : 0), V::iota(), V::iota() + V(S(1)));
  stream_fence();
  const S* p = out + (V::kLanes * sizeof(S) == 64 ? V::kLanes : 0);
  for (int i = 0; i < V::kLanes; ++i) {
    CHECK(out[i] == S(i) && p[i] == S(i) && p[V::kLanes + i] == S(i + 1));
  }
}

// ---- lanes --------------------------------------------------------------------------------------

template <class V>
void check_lanes() {
  using S = typename V::Scalar;
  constexpr int kLanes = V::kLanes;
  const S inf = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
  const V i = V::iota();

  CHECK(all(i + i == i * S(2)) && all(i - i == V::zero()) && all(-i + i == V::zero()));
  CHECK(all((i + S(1)) / (i + S(1)) == V(S(1))) && all(V(S(7)) / S(2) == V(S(3.5))));
  V sum = i;
  sum += i, sum *= S(3), sum -= i;
  CHECK(all(sum == i * S(5)));
  CHECK(all(fma(i, i, V(S(1))) == i * i + S(1)) && all(fms(i, i, V(S(1))) == i * i - S(1)));
  CHECK(all(fnma(i, i, V(S(1))) == S(1) - i * i));
  CHECK(all(abs(i - S(3)) == max(i - S(3), S(3) - i)) && all(abs(V(-inf)) == V(inf)));

  const typename V::Mask low = i < V(S(kLanes / 2));
  CHECK(any(low) && !all(low) && !none(low) && all(low | !low) && none(low & !low));
  CHECK(all(low ^ !low) && none(low ^ low));
  CHECK(all((i <= V(S(1))) ^ (i > V(S(1)))) && all((i >= V(S(1))) ^ (i < V(S(1)))));
  CHECK(reduce_add(select(low, V(S(1)), V::zero())) == S(kLanes / 2));
  // select is a blend: NaN on the side that is not taken does not leak.
  CHECK(reduce_add(select(low, V(S(2)), select(low, V(nan), V(S(1))))) == S(kLanes / 2 * 3));

  const V n(nan);
  CHECK(none(n < n) && none(n == n) && none(n >= n) && all(n != n));
  CHECK(all(is_nan(n)) && none(is_nan(V(inf))) && none(is_nan(i)));
  CHECK(none(is_finite(n)) && none(is_finite(V(inf))) && none(is_finite(V(-inf))));
  CHECK(all(is_finite(i)) && all(is_finite(V(std::numeric_limits<S>::max()))));
  CHECK(all(is_finite(V(std::numeric_limits<S>::denorm_min()))));
  // min and max return their second argument wherever either one is NaN.
  CHECK(all(max(n, i) == i) && all(min(n, i) == i));
  CHECK(all(is_nan(max(i, n))) && all(is_nan(min(i, n))));
  CHECK(all(max(V(-inf), i) == i) && all(min(V(inf), i) == i));

  CHECK(reduce_add(i) == S(kLanes * (kLanes - 1) / 2));
  for (int k = 0; k < kLanes; ++k) {
    S values[kLanes] = {};
    values[k] = S(5);
    CHECK(reduce_max(V::load(values)) == S(5) && reduce_min(V::load(values)) == S(0));
    CHECK(reduce_add(V::load(values)) == S(5) && reduce_add_double(V::load(values)) == 5.0);
    values[k] = S(-5);
    CHECK(reduce_max(V::load(values)) == S(0) && reduce_min(V::load(values)) == S(-5));
    values[k] = nan;
    CHECK(std::isnan(reduce_add(V::load(values))));
  }
}

void check_reduction_order() {
  constexpr int kLanes = VecF::kLanes;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 1000; ++round) {
    float x[kLanes], fold[kLanes];
    double sum = 0, magnitude = 0;
    for (int i = 0; i < kLanes; ++i) {
      x[i] = fold[i] = normal(random);
      sum += x[i], magnitude += std::fabs(x[i]);
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) fold[i] = fold[i] + fold[i + width];
    }
    CHECK(reduce_add(VecF::load(x)) == fold[0]);
    CHECK(std::fabs(reduce_add_double(VecF::load(x)) - sum) <= 1e-15 * magnitude);
    double pairs[VecD::kLanes];
    store(pairs, widen_sum(VecF::load(x)));
    for (int i = 0; i < VecD::kLanes; ++i) CHECK(pairs[i] == double(x[i]) + x[i + kLanes / 2]);
  }
}

void test_double_functions() {
  double out[VecD::kLanes];
  for (double x : {-30.0, -1.0, 1e-9, 0.3, 1.0, 20.0}) {
    const auto close = [&](VecD v, double expected) {
      store(out, v);
      for (double y : out) CHECK_SHOW(std::fabs(y - expected) <= 4e-16 * std::fabs(expected), y, x);
    };
    close(exp2(VecD(x)), std::exp2(x));
    close(exp2_nonpositive(VecD(x)), std::exp2(x));
    close(exp(VecD(x)), std::exp(x));
    close(expm1(VecD(x)), std::expm1(x));
    close(sqrt(VecD(x * x)), std::sqrt(x * x));
    if (x <= 0) continue;
    close(log(VecD(x)), std::log(x));
    close(log2(VecD(x)), std::log2(x));
    close(log1p(VecD(x)), std::log1p(x));
    close(pow(VecD(x), VecD(1.5)), std::pow(x, 1.5));
  }
}

}  // namespace

void test_simd() {
  std::printf("%d float lanes\n", VecF::kLanes);
  test_exponentials();
  test_logarithms();
  test_pow_and_sqrt();
  check_conversions<bf16>();
  check_conversions<f16>();
  check_partial<VecF, float>();
  check_partial<VecF, bf16>();
  check_partial<VecF, f16>();
  check_partial<VecD, double>();
  check_stream<VecF>();
  check_stream<VecD>();
  check_lanes<VecF>();
  check_lanes<VecD>();
  check_reduction_order();
  test_double_functions();
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
