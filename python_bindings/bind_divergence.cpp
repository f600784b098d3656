// divergence_fwd / divergence_bwd: tensors to views, the spec's numbers to a struct, nothing else.
#include <vector>

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

void run_sum(const std::vector<DivergenceArgs>& parts, bool forward) {
  const int64_t count = static_cast<int64_t>(parts.size());
  KD_CHECK(count > 0, "parts: expected at least one, got none");
  py::gil_scoped_release release;
  if (kSimulated || parts[0].student.device == Device::kCuda) {
#if defined(KDK_BUILD_SIMT) || defined(KDK_WITH_CUDA)
    return forward ? cuda::divergence_sum_fwd(parts.data(), count)
                   : cuda::divergence_sum_bwd(parts.data(), count);
#else
    detail::fail("student: this build has no CUDA kernels");
#endif
  }
#if !defined(KDK_BUILD_SIMT)
  return forward ? cpu::divergence_sum_fwd(parts.data(), count)
                 : cpu::divergence_sum_bwd(parts.data(), count);
#endif
}

// The parts of a sum: tuples (teacher, weight, student temperature, teacher temperature, first,
// second, value, stats, spec) beside what they have in common.
std::vector<DivergenceArgs> parts_from(const DivergenceArgs& common, const py::sequence& given) {
  constexpr size_t kEntries = 9;
  std::vector<DivergenceArgs> parts;
  parts.reserve(given.size());
  for (const auto& entry : given) {
    const py::tuple part = py::cast<py::tuple>(entry);
    KD_CHECK(part.size() == kEntries, "parts: expected tuples of ", kEntries, ", got ",
             part.size());
    DivergenceArgs args = common;
    View* const views[] = {&args.teacher,
                           &args.weight,
                           &args.student_temperature,
                           &args.teacher_temperature,
                           &args.first,
                           &args.second,
                           &args.value,
                           &args.stats};
    size_t i = 0;
    for (View* view : views) *view = view_from(part[i++].ptr());
    args.spec = spec_from(py::cast<py::tuple>(part[i]));
    parts.push_back(args);
  }
  return parts;
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

  m.attr("DIVERGENCE_SUM_PARTS") = kMostSumParts;
  m.def(
      "divergence_sum_fwd",
      [](py::object student, const py::sequence& parts, View labels, View mask, View num_items,
         View grad_student) {
        DivergenceArgs common;
        common.student = view_from(student.ptr());
        common.stream = current_stream(student.ptr(), common.student);
        common.labels = labels;
        common.mask = mask;
        common.num_items = num_items;
        common.grad_student = grad_student;
        run_sum(parts_from(common, parts), true);
      },
      "Several divergences of one student and the sum of their gradients for upstream 1.");

  m.def(
      "divergence_sum_bwd",
      [](py::object student, const py::sequence& parts, View labels, View mask, View upstream,
         View grad_student) {
        DivergenceArgs common;
        common.student = view_from(student.ptr());
        common.stream = current_stream(student.ptr(), common.student);
        common.labels = labels;
        common.mask = mask;
        common.upstream = upstream;
        common.grad_student = grad_student;
        run_sum(parts_from(common, parts), false);
      },
      "The sum of the gradients from the logits, the parts' statistics and the upstream gradient.");
}

}  // namespace kd::binding
