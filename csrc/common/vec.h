// Vec<T, N>: N neighbouring elements, loaded and stored in as few instructions as possible; and
// RowChunks: how to walk rows in such vectors whatever their alignment.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if !defined(__CUDACC__)
#include <stdexcept>
#endif

#include "common/half.h"
#include "common/macros.h"

namespace kd {

// Elements in 16 bytes, the widest access a thread can make.
template <class T>
constexpr int kVecWidth = 16 / static_cast<int>(sizeof(T));

// Aligned to its size, at most to 16 bytes. Uninitialised, so it may lie in shared memory.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  static_assert(N >= 1 && (N & (N - 1)) == 0, "a vector holds a power of two of elements");
  static constexpr int kAccessBytes = sizeof(T) * N < 16 ? sizeof(T) * N : 16;

  T data[N];

  KD_HOST_DEVICE T& operator[](int i) { return data[i]; }
  KD_HOST_DEVICE const T& operator[](int i) const { return data[i]; }
};

// kPlain: any memory. kReadOnly: global memory nobody writes during the kernel. kStreaming: the
// same, and it will not be read again soon, so it shall not displace what will.
enum class Access { kPlain, kReadOnly, kStreaming };

namespace detail {

#if defined(__CUDACC__)
// One access of kBytes, as 32-bit words (a single 16-bit one for kBytes = 2).
template <Access kAccess, int kBytes>
__device__ __forceinline__ void device_load(void* to, const void* from) {
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16, "2, 4, 8 or 16 bytes");
  if constexpr (kBytes == 16) {
    uint4 v;
    if constexpr (kAccess == Access::kPlain) v = *static_cast<const uint4*>(from);
    if constexpr (kAccess == Access::kReadOnly) v = __ldg(static_cast<const uint4*>(from));
    if constexpr (kAccess == Access::kStreaming) {
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(from));
    }
    memcpy(to, &v, 16);
  } else if constexpr (kBytes == 8) {
    uint2 v;
    if constexpr (kAccess == Access::kPlain) v = *static_cast<const uint2*>(from);
    if constexpr (kAccess == Access::kReadOnly) v = __ldg(static_cast<const uint2*>(from));
    if constexpr (kAccess == Access::kStreaming) {
      asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                   : "=r"(v.x), "=r"(v.y)
                   : "l"(from));
    }
    memcpy(to, &v, 8);
  } else if constexpr (kBytes == 4) {
    unsigned v;
    if constexpr (kAccess == Access::kPlain) {
      v = *static_cast<const unsigned*>(from);
    } else {
      v = __ldg(static_cast<const unsigned*>(from));
    }
    memcpy(to, &v, 4);
  } else {
    unsigned short v;
    if constexpr (kAccess == Access::kPlain) {
      v = *static_cast<const unsigned short*>(from);
    } else {
      v = __ldg(static_cast<const unsigned short*>(from));
    }
    memcpy(to, &v, 2);
  }
}

template <bool kStreaming, int kBytes>
__device__ __forceinline__ void device_store(void* to, const void* from) {
  if constexpr (kBytes == 16) {
    uint4 v;
    memcpy(&v, from, 16);
    if constexpr (kStreaming) {
      __stcs(static_cast<uint4*>(to), v);
    } else {
      *static_cast<uint4*>(to) = v;
    }
  } else if constexpr (kBytes == 8) {
    uint2 v;
    memcpy(&v, from, 8);
    if constexpr (kStreaming) {
      __stcs(static_cast<uint2*>(to), v);
    } else {
      *static_cast<uint2*>(to) = v;
    }
  } else if constexpr (kBytes == 4) {
    unsigned v;
    memcpy(&v, from, 4);
    *static_cast<unsigned*>(to) = v;
  } else {
    unsigned short v;
    memcpy(&v, from, 2);
    *static_cast<unsigned short*>(to) = v;
  }
}
#endif

KD_HOST_DEVICE void check_alignment(const void* address, int bytes) {
#if defined(__CUDACC__)
  static_cast<void>(address), static_cast<void>(bytes);  // the GPU faults by itself
#else
  if (reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(bytes)) {
    throw std::logic_error("misaligned vector access: a GPU would fault here");
  }
#endif
}

}  // namespace detail

