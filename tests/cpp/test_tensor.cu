// Asynchronous copies and tensor cores: the emulator's models against plain loops.
#include "check.h"
#include "common/half.h"
#include "common/simt.h"

namespace {

using test::Buffer;
using test::for_each_order;
using test::run;

// ---- cp.async ----------------------------------------------------------------------------------

// Two stages: while one is summed, the next one is under way. kWait = false forgets the last wait.
template <bool kWait>
__global__ void pipeline_kernel(float* out, const float* in, int stages) {
  KD_SHARED(float[2][128], ring);
  const int t = threadIdx.x;
  const auto fetch = [&](int stage) {
    if (stage < stages) kd::cp_async16(&ring[stage % 2][4 * t], in + stage * 128 + 4 * t);
    kd::cp_async_commit();
  };
  fetch(0);
  float sum = 0;
  for (int stage = 0; stage < stages; ++stage) {
    fetch(stage + 1);
    if (kWait || stage + 1 < stages) kd::cp_async_wait<1>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) sum += ring[stage % 2][(4 * t + i + 64) % 128];
    __syncthreads();
  }
  out[t] = sum;
}

TEST(cp_async_pipeline) {
  for_each_order([] {
    Buffer<float> in(5 * 128), out(32);
    for (int i = 0; i < 5 * 128; ++i) in[i] = static_cast<float>(i % 128);
    run(pipeline_kernel<true>, 1, 32, 0, out.data(), in.data(), 5);
    for (int t = 0; t < 32; ++t) CHECK(out[t] == 5 * (4 * ((4 * t + 64) % 128) + 6));
  });
}

__global__ void partial_copy_kernel(float* out, const float* in) {
  KD_SHARED(float[8], tile);
  kd::cp_async<16>(tile, in, 12);
  kd::cp_async<4>(tile + 4, in + 5);
  kd::cp_async<8>(tile + 6, in + 6, 0);
  kd::cp_async_commit();
  kd::cp_async_wait<0>();
  for (int i = 0; i < 8; ++i) out[i] = tile[i];
}

TEST(cp_async_sizes_and_zero_fill) {
  Buffer<float> in(8), out(8);
  for (int i = 0; i < 8; ++i) in[i] = static_cast<float>(i + 1);
  run(partial_copy_kernel, 1, 1, 0, out.data(), in.data());
  const float expected[] = {1, 2, 3, 0, 6};
  for (int i = 0; i < 5; ++i) CHECK(out[i] == expected[i]);
  CHECK(out[6] == 0 && out[7] == 0);
}

#if !defined(__CUDACC__)
TEST(cp_async_forgotten_wait_reads_poison) {
  for_each_order([] {
    Buffer<float> in(5 * 128, 1.0f), out(32);
    run(pipeline_kernel<false>, 1, 32, 0, out.data(), in.data(), 5);
    for (int t = 0; t < 32; ++t) CHECK(std::isnan(out[t]));
  });
}

__global__ void misaligned_copy_kernel(const float* in, int offset) {
  KD_SHARED(float[8], tile);
  kd::cp_async16(tile, in + offset);
}
__global__ void lost_copy_kernel(float* out, const float* in) {
  kd::cp_async16(out, in);
}

TEST(cp_async_addresses_are_checked) {
  alignas(16) float in[8] = {}, out[8];
  run(misaligned_copy_kernel, 1, 1, 0, static_cast<const float*>(in), 4);
  CHECK_THROWS(run(misaligned_copy_kernel, 1, 1, 0, static_cast<const float*>(in), 1), "aligned");
  CHECK_THROWS(run(lost_copy_kernel, 1, 1, 0, out, static_cast<const float*>(in)), "not shared");
}
#endif

// ---- mma.sync ----------------------------------------------------------------------------------

// D (16, 8) = A (16, K) B (K, 8) + C, K a multiple of 16 (8 for tf32).
template <class T>
__global__ void mma_kernel(float* d, const T* a, const T* b, const float* c, int k_total) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  for (int k0 = 0; k0 < k_total; k0 += sizeof(T) == 2 ? 16 : 8) {
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) {
      const T* row = a + (g + 8 * (i % 2)) * k_total + k0;
      if constexpr (sizeof(T) == 2) {
        fa[i] = kd::pack_pair(row[2 * t + 8 * (i / 2)], row[2 * t + 8 * (i / 2) + 1]);
      } else {
        fa[i] = kd::to_tf32(row[t + 4 * (i / 2)]);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if constexpr (sizeof(T) == 2) {
        const T* column = b + (k0 + 2 * t + 8 * i) * 8 + g;
        fb[i] = kd::pack_pair(column[0], column[8]);
      } else {
        fb[i] = kd::to_tf32(b[(k0 + t + 4 * i) * 8 + g]);
      }
    }
    if constexpr (sizeof(T) == 2) {
      kd::mma_m16n8k16<T>(acc, fa, fb, acc);
    } else {
      kd::mma_m16n8k8_tf32(acc, fa, fb, acc);
    }
  }
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = acc[i];
}

