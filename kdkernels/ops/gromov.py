"""Graphs on logits under autograd: node features of the top-k graph, and assignments.

One autograd.Function serves eager mode and torch.func; torch.compile takes the registered op. The
gradient needs the features' gradient, which is known only when all positions were read, so it is
always made in backward, with the true upstream: one read of the logits, one write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.registry import pick
from .common import compute_dtype, empty, empty_like, refuse_jvp, refuse_vmap

STATS = 5  # kNodeStats of csrc/gromov/gromov.h


class NodeOptions(NamedTuple):
    k: int
    graphs: int
    standardize: bool
    average: bool
    temperature: float


def _forward(logits: Tensor, mask: Tensor | None, options: NodeOptions) -> tuple[Tensor, ...]:
    """(nodes (G, k) float64, values (N, k), indices (N, k), stats (N, STATS), count (G,))."""
    rows, k, graphs = logits.shape[0], options.k, options.graphs
    dtype, device = compute_dtype(logits), logits.device
    nodes = empty((graphs, k), torch.float64, device)
    values = empty((rows, k), dtype, device)
    indices = empty((rows, k), torch.int32, device)
    stats = empty((rows, STATS), dtype, device)
    count = empty((graphs,), torch.float64, device)
    pick("gromov", device.type).graph_nodes_fwd(
        logits, mask, values, indices, stats, nodes, count, *options[2:]
    )
    return nodes, values, indices, stats, count


def _backward(
    logits: Tensor,
    mask: Tensor | None,
    values: Tensor,
    indices: Tensor,
    stats: Tensor,
    count: Tensor,
    upstream: Tensor,
    options: NodeOptions,
) -> Tensor:
    gradient = empty_like(logits)
    pick("gromov", logits.device.type).graph_nodes_bwd(
        logits, mask, values, indices, stats, count, upstream.contiguous(), gradient, *options[2:]
    )
    return gradient


class _GraphNodes(torch.autograd.Function):
    vmap = refuse_vmap("graph_on_logits")
    jvp = refuse_jvp("graph_on_logits")

    @staticmethod
    def forward(logits, mask, options):
        return _forward(logits, mask, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, mask, options = inputs
        _, *saved = output
        ctx.save_for_backward(logits, mask, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.options = options

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return None, None, None
        return _GraphNodesBackward.apply(*ctx.saved_tensors, upstream, ctx.options), None, None


class _GraphNodesBackward(torch.autograd.Function):
    """A function of its own, so that torch.func unwraps its tensors; no second derivative."""

    vmap = refuse_vmap("graph_on_logits")
    jvp = refuse_jvp("graph_on_logits")

    @staticmethod
    def forward(logits, mask, values, indices, stats, count, upstream, options):
        return _backward(logits, mask, values, indices, stats, count, upstream, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("kdkernels.graph_on_logits has no second derivative")


# The compile door. ------------------------------------------------------------------------------

_library = torch.library.Library("kdkernels", "FRAGMENT")
_OPTIONS = "SymInt k, SymInt graphs, bool standardize, bool average, float temperature"
_library.define(
    f"graph_nodes_fwd(Tensor logits, Tensor? mask, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "graph_nodes_bwd(Tensor logits, Tensor? mask, Tensor values, Tensor indices, Tensor stats, "
    f"Tensor count, Tensor upstream, {_OPTIONS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _op_fwd(logits, mask, *options):
    return _forward(logits, mask, NodeOptions(*options))


def _op_bwd(logits, mask, values, indices, stats, count, upstream, *options):
    return _backward(logits, mask, values, indices, stats, count, upstream, NodeOptions(*options))


def _fake_fwd(logits, mask, k, graphs, *_):
    rows, dtype = logits.shape[0], compute_dtype(logits)
    return (
        logits.new_empty((graphs, k), dtype=torch.float64),
        logits.new_empty((rows, k), dtype=dtype),
        logits.new_empty((rows, k), dtype=torch.int32),
        logits.new_empty((rows, STATS), dtype=dtype),
        logits.new_empty((graphs,), dtype=torch.float64),
    )


def _fake_bwd(logits, *_):
    return logits.new_empty(logits.shape)


def _op_setup(ctx, inputs, output):
    logits, mask, *options = inputs
    _, *saved = output
    ctx.save_for_backward(logits, mask, *saved)
    ctx.mark_non_differentiable(*saved)
    ctx.options = options


def _op_backward(ctx, upstream, *_):
    gradient = torch.ops.kdkernels.graph_nodes_bwd.default(
        *ctx.saved_tensors, upstream, *ctx.options
    )
    return gradient, None, None, None, None, None, None


for _key in ("CPU", "CUDA"):
    _library.impl("graph_nodes_fwd", _op_fwd, _key)
    _library.impl("graph_nodes_bwd", _op_bwd, _key)
torch.library.register_fake("kdkernels::graph_nodes_fwd", _fake_fwd, lib=_library)
torch.library.register_fake("kdkernels::graph_nodes_bwd", _fake_bwd, lib=_library)
torch.library.register_autograd(
    "kdkernels::graph_nodes_fwd", _op_backward, setup_context=_op_setup, lib=_library
)


def graph_nodes(logits: Tensor, mask: Tensor | None, options: NodeOptions) -> Tensor:
    """Node features (G, k) float64 of the graphs on logits (N, V), N = G T; mask (N,) bool."""
    if torch.compiler.is_compiling():
        return torch.ops.kdkernels.graph_nodes_fwd.default(logits, mask, *options)[0]
    return _GraphNodes.apply(logits, mask, options)[0]


def assignment(cost: Tensor) -> Tensor:
    """Columns (B, n) int64 of the cheapest assignments of costs (B, n, n); no gradient. The search
    runs on the host: a CUDA tensor is copied there and the result back."""
    with torch.no_grad():
        table = cost.detach().to("cpu", torch.float64).contiguous()
        columns = torch.empty(table.shape[:2], dtype=torch.int64)
        pick("gromov", cost.device.type).assignment(table, columns)
        return columns.to(cost.device)
