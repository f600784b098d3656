// Operations that every family uses.
#include "bind.h"
#include "common/check.h"
#include "common/scale.h"
#include "view_caster.h"

namespace kd::binding {

void bind_common(py::module_& m) {
  m.def(
      "scale",
      [](py::object tensor, View factor) {
        const View view = view_from(tensor.ptr());
        void* stream = current_stream(tensor.ptr(), view);
        py::gil_scoped_release release;
#if defined(KDK_BUILD_SIMT)
        cuda::scale(view, factor, stream);
#elif defined(KDK_WITH_CUDA)
        view.device == Device::kCuda ? cuda::scale(view, factor, stream) : cpu::scale(view, factor);
#else
        static_cast<void>(stream);
        cpu::scale(view, factor);
#endif
      },
      "tensor *= factor in place; returns at once where factor is 1.");
#if !defined(KDK_BUILD_SIMT)
  m.def(
      "stream_2r1w",
      [](View dst, View a, View b) {
        py::gil_scoped_release release;
        cpu::stream_2r1w(dst, a, b);
      },
      "dst = a + b by non-temporal stores: the memory's speed, for benchmarks.");
#endif
}

}  // namespace kd::binding