// `from` must be aligned as Vec<T, N> is.
template <int N, Access kAccess = Access::kPlain, class T>
KD_HOST_DEVICE Vec<T, N> load(const T* from) {
  Vec<T, N> out;
  constexpr int kBytes = Vec<T, N>::kAccessBytes;
  detail::check_alignment(from, kBytes);
#if defined(__CUDA_ARCH__)
  KD_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(out)); i += kBytes) {
    detail::device_load<kAccess, kBytes>(reinterpret_cast<char*>(out.data) + i,
                                         reinterpret_cast<const char*>(from) + i);
  }
#else
  memcpy(out.data, from, sizeof(out));
#endif
  return out;
}

template <bool kStreaming = false, int N, class T>
KD_HOST_DEVICE void store(T* to, const Vec<T, N>& value) {
  constexpr int kBytes = Vec<T, N>::kAccessBytes;
  detail::check_alignment(to, kBytes);
#if defined(__CUDA_ARCH__)
  KD_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(value)); i += kBytes) {
    detail::device_store<kStreaming, kBytes>(reinterpret_cast<char*>(to) + i,
                                             reinterpret_cast<const char*>(value.data) + i);
  }
#else
  memcpy(to, value.data, sizeof(value));
#endif
}

// From any compute type to storage; half types round from float.
template <class T, class F>
KD_HOST_DEVICE T to_storage(F x) {
  if constexpr (std::is_same<T, double>::value) {
    return static_cast<double>(x);
  } else {
    return from_float<T>(static_cast<float>(x));
  }
}

// Conversions between storage and the compute type F (float; double for double).
template <class F, class T, int N>
KD_HOST_DEVICE void widen(const Vec<T, N>& in, F (&out)[N]) {
  KD_UNROLL
  for (int i = 0; i < N; ++i) out[i] = static_cast<F>(to_float(in.data[i]));
}
template <class T, class F, int N>
KD_HOST_DEVICE Vec<T, N> narrow(const F (&in)[N]) {
  Vec<T, N> out;
  KD_UNROLL
  for (int i = 0; i < N; ++i) out.data[i] = to_storage<T>(in[i]);
  return out;
}

// Cuts rows of n elements into chunks of W so that as many accesses as possible are vectors.
//
// Chunk c covers the elements c W - shift .. c W - shift + W - 1; `shift` puts the chunks on the
// rows' 16-byte grid, so the first and the last chunk may reach over the ends (those elements read
// as `fill` and are not written). Rows that are misaligned in different ways share only a narrower
// grid: `width` is the largest power of two that serves all of them, 1 in the worst case, and inner
// chunks are then read in pieces of `width`. Rows may differ in type. Rows of a matrix need one
// RowChunks each, for an odd row stride moves the grid from row to row.
//
//   RowChunks<8> chunks(V, student_row, teacher_row, gradient_row);
//   for (int64_t c = threadIdx.x; c < chunks.count(); c += blockDim.x) {
//     float u[8], v[8];
//     chunks.load(student_row, c, -INFINITY, u);
//     chunks.load(teacher_row, c, -INFINITY, v);
//     ...
//     chunks.store(gradient_row, c, gradient);
//   }
template <int W>
class RowChunks {
 public:
  static_assert(W >= 1 && (W & (W - 1)) == 0, "a chunk holds a power of two of elements");

  // Null rows are ignored.
  template <class... T>
  KD_HOST_DEVICE explicit RowChunks(int64_t n, const T*... rows) : n_(n), width_(W), shift_(0) {
    while (!fits(rows...)) width_ /= 2;
    if (width_ == 1) shift_ = 0;
  }

  KD_HOST_DEVICE int64_t count() const { return (n_ + shift_ + W - 1) / W; }
  // Index of the chunk's first element; negative in chunk 0 of a misaligned row.
  KD_HOST_DEVICE int64_t begin(int64_t chunk) const { return chunk * W - shift_; }
  KD_HOST_DEVICE int width() const { return width_; }
  KD_HOST_DEVICE int shift() const { return shift_; }

