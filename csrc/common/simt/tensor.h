// Hardware beyond CUDA C++: asynchronous copies, named barriers, tensor cores. Each wrapper is PTX
// on a device and a model of it on the host. Needs sm_80, except the named barriers; below sm_80
// cp_async copies at once and the mma wrappers trap (the caller picks another kernel).
#pragma once

#include <cstdint>

#include "common/half.h"

namespace kd {

// ---- cp.async ----------------------------------------------------------------------------------
// cp_async<16>(to, from): copies 16 (8, 4) bytes from global to shared memory in the background;
// both are aligned to that size. `valid` < kBytes fills the rest with zeros without reading it.
// cp_async_commit() closes a group; cp_async_wait<N>() waits until at most the N newest groups of
// this thread are under way. Other threads see the data after a barrier that follows the wait.

template <int kBytes>
KD_DEVICE void cp_async(void* to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
#else
  for (int i = 0; i < kBytes; ++i) {
    static_cast<char*>(to)[i] = i < valid ? static_cast<const char*>(from)[i] : 0;
  }
#endif
#else
  // The target is poisoned now and filled by the wait, so that a forgotten wait is seen.
  simt::host::Engine& engine = simt::host::Engine::running("cp_async");
  if (!engine.is_shared(to, kBytes)) throw std::logic_error("cp_async: the target is not shared");
  if (reinterpret_cast<uintptr_t>(to) % kBytes ||
      (valid && reinterpret_cast<uintptr_t>(from) % kBytes)) {
    throw std::logic_error("cp_async: an address is not aligned to the copy's size");
  }
  if (valid < 0 || valid > kBytes) throw std::logic_error("cp_async: valid is not in 0..size");
  std::memset(to, 0xFF, kBytes);
  engine.lane().copies.push_back({to, from, kBytes, static_cast<uint32_t>(valid)});
  ++engine.lane().uncommitted;
#endif
}

KD_DEVICE void cp_async16(void* to, const void* from, int valid = 16) {
  cp_async<16>(to, from, valid);
}

KD_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
#else
  simt::host::Lane& lane = simt::host::Engine::running("cp_async_commit").lane();
  lane.group_sizes.push_back(lane.uncommitted);
  lane.uncommitted = 0;
#endif
}

template <int kGroupsLeft>
KD_DEVICE void cp_async_wait() {
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
#else
  simt::host::Lane& lane = simt::host::Engine::running("cp_async_wait").lane();
  size_t groups = 0, copies = 0;
  while (lane.group_sizes.size() - groups > static_cast<size_t>(kGroupsLeft)) {
    copies += lane.group_sizes[groups++];
  }
  for (size_t i = 0; i < copies; ++i) {
    const simt::host::AsyncCopy& copy = lane.copies[i];
    std::memset(copy.to, 0, copy.bytes);
    if (copy.valid) std::memcpy(copy.to, copy.from, copy.valid);
  }
  lane.group_sizes.erase(lane.group_sizes.begin(),
                         lane.group_sizes.begin() + static_cast<long>(groups));
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<long>(copies));
#endif
}

// ---- named barriers ----------------------------------------------------------------------------
// Barrier `id` (1..15; 0 is __syncthreads) of `threads` threads, a multiple of 32. sync waits,
// arrive only counts.

#if defined(__CUDACC__)
KD_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
KD_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#else
inline void named_barrier_sync(int id, int threads, KD_SIMT_SITE) {
  simt::host::Engine::running("named_barrier_sync")
      .barrier(id, threads, false, true, {"named_barrier_sync", file, line});
}
inline void named_barrier_arrive(int id, int threads, KD_SIMT_SITE) {
  simt::host::Engine::running("named_barrier_arrive")
      .barrier(id, threads, false, false, {"named_barrier_arrive", file, line});
}
#endif

// ---- tensor cores ------------------------------------------------------------------------------
// One warp computes D = A B + C with A (16, K) row-major, B (K, 8), C and D (16, 8) in float.
//
// Fragments of lane l, with g = l / 4 and t = l % 4, for K = 16 (bf16, f16; two values a register,
// the lower column in the low half):
//   a[i]: row g + 8 (i % 2),  columns 2 t + 8 (i / 2) and the next one
//   b[i]: rows 2 t + 8 i and the next one, column g
//   c[i], d[i]: row g + 8 (i / 2), column 2 t + i % 2
// For K = 8 (tf32, one value a register): a[i]: row g + 8 (i % 2), column t + 4 (i / 2);
//   b[i]: row t + 4 i, column g.

