// tensor *= factor in place: how a gradient that was made for upstream 1 meets the real upstream.
// The factor, one number, is read where it lies; if it is 1, nothing is touched.
#pragma once

#include "common/view.h"

namespace kd {

namespace cpu {
void scale(const View& tensor, const View& factor);
}  // namespace cpu

namespace cuda {  // also the host emulation of the same kernel, on CPU memory
// tensor: () to (N, V), floating, last dimension contiguous; factor: one float32 or float64.
void scale(const View& tensor, const View& factor, void* stream);
}  // namespace cuda

}  // namespace kd
