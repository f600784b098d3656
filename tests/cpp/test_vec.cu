// Vectors and row chunks at every alignment, alone and in pairs of rows and types.
#include "check.h"
#include "common/vec.h"

namespace kd {
namespace {

using test::Buffer;
using test::for_each_order;
using test::run;

template <class T, int N>
__global__ void copy_kernel(T* out, const T* in) {
  const int i = N * static_cast<int>(threadIdx.x);
  store(out + i, load<N>(in + i));
  store<true>(out + 32 * N + i, load<N, Access::kStreaming>(in + i));
  store(out + 64 * N + i, load<N, Access::kReadOnly>(in + i));
}

template <class T, int N>
void check_copy() {
  static_assert(sizeof(Vec<T, N>) == N * sizeof(T));
  static_assert(alignof(Vec<T, N>) == (sizeof(T) * N < 16 ? sizeof(T) * N : 16));
  Buffer<T> in(32 * N), out(96 * N);
  for (int i = 0; i < 32 * N; ++i) in[i] = to_storage<T>(static_cast<float>(i % 200));
  run(copy_kernel<T, N>, 1, 32, 0, out.data(), static_cast<const T*>(in.data()));
  for (int i = 0; i < 96 * N; ++i) CHECK(to_float(out[i]) == i % (32 * N) % 200);
}

TEST(vectors_of_all_sizes) {
  check_copy<float, 1>();
  check_copy<float, 2>();
  check_copy<float, 4>();
  check_copy<float, 8>();
  check_copy<double, 1>();
  check_copy<double, 2>();
  check_copy<bf16, 1>();
  check_copy<bf16, 2>();
  check_copy<bf16, 4>();
  check_copy<f16, 8>();
  check_copy<f16, 16>();
}

TEST(widen_and_narrow) {
  const float values[4] = {1.0f, -INFINITY, 0.333333f, 70000.0f};
  float back[4];
  widen(narrow<bf16>(values), back);
  CHECK(back[0] == 1.0f && back[1] == -INFINITY && back[3] == 70144.0f);
  CHECK_NEAR(back[2], 0.333333, 0.333333 / 256);
  widen(narrow<f16>(values), back);
  CHECK(back[1] == -INFINITY && back[3] == INFINITY);
  const double doubles[2] = {1e300, 0.1};
  double double_back[2];
  widen(narrow<double>(doubles), double_back);
  CHECK(double_back[0] == 1e300 && double_back[1] == 0.1);
}

// b = 2 a + 1 over rows of n elements, chunk by chunk; counts the elements it was shown.
template <class A, class B, int W>
__global__ void chunks_kernel(B* b, const A* a, int64_t n, float* seen) {
  const RowChunks<W> chunks(n, a, static_cast<const B*>(b));
  for (int64_t c = threadIdx.x; c < chunks.count(); c += blockDim.x) {
    float values[W], old[W];
    chunks.load(a, c, -1.0f, values);
    chunks.template load<Access::kStreaming>(static_cast<const B*>(b), c, -1.0f, old);
    int count = 0;
    for (int i = 0; i < W; ++i) {
      const int64_t at = chunks.begin(c) + i;
      // Outside of the row both read as the fill.
      count += at >= 0 && at < n ? old[i] == 3.0f : (values[i] != -1.0f || old[i] != -1.0f) * 1000;
      values[i] = 2 * values[i] + 1;
    }
    chunks.template store<true>(b, c, values);
    atomicAdd(seen, static_cast<float>(count));
  }
}

template <class A, class B, int W>
void check_chunks() {
  constexpr int kPad = 16;
  // Empty, one, around the vector width, and a length that no width divides.
  for (int64_t n : {0, 1, 3, 7, 8, 9, 15, 16, 17, 61}) {
    for (int offset_a = 0; offset_a < 9; ++offset_a) {
      for (int offset_b = 0; offset_b < 9; ++offset_b) {
        Buffer<A> a(n + 2 * kPad);
        Buffer<B> b(n + 2 * kPad, to_storage<B>(3.0f));
        Buffer<float> seen(1);
        for (size_t i = 0; i < a.size(); ++i) a[i] = to_storage<A>(static_cast<float>(i));
        run(chunks_kernel<A, B, W>, 1, 4, 0, b.data() + offset_b,
            static_cast<const A*>(a.data() + offset_a), n, seen.data());
        CHECK(seen[0] == n);
        for (int64_t i = 0; i < n + 2 * kPad; ++i) {
          const int64_t at = i - offset_b;
          const float expected =
              at < 0 || at >= n ? 3.0f : 2.0f * static_cast<float>(at + offset_a) + 1;
          CHECK(to_float(b[i]) == expected);
        }
      }
    }
  }
}

TEST(chunks_cover_each_element_once_at_any_alignment) {
  check_chunks<float, float, 4>();
  check_chunks<float, float, 8>();
  check_chunks<bf16, bf16, 8>();
  check_chunks<bf16, float, 8>();
  check_chunks<double, f16, 8>();
  check_chunks<double, double, 2>();
}

TEST(chunks_use_the_widest_common_grid) {
  alignas(64) float f[64] = {};
  alignas(64) bf16 h[64] = {};
  const int64_t n = 40;
  CHECK(RowChunks<8>(n, f).width() == 8 && RowChunks<8>(n, f).shift() == 0);
  // Eight floats are two accesses of four: only the grid of four counts.
  CHECK(RowChunks<8>(n, f + 4).width() == 8 && RowChunks<8>(n, f + 4).shift() == 0);
  CHECK(RowChunks<8>(n, f + 3).width() == 8 && RowChunks<8>(n, f + 3).shift() == 3);
  CHECK(RowChunks<8>(n, h + 5).width() == 8 && RowChunks<8>(n, h + 5).shift() == 5);
  // Misaligned in the same way: still full vectors.
  CHECK(RowChunks<8>(n, h + 3, h + 11).width() == 8);
  CHECK(RowChunks<8>(n, h + 3, f + 7).width() == 8);
  // Apart by 4, 2 and 1 elements: the grid narrows to just that.
  CHECK(RowChunks<8>(n, h, h + 4).width() == 4);
  CHECK(RowChunks<8>(n, h + 1, h + 3).width() == 2);
  CHECK(RowChunks<8>(n, h + 1, h + 3).shift() == 1);
  CHECK(RowChunks<8>(n, h, h + 1).width() == 1);
  CHECK(RowChunks<8>(n, h, h + 1).shift() == 0);
  CHECK(RowChunks<8>(n, h + 3, static_cast<bf16*>(nullptr)).width() == 8);
  CHECK(RowChunks<8>(n, h + 3).count() == 6);
  CHECK(RowChunks<8>(n, h).count() == 5);
  CHECK(RowChunks<8>(0, h).count() == 0);
}

#if !defined(__CUDACC__)
TEST(misaligned_vectors_are_caught) {
  alignas(16) float f[8] = {};
  CHECK_THROWS(load<4>(f + 1), "misaligned");
  CHECK_THROWS(store(f + 2, Vec<float, 4>{}), "misaligned");
}
#endif

}  // namespace
}  // namespace kd
