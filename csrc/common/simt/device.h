// The few words of simt.h that CUDA does not have, for nvcc.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/macros.h"

// For small functions that kernels call.
#define KD_DEVICE __device__ __forceinline__

namespace simt {

template <class T>
struct Identity {
  using type = T;
};
template <class T>
using identity_t = typename Identity<T>::type;

}  // namespace simt

#define KD_SHARED(T, name) __shared__::simt::identity_t<T> name

#define KD_DYN_SHARED(T, name)                                        \
  extern __shared__ __align__(128) unsigned char kd_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(kd_dynamic_shared)

// Off in release builds; -DKDK_DEVICE_ASSERT=1 turns it on.
#if defined(KDK_DEVICE_ASSERT) && KDK_DEVICE_ASSERT
#define KD_ASSERT(condition) assert(condition)
#else
#define KD_ASSERT(condition) static_cast<void>(0)
#endif

namespace simt {

using Stream = cudaStream_t;

// What a launch is called and how large it is; errors quote all of it.
struct LaunchInfo {
  const char* kernel = "a kernel";
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic shared memory
  Stream stream = nullptr;
  std::string shape;  // free text for error messages, such as "N=4, V=32000"
};

namespace detail {

[[noreturn]] inline void fail(const LaunchInfo& info, const char* doing, cudaError_t error) {
  std::ostringstream text;
  text << "kernel " << info.kernel << ", " << doing << ": " << cudaGetErrorName(error) << " ("
       << cudaGetErrorString(error) << "), grid (" << info.grid.x << ',' << info.grid.y << ','
       << info.grid.z << "), block (" << info.block.x << ',' << info.block.y << ',' << info.block.z
       << "), " << info.shared_bytes << " bytes of dynamic shared memory";
  if (!info.shape.empty()) text << ", " << info.shape;
  throw std::runtime_error(text.str());
}

inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = otherwise;
  if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return otherwise;
  return value;
}

}  // namespace detail

// KDK_SYNC=1 waits for every kernel, so that an asynchronous error names the kernel that made it.
inline bool launch_synchronously() {
  static const bool on = [] {
    const char* text = std::getenv("KDK_SYNC");
    return text && *text && std::strcmp(text, "0") != 0;
  }();
  return on;
}

// Of the current device.
inline size_t shared_memory_limit() {
  return static_cast<size_t>(
      detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 << 10));
}
inline int multiprocessor_count() {
  return detail::device_attribute(cudaDevAttrMultiProcessorCount, 1);
}

namespace detail {

// More shared memory than every GPU gives must be asked for.
inline cudaError_t ask_for_shared(const void* function, size_t bytes) {
  if (bytes <= (48 << 10)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <class... Params, class... Args>
void launch_blocks(const LaunchInfo& info, bool together, void (*kernel)(Params...),
                   Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "the kernel takes another argument count");
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t refused = ask_for_shared(function, info.shared_bytes);
  if (refused != cudaSuccess) fail(info, "asking for shared memory", refused);
  std::tuple<Params...> values(static_cast<Params>(std::forward<Args>(args))...);
  const cudaError_t error = std::apply(
      [&](auto&... value) {
        // One more than needed, for a kernel without parameters.
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))..., nullptr};
        return together ? cudaLaunchCooperativeKernel(function, info.grid, info.block, pointers,
                                                      info.shared_bytes, info.stream)
                        : cudaLaunchKernel(function, info.grid, info.block, pointers,
                                           info.shared_bytes, info.stream);
      },
      values);
  if (error != cudaSuccess) {
    cudaGetLastError();  // an error of a launch is not sticky: clear it
    fail(info, "launch", error);
  }
  if (launch_synchronously()) {
    const cudaError_t late = cudaStreamSynchronize(info.stream);
    if (late != cudaSuccess) fail(info, "while it ran", late);
  }
}

}  // namespace detail

template <class... Params, class... Args>
void launch(const LaunchInfo& info, void (*kernel)(Params...), Args&&... args) {
  detail::launch_blocks(info, false, kernel, std::forward<Args>(args)...);
}

// All blocks run at once, so they may wait for each other. At most `resident_blocks` of them.
template <class... Params, class... Args>
void launch_cooperative(const LaunchInfo& info, void (*kernel)(Params...), Args&&... args) {
  detail::launch_blocks(info, true, kernel, std::forward<Args>(args)...);
}

// Blocks of this kernel that the current device holds at once; 0 where that cannot be told.
template <class... Params>
int resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (!detail::device_attribute(cudaDevAttrCooperativeLaunch, 0)) return 0;
  if (detail::ask_for_shared(function, shared_bytes) != cudaSuccess) return 0;
  int each = 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function, threads, shared_bytes) !=
      cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return each * multiprocessor_count();
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            Args&&... args) {
  launch(LaunchInfo{"(unnamed)", grid, block, shared_bytes, stream, {}}, kernel,
         std::forward<Args>(args)...);
}

// Shuffles of any trivially copyable struct (a multiple of 4 bytes), word by word.
namespace detail {

template <class T, class ShuffleWord>
__device__ __forceinline__ T shuffle_words(const T& value, ShuffleWord&& shuffle_word) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) % 4 == 0,
                "a shuffled type is trivially copyable and a multiple of 4 bytes");
  constexpr int kWords = sizeof(T) / 4;
  unsigned words[kWords];
  memcpy(words, &value, sizeof(T));
  KD_UNROLL
  for (int i = 0; i < kWords; ++i) words[i] = shuffle_word(words[i]);
  T out;
  memcpy(&out, words, sizeof(T));
  return out;
}

}  // namespace detail

template <class T>
__device__ __forceinline__ T shuffle_xor(unsigned mask, const T& value, int lane_mask,
                                         int width = 32) {
  return detail::shuffle_words(
      value, [&](unsigned word) { return __shfl_xor_sync(mask, word, lane_mask, width); });
}
template <class T>
__device__ __forceinline__ T shuffle_down(unsigned mask, const T& value, unsigned delta,
                                          int width = 32) {
  return detail::shuffle_words(
      value, [&](unsigned word) { return __shfl_down_sync(mask, word, delta, width); });
}
template <class T>
__device__ __forceinline__ T shuffle_from(unsigned mask, const T& value, int source,
                                          int width = 32) {
  return detail::shuffle_words(
      value, [&](unsigned word) { return __shfl_sync(mask, word, source, width); });
}

}  // namespace simt
