"""relation under autograd: one backend walk makes values and gradients together.

The gradients for upstream 1 are kept in the compute dtype (float32, float64) and multiplied by the
upstream in backward: a float16 input then rounds the final gradient once and nothing underflows
under a mean. Eager and torch.func calls take one autograd.Function with `setup_context`; under
torch.compile the registered operator does the same. Memory: inputs, gradients, two chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import relation_spec as R
from ..backends.relation_spec import RelationSpec
from ..backends.torch_relation import angle_dense, relation_dense, selected_pairs
from .common import refuse_jvp, refuse_vmap
from .relation_stream import Selection, kernels_for, stream

MODES = ("graph", "rows", "pairs")
_NO_SECOND = "kdkernels.relation has no second derivative"


class Relations(NamedTuple):
    """What a call gives: per graph the sum of row values and counts; or rows, or pairs."""

    value: Tensor  # float64: (H,) mode graph, (H, N) mode rows; compute dtype (H, N, M) mode pairs
    rows: Tensor  # (H,) float64: rows with a selected column
    pairs: Tensor  # (H,) float64: selected pairs (triples for "angle")


class _Relation(torch.autograd.Function):
    """Eager and torch.func."""

    vmap = refuse_vmap("relation")
    jvp = refuse_jvp("relation")

    @staticmethod
    def forward(q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, mode):
        return _forward(q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q_s, k_s, q_t, k_t, scale_s, scale_t, ctx.kind, ctx.spec, ctx.selection, ctx.mode = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        prepared = output[3:] if ctx.mode == "graph" else ()
        ctx.save_for_backward(q_s, k_s, q_t, k_t, scale_s, scale_t, *prepared)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 10
        if ctx.mode == "graph":
            gradients = _Scale.apply(ctx.needs_input_grad[:6], upstream, *ctx.saved_tensors)
        else:
            gradients = _Again.apply(
                upstream,
                *ctx.saved_tensors,
                ctx.kind,
                ctx.spec,
                ctx.selection,
                ctx.mode,
                ctx.needs_input_grad[:6],
            )
        return (*gradients, None, None, None, None)


class _Scale(torch.autograd.Function):
    """Gradients for upstream 1 times the upstream (H,). The inputs are arguments so that a second
    derivative reaches this node, which refuses it, instead of ending silently."""

    vmap = refuse_vmap("relation")
    jvp = refuse_jvp("relation")

    @staticmethod
    def forward(needs, upstream, *tensors):
        return _scaled(needs, upstream, tensors[6:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(_NO_SECOND)


class _Again(torch.autograd.Function):
    """Gradients for an upstream of every row or pair: the walk is done again with weights."""

    vmap = refuse_vmap("relation")
    jvp = refuse_jvp("relation")

    @staticmethod
    def forward(upstream, q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, mode, needs):
        found = _again(upstream, q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, mode)
        return tuple(g if need else None for g, need in zip(found, needs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(_NO_SECOND)


def _forward(q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, mode) -> tuple:
    """(value, rows, pairs, four gradients, two scale gradients); an empty tensor where none."""
    ahead = spec if mode == "graph" else spec._replace(need_student=0.0, need_teacher=0.0)
    if not _has_kernels(kind, q_s, q_t):
        return _dense_forward(q_s, k_s, q_t, k_t, scale_s, scale_t, kind, ahead, selection, mode)
    found = stream(
        q_s, k_s, q_t, k_t, scale_s, scale_t, kind, ahead, selection, want_pairs=mode == "pairs"
    )
    counts = found.rows[..., R.COUNT]
    per_graph = found.rows.sum(1)
    values = {
        "graph": lambda: per_graph[:, R.VALUE].clone(),
        "rows": lambda: found.rows[..., R.VALUE].clone(),
        "pairs": lambda: found.pairs,
    }[mode]()
    gradients = [q_s.new_empty(0) if g is None else g for g in found[1:5]]
    scales = (per_graph[:, R.SCALE_S].clone(), per_graph[:, R.SCALE_T].clone())
    rows = (counts > 0).sum(1).double()
    return (values, rows, per_graph[:, R.COUNT].clone(), *gradients, *scales)


def _scaled(needs, upstream: Tensor, prepared) -> tuple:
    """(6 gradients) of the inputs for an upstream (H,)."""
    out = []
    for need, gradient in zip(needs[:4], prepared[:4]):
        factor = upstream.to(gradient.dtype)[:, None, None]
        out.append(gradient * factor if need and gradient.dim() == 3 else None)
    for need, gradient in zip(needs[4:], prepared[4:]):
        out.append((gradient * upstream).sum().to(prepared[0].dtype) if need else None)
    return tuple(out)


def _again(upstream, q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, mode) -> tuple:
    if not _has_kernels(kind, q_s, q_t):
        tensors = (q_s, k_s, q_t, k_t, scale_s, scale_t)
        return _dense_gradients(tensors, upstream, kind, spec, selection, mode)[1]
    weight = upstream.to(q_s.dtype)
    option = {"row_weight": weight} if mode == "rows" else {"pair_weight": weight}
    found = stream(q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, **option)
    scales = found.rows[..., R.SCALE_S : R.SCALE_T + 1]
    if mode == "rows":
        scales = scales * upstream.double()[..., None]
    scales = scales.sum((0, 1)).to(q_s.dtype)
    return (*found[1:5], scales[0], scales[1])


# The compile door. ------------------------------------------------------------------------------

_library = torch.library.Library("kdkernels", "FRAGMENT")
_INPUTS = (
    "Tensor q_s, Tensor? k_s, Tensor? q_t, Tensor? k_t, Tensor scale_s, Tensor? scale_t, "
    "Tensor? row_mask, Tensor? column_mask, Tensor? pair_mask, Tensor? pair_index, "
    "Tensor? row_block, Tensor? column_block, str kind, float[] spec, str mode"
)
_library.define(
    f"relation({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"relation_again(Tensor upstream, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _op(q_s, k_s, q_t, k_t, scale_s, scale_t, *rest):
    *selection, kind, spec, mode = rest
    return _forward(
        q_s, k_s, q_t, k_t, scale_s, scale_t, kind, RelationSpec(*spec), Selection(*selection), mode
    )


def _op_again(upstream, q_s, k_s, q_t, k_t, scale_s, scale_t, *rest):
    *selection, kind, spec, mode = rest
    found = _again(
        upstream,
        q_s,
        k_s,
        q_t,
        k_t,
        scale_s,
        scale_t,
        kind,
        RelationSpec(*spec),
        Selection(*selection),
        mode,
    )
    return tuple(q_s.new_empty(0) if g is None else g for g in found)


def _gradient_like(q_s, k_s, q_t, k_t, spec):
    need_s, need_t = spec[1], spec[2]
    pairs = ((q_s, need_s), (k_s, need_s), (q_t, need_t), (k_t, need_t))
    return [
        q_s.new_empty(x.shape) if need and x is not None else q_s.new_empty(0) for x, need in pairs
    ]


def _fake(q_s, k_s, q_t, k_t, scale_s, scale_t, *rest):
    *_, spec, mode = rest
    graphs, rows = q_s.shape[:2]
    columns = rows if k_s is None else k_s.shape[1]
    double = torch.float64
    value = {
        "graph": lambda: q_s.new_empty((graphs,), dtype=double),
        "rows": lambda: q_s.new_empty((graphs, rows), dtype=double),
        "pairs": lambda: q_s.new_empty((graphs, rows, columns)),
    }[mode]()
    numbers = [q_s.new_empty((graphs,), dtype=double) for _ in range(4)]
    ahead = spec if mode == "graph" else [0.0] * len(spec)
    gradients = _gradient_like(q_s, k_s, q_t, k_t, ahead)
    return (value, numbers[0], numbers[1], *gradients, numbers[2], numbers[3])


def _fake_again(upstream, q_s, k_s, q_t, k_t, scale_s, scale_t, *rest):
    *_, spec, _mode = rest
    return (*_gradient_like(q_s, k_s, q_t, k_t, spec), q_s.new_empty(()), q_s.new_empty(()))


def _op_setup(ctx, inputs, output):
    ctx.mode = inputs[-1]
    ctx.rest = inputs[12:]
    if ctx.mode == "graph":
        ctx.save_for_backward(*output[3:])
    else:
        ctx.save_for_backward(*inputs[:12])


def _op_backward(ctx, upstream, *_):
    needs = ctx.needs_input_grad[:6]
    if ctx.mode == "graph":
        gradients = _scaled(needs, upstream, ctx.saved_tensors)
    else:
        found = torch.ops.kdkernels.relation_again(upstream, *ctx.saved_tensors, *ctx.rest)
        gradients = tuple(g if need else None for g, need in zip(found, needs))
    return (*gradients, *([None] * 9))


for _device in ("CPU", "CUDA"):
    _library.impl("relation", _op, _device)
    _library.impl("relation_again", _op_again, _device)
torch.library.register_fake("kdkernels::relation", _fake, lib=_library)
torch.library.register_fake("kdkernels::relation_again", _fake_again, lib=_library)
torch.library.register_autograd(
    "kdkernels::relation", _op_backward, setup_context=_op_setup, lib=_library
)


# The dense reference. ---------------------------------------------------------------------------


def _dense(q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, mode) -> Relations:
    k_s = q_s if k_s is None else k_s
    if kind == "angle":
        value, count = angle_dense(q_s, q_t, selection.row_mask, spec.beta)
        rows = (count > 0).sum(-1).double()
        return Relations(value.sum(-1), rows, count.sum(-1).double())
    k_t = q_t if k_t is None else k_t
    on = selected_pairs(
        (q_s.shape[0], q_s.shape[1], k_s.shape[1]),
        q_s.device,
        *selection,
        causal=bool(spec.causal),
        exclude_diagonal=bool(spec.exclude_diagonal),
        block=int(spec.block),
        diagonal=int(spec.diagonal),
    )
    entries = relation_dense(
        q_s,
        k_s,
        q_t,
        k_t,
        scale_s,
        scale_t,
        kind,
        on,
        beta=spec.beta,
        margin=spec.margin,
        clamp=spec.clamp if spec.clamped else None,
        label_mix=spec.label_mix,
        diagonal=int(spec.diagonal),
    )
    rows = on.any(-1).sum(-1).double()
    pairs = on.sum((-2, -1)).double()
    if mode == "pairs":
        return Relations(entries.to(q_s.dtype), rows, pairs)
    values = entries.sum(-1)
    return Relations(values if mode == "rows" else values.sum(-1), rows, pairs)


def _dense_gradients(tensors, upstream, kind, spec, selection, mode):
    """(values, gradients of the six inputs) of the dense reference; a scale's are one a graph."""
    needs = (spec.need_student,) * 2 + (spec.need_teacher,) * 2
    needs += (spec.need_student, spec.need_teacher)
    leaves = []
    for i, (x, need) in enumerate(zip(tensors, needs)):
        if x is not None and i >= 4:
            x = x.detach().expand(tensors[0].shape[0]).reshape(-1, 1, 1)
        leaves.append(None if x is None else x.detach().clone().requires_grad_(bool(need)))
    with torch.enable_grad():
        found = _dense(*leaves, kind, spec, selection, mode)
    gradients = [None] * 6
    wanted = [i for i, x in enumerate(leaves) if x is not None and x.requires_grad]
    if wanted and found.value.requires_grad:
        upstream = torch.ones_like(found.value) if upstream is None else upstream
        made = torch.autograd.grad(
            found.value,
            [leaves[i] for i in wanted],
            upstream.to(found.value.dtype),
            allow_unused=True,
        )
        for i, gradient in zip(wanted, made):
            gradients[i] = gradient
    if upstream is not None and mode != "graph":
        gradients[4:] = [None if g is None else g.sum() for g in gradients[4:]]
    return Relations(found.value.detach(), found.rows, found.pairs), gradients


