// The CUDA vocabulary of this library: kernels include this file and no CUDA header.
//
// Under nvcc it is thin. Under a host compiler (g++ -x c++ -fno-strict-aliasing) the same kernel
// runs in an emulator whose threads are fibers, which is how kernels are tested without a GPU.
//
// Spelled as in CUDA: __global__, __device__, __launch_bounds__, threadIdx, blockIdx, blockDim,
// gridDim, __syncthreads (_or, _and, _count), __syncwarp, __shfl_sync (_up, _down, _xor),
// __ballot_sync, __any_sync, __all_sync, __match_any_sync, __reduce_{add,min,max,and,or,xor}_sync
// (sm_80), atomics, __threadfence*, __ldg, __expf and the like, __popc and the like.
//
// Spelled in our own way, for both worlds:
//   KD_SHARED(T, name)             static shared memory: KD_SHARED(float[32][33], tile);
//                                  T has no initialisers; a T with commas needs a `using` first
//   KD_DYN_SHARED(T, name)         dynamic shared memory as `T* name`, aligned to 128 bytes
//   KD_DEVICE                      __device__ __forceinline__
//   KD_ASSERT(condition)           always on in the emulator, on devices with KDK_DEVICE_ASSERT=1
//   simt::launch(info, kernel, args...)   LaunchInfo{name, grid, block, shared_bytes, stream,
//   shape} simt::launch(kernel, grid, block, shared_bytes, stream, args...)
//   simt::launch_cooperative(info, kernel, args...)   all blocks at once, at most
//   simt::resident_blocks(kernel, threads, shared_bytes); they meet in common/group_barrier.cuh
//   simt::shuffle_xor/_down/_from  shuffles of whole structs
//   simt::shared_memory_limit(), simt::multiprocessor_count()   of the current device
//   kd::cp_async16 ..., kd::named_barrier_sync ..., kd::mma_m16n8k16 ...   see simt/tensor.h
// Only in the emulator: simt::set_order(Order, seed) or KDK_SIMT_ORDER=shuffle:7 in the
// environment, simt::set_shared_limit(bytes).
//
// What the emulator catches: missing and divergent barriers (run every test in at least two
// orders), deadlocks, warp operations with wrong masks, reads of shared memory nobody wrote (it
// holds NaN), cp.async without its wait, too much shared memory, bad launch shapes; with ASan also
// accesses beyond any global or shared array, with UBSan misaligned vectors.
//
// What it cannot see: missing __threadfence or volatile, races between blocks (blocks run one after
// another, those of a cooperative launch in turns), most missing __syncwarp, performance, the error
// of fast maths. Not offered:
// __activemask, cooperative groups, clusters, TMA, wgmma (files that need those have a portable
// twin).
#pragma once

#include "common/macros.h"

#if defined(__CUDACC__)
#include "common/simt/device.h"
#else
#include "common/simt/host.h"
#endif

#include "common/simt/tensor.h"
