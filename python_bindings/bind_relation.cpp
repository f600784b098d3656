// relation_rows, feature_rows, feature_columns, plackett_luce: tensors to views, numbers to a
// struct, nothing else.
#include <pybind11/stl.h>

#include <array>

#include "bind.h"
#include "common/check.h"
#include "relation/feature.h"
#include "relation/plackett_luce.h"
#include "relation/relation.h"
#include "relation/relation_walk.h"
#include "relation/softmax_relation.h"
#include "view_caster.h"

namespace kd::binding {
namespace {

RelationSpec relation_spec_from(const py::tuple& numbers) {
  RelationSpec spec;
  Py_ssize_t i = 0;
#define KD_FIELD(name) ++i;
  KD_RELATION_SPEC_FIELDS(KD_FIELD)
#undef KD_FIELD
  KD_CHECK(static_cast<Py_ssize_t>(numbers.size()) == i, "spec: expected ", i, " numbers, got ",
           numbers.size());
  i = 0;
#define KD_FIELD(name) spec.name = PyFloat_AsDouble(PyTuple_GET_ITEM(numbers.ptr(), i++));
  KD_RELATION_SPEC_FIELDS(KD_FIELD)
#undef KD_FIELD
  if (PyErr_Occurred()) throw py::error_already_set();
  return spec;
}

// The simulator build runs the CUDA sources on CPU memory.
template <class Args>
void run(const Args& args, Device device, [[maybe_unused]] void (*on_cpu)(const Args&),
         [[maybe_unused]] void (*on_cuda)(const Args&)) {
  py::gil_scoped_release release;
#if defined(KDK_BUILD_SIMT)
  static_cast<void>(device);
  on_cuda(args);
#else
  if (device == Device::kCuda) {
    if (on_cuda == nullptr) detail::fail("student: this build has no CUDA kernels");
    return on_cuda(args);
  }
  on_cpu(args);
#endif
}

#if defined(KDK_BUILD_SIMT)
#define KD_ENTRY(name) nullptr, &cuda::name
#elif defined(KDK_WITH_CUDA)
#define KD_ENTRY(name) &cpu::name, &cuda::name
#else
#define KD_ENTRY(name) &cpu::name, nullptr
#endif

}  // namespace

void bind_relation(py::module_& m) {
  py::list names;
#define KD_FIELD(name) names.append(#name);
  KD_RELATION_SPEC_FIELDS(KD_FIELD)
#undef KD_FIELD
  m.attr("RELATION_SPEC_FIELDS") = py::tuple(names);
  m.attr("RELATION_ROW") = static_cast<int>(kRelationRow);

  m.def(
      "relation_rows",
      [](py::object student, View teacher, View student_scale, View teacher_scale, View row_mask,
         View column_mask, View pair_mask, View pair_index, View row_block, View column_block,
         View row_weight, View pair_weight, View norms, View means, View pair_value, View rows,
         const py::tuple& spec) {
        RelationArgs args;
        args.student = view_from(student.ptr());
        args.stream = current_stream(student.ptr(), args.student);
        args.teacher = teacher;
        args.student_scale = student_scale;
        args.teacher_scale = teacher_scale;
        args.row_mask = row_mask;
        args.column_mask = column_mask;
        args.pair_mask = pair_mask;
        args.pair_index = pair_index;
        args.row_block = row_block;
        args.column_block = column_block;
        args.row_weight = row_weight;
        args.pair_weight = pair_weight;
        args.norms = norms;
        args.means = means;
        args.pair_value = pair_value;
        args.rows = rows;
        args.spec = relation_spec_from(spec);
        run<RelationArgs>(args, args.student.device, KD_ENTRY(relation_rows));
      },
      "Row values of a chunk of two relation maps; the products become gradients in place "
      "(csrc/relation/relation.h).");

#if !defined(KDK_BUILD_SIMT)
  m.attr("RELATION_WIDTH_UNIT") = kWidthUnit;
  m.attr("RELATION_PANEL_UNIT") = kPanelUnit;
  m.def(
      "relation_walk",
      [](const std::array<View, 6>& student, const std::array<View, 6>& teacher, View student_scale,
         View teacher_scale, View row_mask, View column_mask, View pair_mask, View pair_index,
         View row_block, View column_block, View row_weight, View norms, View means, View rows,
         bool symmetric, int64_t parts, const py::tuple& spec) {
        RelationWalkArgs args;
        args.student = {student[0], student[1], student[2], student[3], student[4], student[5]};
        args.teacher = {teacher[0], teacher[1], teacher[2], teacher[3], teacher[4], teacher[5]};
        args.symmetric = symmetric;
        args.parts = parts;
        args.map.student_scale = student_scale;
        args.map.teacher_scale = teacher_scale;
        args.map.row_mask = row_mask;
        args.map.column_mask = column_mask;
        args.map.pair_mask = pair_mask;
        args.map.pair_index = pair_index;
        args.map.row_block = row_block;
        args.map.column_block = column_block;
        args.map.row_weight = row_weight;
        args.map.norms = norms;
        args.map.means = means;
        args.map.rows = rows;
        args.map.spec = relation_spec_from(spec);
        py::gil_scoped_release release;
        cpu::relation_walk(args);
      },
      "Row values and gradients of two relation maps in blocks of rows; each side is (q, k, "
      "panels, "
      "dq, dk, further) (csrc/relation/relation_walk.h).");
#endif

#if defined(KDK_BUILD_SIMT) || defined(KDK_WITH_CUDA)
  m.def(
      "softmax_relation",
      [](py::object q_s, View k_s, View q_t, View k_t, View student_scale, View teacher_scale,
         View row_mask, View column_mask, View pair_mask, View pair_index, View row_block,
         View column_block, View row_weight, View rows, View statistics, View dq_s, View dk_s,
         View dq_t, View dk_t, const py::tuple& spec) {
        SoftmaxRelationArgs args;
        args.q_s = view_from(q_s.ptr());
        args.map.stream = current_stream(q_s.ptr(), args.q_s);
        args.k_s = k_s;
        args.q_t = q_t;
        args.k_t = k_t;
        args.map.student_scale = student_scale;
        args.map.teacher_scale = teacher_scale;
        args.map.row_mask = row_mask;
        args.map.column_mask = column_mask;
        args.map.pair_mask = pair_mask;
        args.map.pair_index = pair_index;
        args.map.row_block = row_block;
        args.map.column_block = column_block;
        args.map.row_weight = row_weight;
        args.map.rows = rows;
        args.map.spec = relation_spec_from(spec);
        args.statistics = statistics;
        args.dq_s = dq_s;
        args.dk_s = dk_s;
        args.dq_t = dq_t;
        args.dk_t = dk_t;
        py::gil_scoped_release release;
        cuda::softmax_relation(args);
      },
      "A softmax relation of half tokens in tiles (csrc/relation/softmax_relation.h).");
#endif

  m.def(
      "feature_rows",
      [](py::object student, View teacher, View mask, View weight, View columns, View rows,
         View elements, View row_upstream, View element_upstream, View student_gradient,
         View teacher_gradient, View weight_gradient, int kind, int normalize, double beta,
         double margin) {
        FeatureArgs args;
        args.student = view_from(student.ptr());
        args.stream = current_stream(student.ptr(), args.student);
        args.teacher = teacher;
        args.mask = mask;
        args.weight = weight;
        args.columns = columns;
        args.rows = rows;
        args.elements = elements;
        args.row_upstream = row_upstream;
        args.element_upstream = element_upstream;
        args.student_gradient = student_gradient;
        args.teacher_gradient = teacher_gradient;
        args.weight_gradient = weight_gradient;
        args.kind = kind, args.normalize = normalize;
        args.beta = beta, args.margin = margin;
        run<FeatureArgs>(args, args.student.device, KD_ENTRY(feature_rows));
      },
      "Values of rows of features, or their gradients (csrc/relation/feature.h).");

  m.def(
      "feature_columns",
      [](py::object tokens, View mask, View columns, View gradient, View out) {
        FeatureColumnsArgs args;
        args.tokens = view_from(tokens.ptr());
        args.stream = current_stream(tokens.ptr(), args.tokens);
        args.mask = mask;
        args.columns = columns;
        args.gradient = gradient;
        args.out = out;
        run<FeatureColumnsArgs>(args, args.tokens.device, KD_ENTRY(feature_columns));
      },
      "Means and deviations by column, or the gradient through them (csrc/relation/feature.h).");

  m.def(
      "plackett_luce",
      [](py::object scores, View order, View weights, View value, View gradient, View suffix) {
        PlackettLuceArgs args;
        args.scores = view_from(scores.ptr());
        args.stream = current_stream(scores.ptr(), args.scores);
        args.order = order;
        args.weights = weights;
        args.value = value;
        args.gradient = gradient;
        args.suffix = suffix;
        run<PlackettLuceArgs>(args, args.scores.device, KD_ENTRY(plackett_luce));
      },
      "Plackett-Luce row values and gradients (csrc/relation/plackett_luce.h).");
}

}  // namespace kd::binding
