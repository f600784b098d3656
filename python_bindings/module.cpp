// The extension module: `_C` (CPU, and CUDA where nvcc was there) or `_simt` (the CUDA sources run
// on the host, development only). Both export the same functions.
#include "bind.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "view_caster.h"

#if defined(KDK_WITH_CUDA)
#include "common/cuda_info.h"
#endif
#if defined(KDK_BUILD_SIMT)
#include "common/simt.h"
#endif

namespace py = pybind11;

#if defined(KDK_BUILD_SIMT)
PYBIND11_MODULE(_simt, m, py::mod_gil_not_used()) {
#else
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
#endif
  m.attr("version") = KDK_VERSION;
  m.attr("cuda_architectures") = KDK_CUDA_ARCHITECTURES;
  m.def(
      "set_tensor_functions",
      [](py::object describe, py::object stream) {
        kd::binding::describe_function() = describe.release().ptr();
        kd::binding::stream_function() = stream.release().ptr();
      },
      "Functions that describe a tensor by integers and name a device's current stream.");
  m.def("binding", [] {
    return kd::binding::force_integers() ? "integers" : "exchange table where the type has one";
  });
#if defined(KDK_BUILD_SIMT)
  m.def(
      "set_order",
      [](const std::string& order, uint64_t seed) {
        simt::set_order(simt::parse_order(order), seed);
      },
      py::arg("order"), py::arg("seed") = 0);
#else
  m.def("isa", [] { return std::string(kd::isa_name()); });
  m.def("set_isa", [](const std::string& name) { kd::set_isa(name.c_str()); });
  m.def("compiled_isas", [] {
    py::list names;
    for (const kd::Isa isa : kd::kCompiledIsas) names.append(kd::name(isa));
    return names;
  });
  m.def("num_threads", &kd::num_threads);
#endif
#if defined(KDK_WITH_CUDA)
  m.def("cuda_info", [] {
    const kd::CudaInfo info = kd::cuda_info();
    py::dict out;
    out["runtime"] = info.runtime;
    out["driver"] = info.driver;
    out["devices"] = info.devices;
    out["error"] = info.error;
    return out;
  });
#endif
  kd::binding::bind_common(m);
  kd::binding::bind_divergence(m);
  kd::binding::bind_token_stats(m);
  kd::binding::bind_gromov(m);
  kd::binding::bind_transport(m);
  kd::binding::bind_relation(m);
}