float noise(int i) {
  return static_cast<float>((i * 7919 + 13) % 257 - 128) / 64.0f;
}

template <class T>
void check_mma(double tolerance) {
  for_each_order([&] {
    constexpr int kDepth = 48;
    Buffer<T> a(16 * kDepth), b(kDepth * 8);
    Buffer<float> c(128), d(128);
    for (int i = 0; i < 16 * kDepth; ++i) a[i] = kd::cast<T>(noise(i));
    for (int i = 0; i < kDepth * 8; ++i) b[i] = kd::cast<T>(noise(3 * i + 1));
    for (int i = 0; i < 128; ++i) c[i] = noise(5 * i);
    run(mma_kernel<T>, 1, 32, 0, d.data(), a.data(), b.data(), c.data(), kDepth);
    for (int r = 0; r < 16; ++r) {
      for (int n = 0; n < 8; ++n) {
        double sum = static_cast<double>(c[r * 8 + n]);
        for (int k = 0; k < kDepth; ++k) {
          sum += static_cast<double>(kd::to_float(a[r * kDepth + k])) * kd::to_float(b[k * 8 + n]);
        }
        CHECK_NEAR(d[r * 8 + n], sum, tolerance);
      }
    }
  });
}

// The operands are exact in all three types, so only the float sums of 48 terms of size 4 round.
TEST(mma_bf16) {
  check_mma<kd::bf16>(1e-4);
}
TEST(mma_f16) {
  check_mma<kd::f16>(1e-4);
}
TEST(mma_tf32) {
  check_mma<float>(1e-4);
}

__global__ void tf32_kernel(float* out, const float* in) {
  out[threadIdx.x] = kd::detail::bits_float(kd::to_tf32(in[threadIdx.x]));
}

TEST(tf32_rounds_to_nearest) {
  const float cases[][2] = {{1.0f, 1.0f},
                            {-3.5f, -3.5f},
                            {1.0f + 0x1p-11f, 1.0f + 0x1p-10f},  // a tie goes away from zero
                            {1.0f + 0x1.8p-12f, 1.0f},
                            {INFINITY, INFINITY}};
  Buffer<float> in(5), out(5);
  for (int i = 0; i < 5; ++i) in[i] = cases[i][0];
  run(tf32_kernel, 1, 5, 0, out.data(), static_cast<const float*>(in.data()));
  for (int i = 0; i < 5; ++i) CHECK(out[i] == cases[i][1]);
}

// ---- ldmatrix ----------------------------------------------------------------------------------

template <bool kTranspose>
__global__ void ldmatrix_kernel(uint32_t* out) {
  using Tile = kd::bf16[32][8];
  KD_SHARED(Tile, rows);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) rows[lane][i].bits = static_cast<uint16_t>(lane * 8 + i);
  __syncthreads();
  uint32_t r[4];
  kd::ldmatrix_x4<kTranspose>(r, rows[lane]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

TEST(ldmatrix) {
  for_each_order([] {
    Buffer<uint32_t> out(128);
    const auto element = [](int m, int row, int column) {
      return static_cast<uint32_t>((m * 8 + row) * 8 + column);
    };
    run(ldmatrix_kernel<false>, 1, 32, 0, out.data());
    for (int i = 0; i < 128; ++i) {
      const int g = i / 16, t = i / 4 % 4, m = i % 4;
      CHECK(out[i] == (element(m, g, 2 * t) | element(m, g, 2 * t + 1) << 16));
    }
    run(ldmatrix_kernel<true>, 1, 32, 0, out.data());
    for (int i = 0; i < 128; ++i) {
      const int g = i / 16, t = i / 4 % 4, m = i % 4;
      CHECK(out[i] == (element(m, 2 * t, g) | element(m, 2 * t + 1, g) << 16));
    }
  });
}

}  // namespace
