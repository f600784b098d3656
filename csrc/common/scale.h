// tensor *= factor, and the memory stream that benchmarks measure themselves against.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace kd {

// In place, any float dtype and strides. factor: one number of the compute dtype (float64 for
// float64, else float32), read where it lies; nothing is touched if it is 1.
namespace cpu {
void scale(const View& tensor, const View& factor);

// dst = a + b, contiguous float32 of equal size, by non-temporal stores: two reads and one write at
// the speed of memory.
void stream_2r1w(const View& dst, const View& a, const View& b);
}  // namespace cpu

namespace cuda {  // also the host emulation
void scale(const View& tensor, const View& factor, void* stream);
}  // namespace cuda

// Per ISA: n consecutive entries.
KD_DECLARE_PER_ISA(void scale_entries(void* data, DType dtype, int64_t n, double factor))
KD_DECLARE_PER_ISA(void add_entries(float* dst, const float* a, const float* b, int64_t n))

}  // namespace kd
