// divergence_fwd / divergence_bwd: tensors to views, the spec's numbers to a struct, nothing else.
#include "bind.h"
#include "common/check.h"
#include "divergence/divergence.h"
#include "view_caster.h"

namespace kd::binding {
namespace {

DivergenceSpec spec_from(const py::tuple& numbers) {
  DivergenceSpec spec;
  Py_ssize_t i = 0;
#define KD_FIELD(name) ++i;
  KD_DIVERGENCE_SPEC_FIELDS(KD_FIELD)
#undef KD_FIELD
  KD_CHECK(static_cast<Py_ssize_t>(numbers.size()) == i, "spec: expected ", i, " numbers, got ",
           numbers.size());
  i = 0;
#define KD_FIELD(name) spec.name = PyFloat_AsDouble(PyTuple_GET_ITEM(numbers.ptr(), i++));
  KD_DIVERGENCE_SPEC_FIELDS(KD_FIELD)
#undef KD_FIELD
  if (PyErr_Occurred()) throw py::error_already_set();
  return spec;
}

// The simulator build runs the CUDA sources on CPU memory.
#if defined(KDK_BUILD_SIMT)
constexpr bool kSimulated = true;
#else
constexpr bool kSimulated = false;
#endif

void run(const DivergenceArgs& args, bool forward) {
  py::gil_scoped_release release;
  if (kSimulated || args.student.device == Device::kCuda) {
#if defined(KDK_BUILD_SIMT) || defined(KDK_WITH_CUDA)
    return forward ? cuda::divergence_fwd(args) : cuda::divergence_bwd(args);
#else
    detail::fail("student: this build has no CUDA kernels");
#endif
  }
#if !defined(KDK_BUILD_SIMT)
  return forward ? cpu::divergence_fwd(args) : cpu::divergence_bwd(args);
#endif
}

}  // namespace

void bind_divergence(py::module_& m) {
  py::tuple fields(0);
  py::list names;
#define KD_FIELD(name) names.append(#name);
  KD_DIVERGENCE_SPEC_FIELDS(KD_FIELD)
#undef KD_FIELD
  m.attr("DIVERGENCE_SPEC_FIELDS") = py::tuple(names);
  m.attr("DIVERGENCE_STATS") = static_cast<int>(kStats);

  m.def(
      "divergence_fwd",
      [](py::object student, View teacher, View labels, View mask, View weight,
         View student_temperature, View teacher_temperature, View first, View second,
         View num_items, View value, View stats, View grad_student, View grad_teacher,
         View grad_temperature, const py::tuple& spec) {
        DivergenceArgs args;
        args.student = view_from(student.ptr());
        args.stream = current_stream(student.ptr(), args.student);
        args.teacher = teacher;
        args.labels = labels;
        args.mask = mask;
        args.weight = weight;
        args.student_temperature = student_temperature;
        args.teacher_temperature = teacher_temperature;
        args.first = first;
        args.second = second;
        args.num_items = num_items;
        args.value = value;
        args.stats = stats;
        args.grad_student = grad_student;
        args.grad_teacher = grad_teacher;
        args.grad_temperature = grad_temperature;
        args.spec = spec_from(spec);
        run(args, true);
      },
      "Row divergences, statistics and gradients for upstream 1 (csrc/divergence/divergence.h).");

  m.def(
      "divergence_bwd",
      [](py::object student, View teacher, View labels, View mask, View student_temperature,
         View teacher_temperature, View first, View second, View stats, View upstream,
         View grad_student, View grad_teacher, View grad_temperature, const py::tuple& spec) {
        DivergenceArgs args;
        args.student = view_from(student.ptr());
        args.stream = current_stream(student.ptr(), args.student);
        args.teacher = teacher;
        args.labels = labels;
        args.mask = mask;
        args.student_temperature = student_temperature;
        args.teacher_temperature = teacher_temperature;
        args.first = first;
        args.second = second;
        args.stats = stats;
        args.upstream = upstream;
        args.grad_student = grad_student;
        args.grad_teacher = grad_teacher;
        args.grad_temperature = grad_temperature;
        args.spec = spec_from(spec);
        run(args, false);
      },
      "Gradients from the logits, the forward's statistics and the upstream gradient.");
}

}  // namespace kd::binding