#if !defined(__CUDACC__)
namespace detail {

struct MmaOperands {
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
};
struct MmaResult {
  float d[4];
};

template <class T>
float half_of(uint32_t bits, int high) {
  T value;
  const uint16_t half = static_cast<uint16_t>(high ? bits >> 16 : bits & 0xffffu);
  std::memcpy(&value, &half, sizeof(value));
  return to_float(value);
}

// The tensor core reads 19 bits of a tf32 operand.
inline float tf32_value(uint32_t bits) {
  return bits_float(bits & 0xffffe000u);
}

// T = bf16 or f16: K = 16. T = float: tf32, K = 8.
template <class T>
void combine_mma(simt::host::WarpCall* calls, uint32_t present) {
  constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;
  float a[16][kDepth], b[kDepth][8];
  simt::host::for_each_lane(present, [&](int lane) {
    const MmaOperands& in = *static_cast<const MmaOperands*>(calls[lane].in);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        for (int h = 0; h < 2; ++h) {
          a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + h] = half_of<T>(in.a[i], h);
          if (i < 2) b[2 * t + 8 * i + h][g] = half_of<T>(in.b[i], h);
        }
      } else {
        a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32_value(in.a[i]);
        if (i < 2) b[t + 4 * i][g] = tf32_value(in.b[i]);
      }
    }
  });
  simt::host::for_each_lane(present, [&](int lane) {
    const MmaOperands& in = *static_cast<const MmaOperands*>(calls[lane].in);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = in.c[i];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      static_cast<MmaResult*>(calls[lane].out)->d[i] = sum;
    }
  });
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
         const simt::host::Site& site) {
  const MmaResult result = simt::host::warp_call(0xffffffffu, &combine_mma<T>, MmaOperands{a, b, c},
                                                 MmaResult{}, 0, site);
  for (int i = 0; i < 4; ++i) d[i] = result.d[i];
}

}  // namespace detail
#endif

// T = bf16 or f16. d and c may be the same array.
#if defined(__CUDACC__)
template <class T>
KD_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            const float (&c)[4]) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "bf16 or f16");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same<T, bf16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }
#else
  __trap();
#endif
}

KD_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const float (&c)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
#else
  __trap();
#endif
}
#else
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const float (&c)[4], KD_SIMT_SITE) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "bf16 or f16");
  detail::mma<T>(d, a, b, c, {"mma_m16n8k16", file, line});
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4], KD_SIMT_SITE) {
  detail::mma<float>(d, a, b, c, {"mma_m16n8k8_tf32", file, line});
}
#endif

// The nearest tf32 (10 bits of mantissa), ties away from zero, as an mma operand.
KD_DEVICE uint32_t to_tf32(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = detail::float_bits(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
#endif
}

// Two 16-bit values in one register, the first in the low half.
template <class T>
KD_DEVICE uint32_t pack_pair(T low, T high) {
  static_assert(sizeof(T) == 2, "bf16 or f16");
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

// ---- ldmatrix ----------------------------------------------------------------------------------
// Loads four 8 x 8 matrices of 16-bit values from shared memory. Lane l passes the address of row
// l % 8 of matrix l / 8 (aligned to 16 bytes) and gets, from matrix i in r[i], row l / 4, columns
// 2 (l % 4) and the next one; with kTranspose that of the transposed matrix.

#if defined(__CUDACC__)
template <bool kTranspose = false>
KD_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}
#else
namespace detail {

struct MatrixRegisters {
  uint32_t r[4];
};

template <bool kTranspose>
void combine_ldmatrix(simt::host::WarpCall* calls, uint32_t present) {
  simt::host::for_each_lane(present, [&](int lane) {
    MatrixRegisters& out = *static_cast<MatrixRegisters*>(calls[lane].out);
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int h = 0; h < 2; ++h) {
        const int major = lane / 4, minor = 2 * (lane % 4) + h;
        const int row = kTranspose ? minor : major, column = kTranspose ? major : minor;
        const auto* base = *static_cast<const void* const*>(calls[8 * i + row].in);
        std::memcpy(&pair[h], static_cast<const char*>(base) + 2 * column, 2);
      }
      out.r[i] = static_cast<uint32_t>(pair[0]) | static_cast<uint32_t>(pair[1]) << 16;
    }
  });
}

}  // namespace detail

template <bool kTranspose = false>
void ldmatrix_x4(uint32_t (&r)[4], const void* row, KD_SIMT_SITE) {
  if (!simt::host::Engine::running("ldmatrix").is_shared(row, 16) ||
      reinterpret_cast<uintptr_t>(row) % 16) {
    throw std::logic_error("ldmatrix: a row is not in shared memory or not aligned to 16 bytes");
  }
  const auto out = simt::host::warp_call(0xffffffffu, &detail::combine_ldmatrix<kTranspose>, row,
                                         detail::MatrixRegisters{}, 0, {"ldmatrix_x4", file, line});
  for (int i = 0; i < 4; ++i) r[i] = out.r[i];
}
#endif

}  // namespace kd
