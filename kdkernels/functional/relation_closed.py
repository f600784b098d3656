"""Exact forms through d x d Grams: no N x N work at all.

With A = X^T X, B = Y^T Y, C = X^T Y (X student, Y teacher, rows ready to be multiplied):
  sum_ij (x_i x_j - y_i y_j)^2 = |A|^2 + |B|^2 - 2 |C|^2
  |row i of X X^T|^2 = x_i A x_i,   <row i of X X^T, row i of Y Y^T> = x_i C y_i
The values are differences of large terms. On the CPU everything is float64, where that costs little
against the maps themselves; on CUDA the products are float32 and their norms float64.
Gradients come from autograd, which keeps O(N d) and O(d^2) here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.relation import Relations
from ..ops.relation_stream import Selection
from .relation_inputs import Graphs


def is_cheaper(s: Graphs, t: Graphs) -> bool:
    """Whether three Grams cost less than two maps."""
    rows, columns = s.shape
    d, e = s.q.shape[-1], t.q.shape[-1]
    return (rows + columns) * (d * d + e * e + d * e) < 2 * rows * columns * (d + e)


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.device.type == "cpu" else x


def _sides(graphs: Graphs) -> tuple[Tensor, Tensor]:
    q = _wide(graphs.q)
    return q, q if graphs.k is None else _wide(graphs.k)


def _counts(graphs: Graphs, selection: Selection) -> tuple[Tensor, Tensor]:
    """Selected rows and pairs of each graph, (H,) float64."""
    rows, columns = graphs.shape
    like = graphs.q.new_ones((graphs.q.shape[0],), dtype=torch.float64)
    if selection.row_mask is None:
        return like * rows, like * (rows * columns)
    row = selection.row_mask.sum(1).double()
    column = selection.column_mask.sum(1).double()
    return row * (column > 0), row * column


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """<left, right> of (H, d, e) matrices, added in float64."""
    return (left.double() * right.double()).sum((-2, -1))


def mse(s: Graphs, t: Graphs, scale_s, scale_t, selection: Selection, mode: str) -> Relations:
    """Sum over pairs of (scale_s <q_i, k_j> - scale_t <..>)^2 of each graph."""
    (xq, xk), (yq, yk) = _sides(s), _sides(t)
    c, e = scale_s.double(), scale_t.double()

    def gram(left: Tensor, right: Tensor) -> Tensor:
        return left.mT @ right

    # sum_ij <q_i, k_j> <r_i, l_j> = <Q^T R, K^T L>
    own = _inner(gram(xq, xq), gram(xk, xk))
    other = _inner(gram(yq, yq), gram(yk, yk))
    cross = _inner(gram(xq, yq), gram(xk, yk))
    value = c * c * own + e * e * other - 2 * c * e * cross
    return Relations(value.clamp(min=0), *_counts(s, selection))


def gram_row_l2(
    s: Graphs, t: Graphs, scale_s, scale_t, selection: Selection, mode: str
) -> Relations:
    """Per row 2 - 2 <r_s, r_t> / (|r_s| |r_t|): the scales cancel but for zero rows."""
    (xq, xk), (yq, yk) = _sides(s), _sides(t)

    def form(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        return ((left @ matrix) * right).sum(-1)

    # (H, N): squared norms of the rows of both maps and their inner products
    own = form(xq, xk.mT @ xk, xq) * scale_s.double().square()
    other = form(yq, yk.mT @ yk, yq) * scale_t.double().square()
    cross = form(xq, xk.mT @ yk, yq) * (scale_s.double() * scale_t.double())
    floor = 1e-24  # of squared norms

    def unit(squared: Tensor) -> Tensor:
        return squared.clamp(min=floor).rsqrt()

    a, b = unit(own), unit(other)
    value = own * a * a + other * b * b - 2 * cross * a * b
    value = value.clamp(min=0).double()
    return Relations(value if mode == "rows" else value.sum(-1), *_counts(s, selection))


def cka(s: Graphs, t: Graphs, mask: Tensor | None) -> Tensor:
    """1 - |Xc^T Yc|^2 / (|Xc^T Xc| |Yc^T Yc|) of each graph, float64; tokens (H, N) by mask."""

    def centred(x: Tensor) -> Tensor:
        x = _wide(x)
        if mask is None:
            return x - x.mean(1, keepdim=True)
        count = mask.sum(1)[:, None, None].clamp(min=1)
        weight = mask[:, :, None].to(x.dtype)
        return (x - (x * weight).sum(1, keepdim=True) / count) * weight

    x, y = centred(s.q), centred(t.q)
    cross = x.mT @ y
    own, other = x.mT @ x, y.mT @ y
    product = _inner(own, own) * _inner(other, other)
    safe = torch.where(product > 0, product, torch.ones_like(product))
    return torch.where(product > 0, 1 - _inner(cross, cross) / safe.sqrt(), torch.zeros_like(safe))
