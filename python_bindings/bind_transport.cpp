// sinkhorn_fwd / _bwd, annealed and sorted_transport: tensors to views, numbers to structs, nothing
// else.
#include "bind.h"
#include "common/check.h"
#include "transport/transport.h"
#include "view_caster.h"

namespace kd::binding {
namespace {

SinkhornSpec spec_from(const py::tuple& numbers) {
  SinkhornSpec spec;
  Py_ssize_t i = 0;
#define KD_FIELD(name) ++i;
  KD_SINKHORN_SPEC_FIELDS(KD_FIELD)
#undef KD_FIELD
  KD_CHECK(static_cast<Py_ssize_t>(numbers.size()) == i, "spec: expected ", i, " numbers, got ",
           numbers.size());
  i = 0;
#define KD_FIELD(name) spec.name = PyFloat_AsDouble(PyTuple_GET_ITEM(numbers.ptr(), i++));
  KD_SINKHORN_SPEC_FIELDS(KD_FIELD)
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

template <class Args>
struct Entry {
  using type = void (*)(const Args&);
};

template <class Args>
void run(const Args& args, Device device, typename Entry<Args>::type on_cpu,
         typename Entry<Args>::type on_cuda) {
  py::gil_scoped_release release;
  const auto kernel = kSimulated || device == Device::kCuda ? on_cuda : on_cpu;
  KD_CHECK(kernel != nullptr, "cost: this build has no kernels for ", name(device), " tensors");
  kernel(args);
}

#if defined(KDK_BUILD_SIMT) || defined(KDK_WITH_CUDA)
#define KD_ON_CUDA(function) (&cuda::function)
#else
#define KD_ON_CUDA(function) nullptr
#endif
#if defined(KDK_BUILD_SIMT)
#define KD_ON_CPU(function) nullptr
#else
#define KD_ON_CPU(function) (&cpu::function)
#endif

}  // namespace

void bind_transport(py::module_& m) {
  py::list names;
#define KD_FIELD(name) names.append(#name);
  KD_SINKHORN_SPEC_FIELDS(KD_FIELD)
#undef KD_FIELD
  m.attr("SINKHORN_SPEC_FIELDS") = py::tuple(names);

  m.def("sinkhorn_workspace", [](int64_t rows, int64_t columns, bool on_cuda) {
    const auto size =
        kSimulated || on_cuda ? KD_ON_CUDA(sinkhorn_workspace) : KD_ON_CPU(sinkhorn_workspace);
    return size(rows, columns);
  });
  m.def("sorted_workspace", [](int64_t student, int64_t teacher, bool wide, bool on_cuda) {
    const auto size =
        kSimulated || on_cuda ? KD_ON_CUDA(sorted_workspace) : KD_ON_CPU(sorted_workspace);
    return size(student, teacher, wide);
  });

  m.def(
      "sinkhorn_fwd",
      [](py::object cost, View a, View b, View student_lengths, View teacher_lengths, View f,
         View g, View done, View linear, View rows, View columns, View plan, View workspace,
         const py::tuple& spec) {
        SinkhornArgs args;
        args.cost = view_from(cost.ptr());
        args.stream = current_stream(cost.ptr(), args.cost);
        args.a = a;
        args.b = b;
        args.student_lengths = student_lengths;
        args.teacher_lengths = teacher_lengths;
        args.f = f;
        args.g = g;
        args.done = done;
        args.linear = linear;
        args.rows = rows;
        args.columns = columns;
        args.plan = plan;
        args.workspace = workspace;
        args.spec = spec_from(spec);
        run(args, args.cost.device, KD_ON_CPU(sinkhorn_fwd), KD_ON_CUDA(sinkhorn_fwd));
      },
      "Scalings, plan and sums of entropic transport (csrc/transport/transport.h).");

  m.def(
      "sinkhorn_bwd",
      [](py::object cost, View a, View b, View student_lengths, View teacher_lengths, View f,
         View g, View done, View linear_bar, View rows_bar, View columns_bar, View plan_bar,
         View f_bar, View g_bar, View grad_cost, View grad_a, View grad_b, View workspace,
         const py::tuple& spec) {
        SinkhornArgs args;
        args.cost = view_from(cost.ptr());
        args.stream = current_stream(cost.ptr(), args.cost);
        args.a = a;
        args.b = b;
        args.student_lengths = student_lengths;
        args.teacher_lengths = teacher_lengths;
        args.f = f;
        args.g = g;
        args.done = done;
        args.linear_bar = linear_bar;
        args.rows_bar = rows_bar;
        args.columns_bar = columns_bar;
        args.plan_bar = plan_bar;
        args.f_bar = f_bar;
        args.g_bar = g_bar;
        args.grad_cost = grad_cost;
        args.grad_a = grad_a;
        args.grad_b = grad_b;
        args.workspace = workspace;
        args.spec = spec_from(spec);
        run(args, args.cost.device, KD_ON_CPU(sinkhorn_bwd), KD_ON_CUDA(sinkhorn_bwd));
      },
      "Gradients of cost and marginals from the stored scalings and the outputs' adjoints.");

#if !defined(KDK_BUILD_SIMT)
  m.def("marginals_fit",
        [](View a, View b, View student_lengths, View teacher_lengths, bool balanced) {
          return cpu::marginals_fit(a, b, student_lengths, teacher_lengths, balanced);
        });
#endif

  m.def(
      "annealed",
      [](py::object x, View y, View log_a, View log_b, const py::tuple& costs, View potentials,
         View slopes, View workspace, const py::tuple& epsilons, bool root, double rho, bool need_x,
         bool need_y) {
        AnnealedArgs args;
        args.x = view_from(x.ptr());
        args.stream = current_stream(x.ptr(), args.x);
        args.y = y;
        args.log_a = log_a;
        args.log_b = log_b;
        KD_CHECK(costs.size() == 2 || costs.size() == 4, "costs: expected of 2 or 4 sides, got ",
                 costs.size());
        args.debias = costs.size() == 4;
        for (size_t side = 0; side < costs.size(); ++side) {
          args.costs[side] = costs[side].cast<View>();
        }
        args.potentials = potentials;
        args.slopes = slopes;
        args.workspace = workspace;
        for (const py::handle epsilon : epsilons) args.epsilons.push_back(epsilon.cast<double>());
        args.root = root;
        args.rho = rho;
        args.need_x = need_x;
        args.need_y = need_y;
        run(args, args.x.device, KD_ON_CPU(annealed), KD_ON_CUDA(annealed));
      },
      "Annealed symmetric potentials between two clouds of points, and their slopes.");

  m.def(
      "sorted_transport",
      [](py::object student, View teacher, View mask, View student_scale, View teacher_scale,
         View student_excluded, View teacher_excluded, View coefficient, View value, View slopes,
         View grad_student, View workspace, double student_temperature,
         double teacher_temperature) {
        SortedArgs args;
        args.student = view_from(student.ptr());
        args.stream = current_stream(student.ptr(), args.student);
        args.teacher = teacher;
        args.mask = mask;
        args.student_scale = student_scale;
        args.teacher_scale = teacher_scale;
        args.student_excluded = student_excluded;
        args.teacher_excluded = teacher_excluded;
        args.coefficient = coefficient;
        args.value = value;
        args.slopes = slopes;
        args.grad_student = grad_student;
        args.workspace = workspace;
        args.student_temperature = student_temperature;
        args.teacher_temperature = teacher_temperature;
        run(args, args.student.device, KD_ON_CPU(sorted_transport), KD_ON_CUDA(sorted_transport));
      },
      "Sorted transport of row pairs, and its gradient times a coefficient a row.");
}

}  // namespace kd::binding
