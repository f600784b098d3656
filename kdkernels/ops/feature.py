"""feature under autograd.

`feature_sum`, eager: a sum over rows whose gradient for upstream 1 is made by the walk that makes
the values, each side is read once. `feature`, everything else (values of rows, weights, float16
gradients, torch.func, torch.compile): forward keeps nothing, backward reads again and writes the
gradients once, in the dtype of the rows, with the true upstream inside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.registry import pick
from ..backends.torch_feature import KINDS, NORMALIZES, feature_dense
from .common import compute_dtype, empty, functorch_active, refuse_jvp, refuse_vmap
from .once import refuse_second_of

_NO_SECOND = "kdkernels.feature has no second derivative"


class FeatureSpec(NamedTuple):
    kind: str
    normalize: str  # a name of NORMALIZES
    groups: int  # standardize: the rows are so many groups of equal size
    beta: float
    margin: float
    elements: bool  # values of elements (N, d) instead of rows (N,)


def _has_kernels(student: Tensor) -> bool:
    return hasattr(pick("relation", student.device.type), "feature_rows")


def _columns(x: Tensor, mask: Tensor | None, out: Tensor, groups: int) -> None:
    """Means and inverse deviations (2, G, d) of the tokens."""
    tokens = x.view(groups, x.shape[0] // groups, x.shape[1])
    mask = None if mask is None else mask.view(tokens.shape[:2])
    pick("relation", x.device.type).feature_columns(tokens, mask, out, None, None)


def _forward(student, teacher, mask, weight, spec: FeatureSpec) -> tuple[Tensor, Tensor]:
    """(values, column statistics or an empty tensor)."""
    rows, width = student.shape
    dtype, device = compute_dtype(student), student.device
    if not _has_kernels(student):
        value = feature_dense(student, teacher, mask, weight, *spec)
        return value.to(dtype) if spec.elements else value, student.new_empty(0)
    columns = student.new_empty(0)
    if spec.normalize == "standardize":
        columns = empty((4, spec.groups, width), dtype, device)
        _columns(student, mask, columns[:2], spec.groups)
        _columns(teacher, mask, columns[2:], spec.groups)
    shape, of = ((rows, width), dtype) if spec.elements else ((rows,), torch.float64)
    value = empty(shape, of, device)
    pick("relation", device.type).feature_rows(
        student,
        teacher,
        mask,
        weight,
        columns if columns.dim() == 3 else None,
        None if spec.elements else value,
        value if spec.elements else None,
        *[None] * 5,
        KINDS.index(spec.kind),
        NORMALIZES.index(spec.normalize),
        spec.beta,
        spec.margin,
    )
    return value, columns


def _backward(upstream, student, teacher, mask, weight, columns, spec: FeatureSpec, needs):
    """Gradients of student, teacher and weight; None where not needed."""
    if not _has_kernels(student):
        return _dense_gradients(upstream, student, teacher, mask, weight, spec, needs)
    dtype = compute_dtype(student)
    standardize = spec.normalize == "standardize"
    shape = tuple(student.shape)
    of = dtype if standardize else student.dtype
    found = [
        empty(shape, kind, student.device) if need else None
        for need, kind in zip(needs, (of, of, dtype))
    ]
    backend = pick("relation", student.device.type)
    backend.feature_rows(
        student,
        teacher,
        mask,
        weight,
        columns if standardize else None,
        None,
        None,
        None if spec.elements else upstream.double(),
        upstream.to(dtype).contiguous() if spec.elements else None,
        *found,
        KINDS.index(spec.kind),
        NORMALIZES.index(spec.normalize),
        spec.beta,
        spec.margin,
    )
    if standardize:
        cube = (spec.groups, shape[0] // spec.groups, shape[1])
        on = None if mask is None else mask.view(cube[:2])
        for i, x in enumerate((student, teacher)):
            if found[i] is None:
                continue
            out = found[i] if of == x.dtype else empty(shape, x.dtype, x.device)
            backend.feature_columns(
                x.view(cube), on, columns[2 * i : 2 * i + 2], found[i].view(cube), out.view(cube)
            )
            found[i] = out
    return tuple(found)


def _dense_gradients(upstream, student, teacher, mask, weight, spec: FeatureSpec, needs):
    leaves = [
        None if x is None else x.detach().requires_grad_(need)
        for x, need in zip((student, teacher, weight), needs)
    ]
    with torch.enable_grad():
        value = feature_dense(leaves[0], leaves[1], mask, leaves[2], *spec)
    wanted = [x for x, need in zip(leaves, needs) if need]
    found = iter(torch.autograd.grad(value, wanted, upstream.to(value.dtype)))
    return tuple(next(found) if need else None for need in needs)


class _Feature(torch.autograd.Function):
    vmap = refuse_vmap("feature")
    jvp = refuse_jvp("feature")

    @staticmethod
    def forward(student, teacher, mask, weight, spec):
        return _forward(student, teacher, mask, weight, spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, upstream, _):
        if upstream is None:
            return (None,) * 5
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 1, 3))
        found = _Gradient.apply(upstream, *ctx.saved_tensors, ctx.spec, needs)
        return found[0], found[1], None, found[2], None


class _Gradient(torch.autograd.Function):
    vmap = refuse_vmap("feature")
    jvp = refuse_jvp("feature")

    @staticmethod
    def forward(upstream, student, teacher, mask, weight, columns, spec, needs):
        return _backward(upstream, student, teacher, mask, weight, columns, spec, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(_NO_SECOND)


class _Sum(torch.autograd.Function):
    """factor x the sum of the rows' values (0-d float64); eager only."""

    @staticmethod
    def forward(ctx, student, teacher, mask, factor, spec):
        rows, device = student.shape[0], student.device
        value = empty((rows,), torch.float64, device)
        gradients = [empty(tuple(student.shape), student.dtype, device) if need else None
                     for need in ctx.needs_input_grad[:2]]  # fmt: skip
        pick("relation", device.type).feature_rows(
            student,
            teacher,
            mask,
            None,
            None,
            value,
            None,
            factor.expand(rows),
            None,
            *gradients,
            None,
            KINDS.index(spec.kind),
            NORMALIZES.index(spec.normalize),
            spec.beta,
            spec.margin,
        )
        ctx.prepared, ctx.spec = gradients, spec
        ctx.save_for_backward(student, teacher, mask, factor)
        return value.sum() * factor

    @staticmethod
    def backward(ctx, upstream):
        with torch.no_grad():
            gradients, ctx.prepared = ctx.prepared, None
            student, teacher, mask, factor = ctx.saved_tensors
            if gradients is None:  # backward runs a second time
                needs = (*ctx.needs_input_grad[:2], False)
                rows = (upstream * factor).expand(student.shape[0])
                found = _backward(rows, student, teacher, mask, None, None, ctx.spec, needs)
                gradients = found[:2]
            else:
                scale = pick("relation", student.device.type).scale
                for gradient in gradients:
                    if gradient is not None:
                        scale(gradient, upstream.to(compute_dtype(gradient)))
        if torch.is_grad_enabled():  # create_graph=True
            gradients = [None if g is None else refuse_second_of(g, "feature") for g in gradients]
        return (*gradients, None, None, None)