def _dense_forward(q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, mode) -> tuple:
    tensors = (q_s, k_s, q_t, k_t, scale_s, scale_t)
    found, gradients = _dense_gradients(tensors, None, kind, spec, selection, mode)
    graphs = q_s.shape[0]
    inputs = [q_s.new_empty(0) if g is None else g for g in gradients[:4]]
    if spec.need_student and gradients[0] is None:
        inputs[0] = torch.zeros_like(q_s)
    scales = [
        q_s.new_zeros((graphs,), dtype=torch.float64) if g is None else g.reshape(-1).double()
        for g in gradients[4:]
    ]
    return (*found, *inputs, *scales)


def _has_kernels(kind: str, q_s: Tensor, q_t: Tensor | None) -> bool:
    return kernels_for(kind, q_s, q_t) is not None


def relation(
    q_s: Tensor,
    k_s: Tensor | None,
    q_t: Tensor | None,
    k_t: Tensor | None,
    scale_s: Tensor,
    scale_t: Tensor | None,
    kind: str,
    spec: RelationSpec,
    selection: Selection,
    mode: str = "graph",
) -> Relations:
    """Row values of two relation maps under autograd; arguments as in relation_stream.stream."""
    tensors = (q_s, k_s, q_t, k_t, scale_s, scale_t)
    needs = [x is not None and x.requires_grad for x in tensors]
    recording = torch.is_grad_enabled()
    spec = spec._replace(
        need_student=float(recording and (needs[0] or needs[1] or needs[4])),
        need_teacher=float(recording and (needs[2] or needs[3] or needs[5])),
    )
    if not torch.compiler.is_compiling() and not _has_kernels(kind, q_s, q_t):
        return _dense(*tensors, kind, spec, selection, mode)
    if torch.compiler.is_compiling():
        found = torch.ops.kdkernels.relation(*tensors, *selection, kind, list(spec), mode)
    else:
        found = _Relation.apply(*tensors, kind, spec, selection, mode)
    return Relations(*found[:3])
