// Online softmax statistics and the reduction ladder against long double.
#include <random>

#include "check.h"
#include "common/online.h"
#include "common/reduce.cuh"

namespace kd {
namespace {

using test::Buffer;
using test::for_each_order;
using test::run;

struct Exact {
  long double lse = -INFINITY;
  long double mean = NAN;
};

// Of x in log2 units; lse is natural.
template <class F>
Exact exact(const std::vector<F>& x, const std::vector<F>& w) {
  long double m = -INFINITY, sum = 0, weighted = 0;
  for (F v : x) m = std::max(m, static_cast<long double>(v));
  if (std::isinf(m)) return {};
  for (size_t i = 0; i < x.size(); ++i) {
    const long double e = std::exp2(static_cast<long double>(x[i]) - m);
    sum += e;
    if (e > 0) weighted += e * w[i];
  }
  return {(m + std::log2(sum)) * std::log(2.0L), weighted / sum};
}

template <class F>
OnlineSums<F, 2> by_elements(const std::vector<F>& x, const std::vector<F>& w) {
  OnlineSums<F, 2> sums;
  for (size_t i = 0; i < x.size(); ++i) {
    const F weight[1] = {w[i]};
    sums.push(x[i], weight);
  }
  return sums;
}

template <class F>
OnlineSums<F, 2> by_chunks(const std::vector<F>& x, const std::vector<F>& w) {
  OnlineSums<F, 2> parts[4];
  for (size_t i = 0; i < x.size(); i += 4) {
    F chunk[4], weights[1][4];
    for (size_t j = 0; j < 4; ++j) {
      chunk[j] = i + j < x.size() ? x[i + j] : F(-INFINITY);
      weights[0][j] = i + j < x.size() ? w[i + j] : F(NAN);  // the weight of nothing: ignored
    }
    parts[i / 4 % 4].push_chunk(chunk, weights);
  }
  for (int p = 1; p < 4; ++p) parts[0].merge(parts[p]);
  return parts[0];
}

// Sums of n terms in F: relative error of the sum up to n eps / 2 in the worst case; the mean is
// relative to the size of the weights.
template <class F>
void check_against_exact(double eps) {
  std::mt19937 random(7);
  for (int n : {1, 2, 17, 1000}) {
    for (double scale : {0.0, 1.0, 30.0, 400.0}) {  // up to gaps that underflow
      std::vector<F> x(n), w(n);
      std::normal_distribution<double> normal(0, 1);
      for (int i = 0; i < n; ++i) {
        x[i] = static_cast<F>(scale * normal(random) + 3);
        w[i] = static_cast<F>(normal(random));
        if (n > 2 && i % 5 == 0) x[i] = F(-INFINITY);
      }
      const Exact want = exact(x, w);
      for (const OnlineSums<F, 2>& got : {by_elements(x, w), by_chunks(x, w)}) {
        const double size = std::max(1.0, std::fabs(static_cast<double>(want.lse)));
        CHECK_NEAR(got.lse(), want.lse, (n / 2 + 8) * eps * size);
        CHECK_NEAR(got.finish(), got.lse2() * 0.6931471805599453, 8 * eps * size);
        CHECK_NEAR(got.mean(1), want.mean, 4 * (n + 8) * eps);
      }
    }
  }
}

TEST(statistics_agree_with_long_double) {
  check_against_exact<float>(6e-8);
  check_against_exact<double>(1.2e-16);
}

template <class F>
void check_corners() {
  const F inf = F(INFINITY);
  const auto lse = [](const std::vector<F>& x) {
    OnlineSums<F> sums, left, right;
    for (F v : x) sums.push(v);
    for (size_t i = 0; i < x.size(); ++i) (i % 2 ? left : right).push(x[i]);
    left.merge(right);
    CHECK(left.lse() == sums.lse() || (std::isnan(left.lse()) && std::isnan(sums.lse())) ||
          std::fabs(left.lse() - sums.lse()) < F(1e-5));
    return sums.lse();
  };
  CHECK(lse({}) == -inf);
  CHECK(lse({-inf, -inf, -inf}) == -inf);
  CHECK(lse({-inf, F(0), -inf}) == 0);
  CHECK(lse({F(3)}) == F(kLn2) * 3);
  CHECK(std::isnan(lse({F(NAN)})));
  CHECK(std::isnan(lse({F(NAN), F(1), F(1000), F(5000)})));  // rescaling does not lose it
  CHECK(std::isnan(lse({F(1), F(-INFINITY), F(NAN), F(-INFINITY)})));
  CHECK(std::isnan(lse({F(1), inf})));
  CHECK(std::isnan(lse({inf, inf})));

  const auto weighted = [](F x0, F w0, F x1, F w1) {
    OnlineSums<F, 2> sums;
    const F a[1] = {w0}, b[1] = {w1};
    sums.push(x0, a);
    sums.push(x1, b);
    return sums.sum[1];
  };
  CHECK(weighted(-inf, inf, F(0), F(2)) == 2);  // 0 * inf = 0
  CHECK(weighted(F(0), F(2), -inf, -inf) == 2);
  CHECK(weighted(-inf, F(NAN), F(0), F(2)) == 2);
  CHECK(weighted(F(0), inf, F(1), F(2)) == inf);
  CHECK(weighted(F(0), inf, F(5000), F(2)) == 2);  // its probability underflowed
  CHECK(std::isnan(weighted(F(0), F(NAN), F(1), F(2))));

  OnlineSums<F, 2> empty, full;
  const F w[1] = {F(4)};
  full.push(F(1), w);
  OnlineSums<F, 2> both = empty;
  both.merge(full);
  CHECK(both.max == 1 && both.sum[0] == 1 && both.sum[1] == 4);
  both = full;
  both.merge(empty);
  CHECK(both.max == 1 && both.sum[0] == 1 && both.sum[1] == 4);
  both = empty;
  both.merge(empty);
  CHECK(both.lse() == -inf && both.sum[1] == 0);
}

TEST(corner_cases) {
  check_corners<float>();
  check_corners<double>();
}

// ---- scalar maths ------------------------------------------------------------------------------

TEST(scalar_functions) {
  CHECK_NEAR(expm1(1e-10), 1e-10, 1e-20);
  CHECK_NEAR(expm1(1e-6f) * 1e6f, 1.0000005, 2e-7);
  CHECK_NEAR(log1p(1e-6f) * 1e6f, 0.9999995, 2e-7);
  CHECK(exp2(-INFINITY) == 0 && log2(0.0f) == -INFINITY);
  CHECK(select(true, 1.0f, 2.0f) == 1.0f && select(false, 1.0, 2.0) == 2.0);
  CHECK(is_nan(NAN) && !is_nan(1.0f) && is_inf(-INFINITY) && !is_inf(1e300));
  CHECK(max(1.0f, 2.0f) == 2.0f && min(1.0, 2.0) == 1.0 && abs(-1.0f) == 1.0f);
  CHECK(fma(2.0f, 3.0f, 4.0f) == 10.0f && fma(2.0, 3.0, 4.0) == 10.0);
  CHECK(any(true) && !any(false) && all(true) && none(false));
  CHECK(is_finite(1e38f) && !is_finite(INFINITY) && !is_finite(NAN));
  CHECK(pow(2.0f, 3.0f) == 8.0f && pow(2.0, 0.5) == sqrt(2.0));
}

// ---- reduction ladder --------------------------------------------------------------------------

template <int kWidth>
__global__ void warp_kernel(float* out, const float* in) {
  const int t = static_cast<int>(threadIdx.x);
  out[3 * t] = warp_sum<kWidth>(in[t]);
  out[3 * t + 1] = warp_max<kWidth>(in[t]);
  out[3 * t + 2] = warp_min<kWidth>(in[t]);
}

template <int kWidth>
void check_warp() {
  for_each_order([] {
    Buffer<float> in(96), out(288);
    for (int i = 0; i < 96; ++i) in[i] = static_cast<float>(i * 37 % 101 - 50);
    run(warp_kernel<kWidth>, 1, 96, 0, out.data(), static_cast<const float*>(in.data()));
    for (int t = 0; t < 96; ++t) {
      float sum = 0, largest = -INFINITY, least = INFINITY;
      for (int i = t / kWidth * kWidth; i < t / kWidth * kWidth + kWidth; ++i) {
        sum += in[i];
        largest = std::fmax(largest, in[i]);
        least = std::fmin(least, in[i]);
      }
      CHECK(out[3 * t] == sum && out[3 * t + 1] == largest && out[3 * t + 2] == least);
    }
  });
}

TEST(warp_groups_of_all_widths) {
  check_warp<1>();
  check_warp<2>();
  check_warp<8>();
  check_warp<16>();
  check_warp<32>();
}

// A student-teacher pair merged as one object, as a row kernel would.
struct PairSums {
  OnlineSums<float> student;
  OnlineSums<float, 2> teacher;
  KD_HOST_DEVICE void merge(const PairSums& other) {
    student.merge(other.student);
    teacher.merge(other.teacher);
  }
};

__global__ void block_kernel(float* out, const float* z, const float* a, int n) {
  PairSums acc;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    acc.student.push(z[i]);
    const float gap[1] = {a[i] - z[i]};
    acc.teacher.push(a[i], gap);
  }
  acc = block_reduce(acc);
  const float biggest = block_max(acc.student.max);
  const float count = block_sum(1.0f);  // directly after: the slots must be free again
  const float small = block_min(static_cast<float>(threadIdx.x) + 3.0f);
  float* mine = out + threadIdx.x * 6;
  mine[0] = acc.student.lse();
  mine[1] = acc.teacher.lse();
  mine[2] = acc.teacher.mean(1);
  mine[3] = biggest;
  mine[4] = count;
  mine[5] = small;
}

TEST(block_reductions) {
  const int n = 3000;
  Buffer<float> z(n), a(n);
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 4);
  for (int i = 0; i < n; ++i) {
    z[i] = normal(random);
    a[i] = i % 7 ? normal(random) : -INFINITY;
  }
  std::vector<float> zs(z.data(), z.data() + n), as(a.data(), a.data() + n), gaps(n);
  for (int i = 0; i < n; ++i) gaps[i] = as[i] - zs[i];
  const Exact student = exact(zs, gaps), teacher = exact(as, gaps);
  for (int threads : {32, 64, 96, 256, 1024}) {  // one warp, odd warp counts, the largest block
    std::vector<float> first_bits;
    for_each_order([&] {
      Buffer<float> out(threads * 6);
      run(block_kernel, 1, threads, 0, out.data(), static_cast<const float*>(z.data()),
          static_cast<const float*>(a.data()), n);
      CHECK_NEAR(out[0], student.lse, 1e-5);
      CHECK_NEAR(out[1], teacher.lse, 1e-5);
      CHECK_NEAR(out[2], teacher.mean, 1e-4);
      CHECK(out[4] == threads && out[5] == 3.0f);
      for (int t = 0; t < threads; ++t) {  // every thread, every order: the same bits
        CHECK(std::memcmp(out.data(), out.data() + t * 6, 6 * sizeof(float)) == 0);
      }
      if (first_bits.empty()) first_bits.assign(out.data(), out.data() + 6);
      CHECK(std::memcmp(first_bits.data(), out.data(), 6 * sizeof(float)) == 0);
    });
  }
}

// The same instantiation twice in a row shares its slots: the second must not overtake the first.
__global__ void twice_kernel(float* out) {
  const float first = block_sum(1.0f);
  const float second = block_sum(static_cast<float>(threadIdx.x / 32));
  out[2 * threadIdx.x] = first;
  out[2 * threadIdx.x + 1] = second;
}

TEST(block_reductions_may_follow_each_other) {
  for_each_order([] {
    Buffer<float> out(512);
    run(twice_kernel, 1, 256, 0, out.data());
    for (int t = 0; t < 256; ++t) CHECK(out[2 * t] == 256 && out[2 * t + 1] == 32 * 28);
  });
}

#if !defined(__CUDACC__)
TEST(blocks_of_partial_warps_are_refused) {
  Buffer<float> out(600), in(100);
  CHECK_THROWS(run(block_kernel, 1, 100, 0, out.data(), static_cast<const float*>(in.data()),
                   static_cast<const float*>(in.data()), 100),
               "threads % 32 == 0");
}
#endif

}  // namespace
}  // namespace kd
