// The CUDA vocabulary for a host compiler, spelled as in CUDA. Kernels include common/simt.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "common/simt/cooperative.h"

// __noinline__ and friends that libstdc++ uses inside attributes are left alone on purpose.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define KD_DEVICE inline

// ---- shared memory -----------------------------------------------------------------------------

namespace simt {

template <class T>
struct Identity {
  static_assert(std::is_trivially_default_constructible_v<std::remove_all_extents_t<T>>,
                "shared memory is never initialised: use a type without initialisers");
  using type = T;
};
template <class T>
using identity_t = typename Identity<T>::type;

}  // namespace simt

#define KD_SHARED(T, name)                                            \
  static char name##_kd_key;                                          \
  ::simt::identity_t<T>& name = *static_cast<::simt::identity_t<T>*>( \
      ::simt::host::Engine::running("KD_SHARED")                      \
          .shared_variable(&name##_kd_key, sizeof(T), alignof(T)))

#define KD_DYN_SHARED(T, name) \
  T* name = static_cast<T*>(::simt::host::Engine::running("KD_DYN_SHARED").dynamic_shared())

// In the emulator always on; its message names kernel, block and thread.
#define KD_ASSERT(condition)                                                       \
  do {                                                                             \
    if (!(condition)) {                                                            \
      throw std::logic_error(std::string("KD_ASSERT(" #condition ") failed at ") + \
                             ::simt::host::text({"", __FILE__, __LINE__}));        \
    }                                                                              \
  } while (0)

// ---- launch and limits -------------------------------------------------------------------------

namespace simt {

// Applies to every later launch of the process.
inline void set_order(Order order, uint64_t seed = 0) {
  host::schedule() = {order, seed};
}

// How much shared memory a block may have. The emulated GPU gives 99 KiB unless told otherwise.
inline size_t shared_memory_limit() {
  return host::shared_limit();
}
inline void set_shared_limit(size_t bytes) {
  host::shared_limit() = bytes;
}

// Few multiprocessors, so that persistent kernels loop even over small inputs.
inline int multiprocessor_count() {
  return 4;
}

namespace host {

template <class... Params, class... Args>
void launch_blocks(const LaunchInfo& info, bool together, void (*kernel)(Params...),
                   Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "the kernel takes another argument count");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> values;
  } call{kernel, std::tuple<Params...>(static_cast<Params>(std::forward<Args>(args))...)};
  const auto body = [](void* argument) {
    // Every lane gets its own copy, as on the GPU.
    const Call& call = *static_cast<const Call*>(argument);
    std::apply(call.kernel, call.values);
  };
  if (together) return Engine::run_together(info, body, &call);
  Engine::of_thread().run(info, body, &call);
}

}  // namespace host

template <class... Params, class... Args>
void launch(const LaunchInfo& info, void (*kernel)(Params...), Args&&... args) {
  host::launch_blocks(info, false, kernel, std::forward<Args>(args)...);
}

// All blocks run at once, so they may wait for each other. At most `resident_blocks` of them.
template <class... Params, class... Args>
void launch_cooperative(const LaunchInfo& info, void (*kernel)(Params...), Args&&... args) {
  host::launch_blocks(info, true, kernel, std::forward<Args>(args)...);
}

template <class... Params>
int resident_blocks(void (*)(Params...), int, size_t) {
  return static_cast<int>(host::kResidentBlocks);
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            Args&&... args) {
  launch(LaunchInfo{"(unnamed)", grid, block, shared_bytes, stream, {}}, kernel,
         std::forward<Args>(args)...);
}

}  // namespace simt

// Functions that wait take their caller's place, for error messages.
#define KD_SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- barriers ----------------------------------------------------------------------------------

inline void __syncthreads(KD_SIMT_SITE) {
  simt::host::Engine::running("__syncthreads")
      .barrier(0, 0, false, true, {"__syncthreads", file, line});
}
inline int __syncthreads_count(int predicate, KD_SIMT_SITE) {
  return simt::host::Engine::running("__syncthreads_count")
      .barrier(0, 0, predicate != 0, true, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, KD_SIMT_SITE) {
  return simt::host::Engine::running("__syncthreads_or")
             .barrier(0, 0, predicate != 0, true, {"__syncthreads_or", file, line}) > 0;
}
inline int __syncthreads_and(int predicate, KD_SIMT_SITE) {
  int arrived = 0;
  const int votes =
      simt::host::Engine::running("__syncthreads_and")
          .barrier(0, 0, predicate != 0, true, {"__syncthreads_and", file, line}, &arrived);
  return votes == arrived;
}

inline void __threadfence_block() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_system() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// Lets other lanes run: a lane that spins on a flag must call it, for nothing interrupts it.
inline void __nanosleep(unsigned, KD_SIMT_SITE) {
  simt::host::Engine::running("__nanosleep").yield_lane({"__nanosleep", file, line});
}

// ---- warp operations ---------------------------------------------------------------------------

namespace simt::host {

template <class Fn>
void for_each_lane(uint32_t mask, Fn&& fn) {
  for (; mask; mask &= mask - 1) fn(__builtin_ctz(mask));
}

inline void combine_nothing(WarpCall*, uint32_t) {}

// A lane that reads one that does not take part gets NaN (CUDA: undefined).
template <class T>
void combine_shuffle(WarpCall* calls, uint32_t present) {
  for_each_lane(present, [&](int lane) {
    const int source = calls[lane].source;
    if (present >> source & 1u) {
      std::memcpy(calls[lane].out, calls[source].in, sizeof(T));
    } else {
      std::memset(calls[lane].out, 0xFF, sizeof(T));
    }
  });
}

struct Votes {
  uint32_t yes;
  uint32_t present;
};

inline void combine_votes(WarpCall* calls, uint32_t present) {
  Votes votes{0, present};
  for_each_lane(present, [&](int lane) {
    votes.yes |= static_cast<uint32_t>(*static_cast<const int*>(calls[lane].in) != 0) << lane;
  });
  for_each_lane(present, [&](int lane) { *static_cast<Votes*>(calls[lane].out) = votes; });
}

template <class T>
void combine_match(WarpCall* calls, uint32_t present) {
  for_each_lane(present, [&](int lane) {
    uint32_t equal = 0;
    for_each_lane(present, [&](int other) {
      const bool same = std::memcmp(calls[lane].in, calls[other].in, sizeof(T)) == 0;
      equal |= static_cast<uint32_t>(same) << other;
    });
    *static_cast<uint32_t*>(calls[lane].out) = equal;
  });
}

template <class T, T (*op)(T, T)>
void combine_reduce(WarpCall* calls, uint32_t present) {
  T total{};
  bool first = true;
  for_each_lane(present, [&](int lane) {
    const T value = *static_cast<const T*>(calls[lane].in);
    total = first ? value : op(total, value);
    first = false;
  });
  for_each_lane(present, [&](int lane) { *static_cast<T*>(calls[lane].out) = total; });
}

template <class In, class Out>
Out warp_call(uint32_t mask, void (*combine)(WarpCall*, uint32_t), In in, Out out, int source,
              const Site& site) {
  Engine::running(site.operation).warp_operation({mask, combine, &in, &out, source}, site);
  return out;
}

inline int lane_index() {
  return Engine::running("a warp operation").lane_in_warp();
}

inline void check_width(int width) {
  if (width < 1 || width > 32 || (width & (width - 1))) {
    throw std::logic_error("shuffle width must be a power of two up to 32");
  }
}

inline int source_indexed(int source, int width) {
  check_width(width);
  const int lane = lane_index();
  return (lane & ~(width - 1)) | (source & (width - 1));
}
inline int source_up(unsigned delta, int width) {
  check_width(width);
  const int lane = lane_index();
  return (lane & (width - 1)) < static_cast<int>(delta) ? lane : lane - static_cast<int>(delta);
}
inline int source_down(unsigned delta, int width) {
  check_width(width);
  const int lane = lane_index();
  return (lane & (width - 1)) + static_cast<int>(delta) >= width ? lane
                                                                 : lane + static_cast<int>(delta);
}
inline int source_xor(int mask, int width) {
  check_width(width);
  const int lane = lane_index();
  const int source = lane ^ mask;
  // A later group of lanes may not be read, an earlier one may.
  return source >= (lane & ~(width - 1)) + width ? lane : source;
}

template <class T>
T shuffle(uint32_t mask, T value, int source, const Site& site) {
  return warp_call(mask, &combine_shuffle<T>, value, T{}, source, site);
}

// CUDA shuffles 4 and 8 byte numbers; structs go through simt::shuffle_xor and its like.
template <class T>
using Shuffled = std::enable_if_t<std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), T>;

}  // namespace simt::host

inline void __syncwarp(unsigned mask = 0xffffffffu, KD_SIMT_SITE) {
  simt::host::warp_call(mask, &simt::host::combine_nothing, 0, 0, 0, {"__syncwarp", file, line});
}
template <class T>
simt::host::Shuffled<T> __shfl_sync(unsigned mask, T value, int source, int width = 32,
                                    KD_SIMT_SITE) {
  return simt::host::shuffle(mask, value, simt::host::source_indexed(source, width),
                             {"__shfl_sync", file, line});
}
template <class T>
simt::host::Shuffled<T> __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                       KD_SIMT_SITE) {
  return simt::host::shuffle(mask, value, simt::host::source_up(delta, width),
                             {"__shfl_up_sync", file, line});
}
template <class T>
simt::host::Shuffled<T> __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                         KD_SIMT_SITE) {
  return simt::host::shuffle(mask, value, simt::host::source_down(delta, width),
                             {"__shfl_down_sync", file, line});
}
template <class T>
simt::host::Shuffled<T> __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                                        KD_SIMT_SITE) {
  return simt::host::shuffle(mask, value, simt::host::source_xor(lane_mask, width),
                             {"__shfl_xor_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, KD_SIMT_SITE) {
  return simt::host::warp_call(mask, &simt::host::combine_votes, predicate, simt::host::Votes{}, 0,
                               {"__ballot_sync", file, line})
      .yes;
}
inline int __any_sync(unsigned mask, int predicate, KD_SIMT_SITE) {
  return simt::host::warp_call(mask, &simt::host::combine_votes, predicate, simt::host::Votes{}, 0,
                               {"__any_sync", file, line})
             .yes != 0;
}
inline int __all_sync(unsigned mask, int predicate, KD_SIMT_SITE) {
  const auto votes = simt::host::warp_call(mask, &simt::host::combine_votes, predicate,
                                           simt::host::Votes{}, 0, {"__all_sync", file, line});
  return votes.yes == votes.present;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, KD_SIMT_SITE) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  return simt::host::warp_call(mask, &simt::host::combine_match<T>, value, uint32_t{0}, 0,
                               {"__match_any_sync", file, line});
}

namespace simt::host {
template <class T>
T add_values(T a, T b) {
  return a + b;
}
template <class T>
T min_values(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max_values(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T and_values(T a, T b) {
  return a & b;
}
template <class T>
T or_values(T a, T b) {
  return a | b;
}
template <class T>
T xor_values(T a, T b) {
  return a ^ b;
}
}  // namespace simt::host

// sm_80 and newer. CUDA has add, min and max for int and unsigned, the others for unsigned only.
#define KD_SIMT_REDUCE(operation, T)                                                             \
  inline T __reduce_##operation##_sync(unsigned mask, T value, KD_SIMT_SITE) {                   \
    return simt::host::warp_call(                                                                \
        mask, &simt::host::combine_reduce<T, simt::host::operation##_values<T>>, value, T{0}, 0, \
        {"__reduce_" #operation "_sync", file, line});                                           \
  }
KD_SIMT_REDUCE(add, int)
KD_SIMT_REDUCE(add, unsigned)
KD_SIMT_REDUCE(min, int)
KD_SIMT_REDUCE(min, unsigned)
KD_SIMT_REDUCE(max, int)
KD_SIMT_REDUCE(max, unsigned)
KD_SIMT_REDUCE(and, unsigned)
KD_SIMT_REDUCE(or, unsigned)
KD_SIMT_REDUCE(xor, unsigned)
#undef KD_SIMT_REDUCE

namespace simt {

// Shuffles of any trivially copyable struct (a multiple of 4 bytes) in one step.
template <class T>
T shuffle_xor(uint32_t mask, const T& value, int lane_mask, int width = 32, KD_SIMT_SITE) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0);
  return host::shuffle(mask, value, host::source_xor(lane_mask, width),
                       {"simt::shuffle_xor", file, line});
}
template <class T>
T shuffle_down(uint32_t mask, const T& value, unsigned delta, int width = 32, KD_SIMT_SITE) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0);
  return host::shuffle(mask, value, host::source_down(delta, width),
                       {"simt::shuffle_down", file, line});
}
template <class T>
T shuffle_from(uint32_t mask, const T& value, int source, int width = 32, KD_SIMT_SITE) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0);
  return host::shuffle(mask, value, host::source_indexed(source, width),
                       {"simt::shuffle_from", file, line});
}

}  // namespace simt

#include "common/simt/host_intrinsics.h"