# The compile door. ------------------------------------------------------------------------------

_library = torch.library.Library("kdkernels", "FRAGMENT")
_SPEC = "str kind, str normalize, SymInt groups, float beta, float margin, bool elements"
_library.define(
    f"feature(Tensor student, Tensor teacher, Tensor? mask, Tensor? weight, {_SPEC}) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "feature_backward(Tensor upstream, Tensor student, Tensor teacher, Tensor? mask, "
    f"Tensor? weight, Tensor columns, {_SPEC}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _op(student, teacher, mask, weight, *spec):
    return _forward(student, teacher, mask, weight, FeatureSpec(*spec))


def _op_gradient(upstream, student, teacher, mask, weight, columns, *rest):
    *spec, needs = rest
    spec = FeatureSpec(*spec)
    found = _backward(upstream, student, teacher, mask, weight, columns, spec, tuple(needs))
    return tuple(student.new_empty(0) if g is None else g for g in found)


def _fake(student, teacher, mask, weight, kind, normalize, groups, beta, margin, elements):
    dtype = compute_dtype(student)
    shape, of = (student.shape, dtype) if elements else (student.shape[:1], torch.float64)
    columns = student.new_empty(0)
    if normalize == "standardize" and _has_kernels(student):
        columns = student.new_empty((4, groups, student.shape[1]), dtype=dtype)
    return student.new_empty(shape, dtype=of), columns


def _fake_gradient(upstream, student, teacher, mask, weight, columns, *rest):
    dtypes = (student.dtype, student.dtype, compute_dtype(student))
    return tuple(
        student.new_empty(student.shape, dtype=dtype) if need else student.new_empty(0)
        for need, dtype in zip(rest[-1], dtypes)
    )


def _op_setup(ctx, inputs, output):
    ctx.spec = inputs[4:]
    ctx.save_for_backward(*inputs[:4], output[1])


def _op_backward(ctx, upstream, _):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    found = torch.ops.kdkernels.feature_backward(upstream, *ctx.saved_tensors, *ctx.spec, needs)
    found = [g if need else None for g, need in zip(found, needs)]
    return (found[0], found[1], None, found[2], *([None] * 6))


for _device in ("CPU", "CUDA"):
    _library.impl("feature", _op, _device)
    _library.impl("feature_backward", _op_gradient, _device)
torch.library.register_fake("kdkernels::feature", _fake, lib=_library)
torch.library.register_fake("kdkernels::feature_backward", _fake_gradient, lib=_library)
torch.library.register_autograd(
    "kdkernels::feature", _op_backward, setup_context=_op_setup, lib=_library
)


def feature(
    student: Tensor, teacher: Tensor, mask: Tensor | None, weight: Tensor | None, spec: FeatureSpec
) -> Tensor:
    """Values of rows (N,) float64, or of elements (N, d) of the compute dtype.

    student, teacher: (N, d) of one dtype, contiguous; mask: (N,) bool; weight: (N, d) compute
    dtype, for rows of element kinds.
    """
    if torch.compiler.is_compiling():
        return torch.ops.kdkernels.feature(student, teacher, mask, weight, *spec)[0]
    if not _has_kernels(student):
        value = feature_dense(student, teacher, mask, weight, *spec)
        return value.to(compute_dtype(student)) if spec.elements else value
    return _Feature.apply(student, teacher, mask, weight, spec)[0]


def takes_sum(student: Tensor, teacher: Tensor, spec: FeatureSpec) -> bool:
    """Whether `feature_sum` serves: an eager call that wants a gradient.

    A float16 gradient for upstream 1 underflows under a mean over many tokens; standardized rows
    need a second walk over their gradients.
    """
    wanted = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
    if not wanted or torch.compiler.is_compiling() or functorch_active():
        return False
    return (
        student.dtype != torch.float16 and spec.normalize != "standardize" and _has_kernels(student)
    )


def feature_sum(
    student: Tensor, teacher: Tensor, mask: Tensor | None, factor: Tensor, spec: FeatureSpec
) -> Tensor:
    """factor x the sum of the rows' values, 0-d float64, where `takes_sum`; factor: 0-d float64."""
    return _Sum.apply(student, teacher, mask, factor, spec)