  // The chunk as stored; `fill` stands for elements outside of the row.
  template <Access kAccess = Access::kPlain, class T>
  KD_HOST_DEVICE Vec<T, W> load_raw(const T* row, int64_t chunk, T fill) const {
    Vec<T, W> out;
    const int64_t first = begin(chunk);
    if (first >= 0 && first + W <= n_) {
      load_pieces<kAccess, W>(row + first, out);
    } else {
      KD_UNROLL
      for (int i = 0; i < W; ++i) {
        const int64_t at = first + i;
        out.data[i] = at >= 0 && at < n_ ? row[at] : fill;
      }
    }
    return out;
  }

  template <Access kAccess = Access::kPlain, class F, class T>
  KD_HOST_DEVICE void load(const T* row, int64_t chunk, F fill, F (&out)[W]) const {
    widen(load_raw<kAccess>(row, chunk, to_storage<T>(fill)), out);
  }

  template <bool kStreaming = false, class T>
  KD_HOST_DEVICE void store_raw(T* row, int64_t chunk, const Vec<T, W>& value) const {
    const int64_t first = begin(chunk);
    if (first >= 0 && first + W <= n_) {
      store_pieces<kStreaming, W>(row + first, value);
    } else {
      KD_UNROLL
      for (int i = 0; i < W; ++i) {
        const int64_t at = first + i;
        if (at >= 0 && at < n_) row[at] = value.data[i];
      }
    }
  }

  template <bool kStreaming = false, class F, class T>
  KD_HOST_DEVICE void store(T* row, int64_t chunk, const F (&value)[W]) const {
    store_raw<kStreaming>(row, chunk, narrow<T>(value));
  }

 private:
  // Elements that an access of this type can take at once on a grid of width_.
  template <class T>
  KD_HOST_DEVICE int grid_of(const T*) const {
    return width_ < kVecWidth<T> ? width_ : kVecWidth<T>;
  }
  template <class T>
  KD_HOST_DEVICE static unsigned position(const T* row) {
    return static_cast<unsigned>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % W);
  }

  // Tries width_: the row with the widest grid sets the shift, the others must agree.
  template <class... T>
  KD_HOST_DEVICE bool fits(const T*... rows) {
    int widest = 0;
    shift_ = 0;
    const auto propose = [&](const auto* row) {
      if (row && grid_of(row) > widest) {
        widest = grid_of(row);
        shift_ = static_cast<int>(position(row) % static_cast<unsigned>(widest));
      }
    };
    (propose(rows), ...);
    const auto agrees = [&](const auto* row) {
      const unsigned grid = static_cast<unsigned>(grid_of(row));
      return !row || (position(row) - static_cast<unsigned>(shift_)) % grid == 0;
    };
    return (agrees(rows) && ...);
  }

  template <Access kAccess, int kPiece, class T>
  KD_HOST_DEVICE void load_pieces(const T* from, Vec<T, W>& out) const {
    if constexpr (kPiece > 1) {
      if (width_ < kPiece) return load_pieces<kAccess, kPiece / 2>(from, out);
    }
    KD_UNROLL
    for (int i = 0; i < W; i += kPiece) {
      const Vec<T, kPiece> piece = kd::load<kPiece, kAccess>(from + i);
      KD_UNROLL
      for (int j = 0; j < kPiece; ++j) out.data[i + j] = piece.data[j];
    }
  }

  template <bool kStreaming, int kPiece, class T>
  KD_HOST_DEVICE void store_pieces(T* to, const Vec<T, W>& value) const {
    if constexpr (kPiece > 1) {
      if (width_ < kPiece) return store_pieces<kStreaming, kPiece / 2>(to, value);
    }
    KD_UNROLL
    for (int i = 0; i < W; i += kPiece) {
      Vec<T, kPiece> piece;
      KD_UNROLL
      for (int j = 0; j < kPiece; ++j) piece.data[j] = value.data[i + j];
      kd::store<kStreaming>(to + i, piece);
    }
  }

  int64_t n_;
  int width_;
  int shift_;
};

}  // namespace kd
