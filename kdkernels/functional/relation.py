"""Divergences between token relations: validate, normalise, choose the route and the reduction."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import relation_spec as R
from ..backends.relation_spec import RelationSpec
from ..ops import relation as ops
from ..ops.relation_stream import kernels_for
from . import relation_closed as closed
from .checks import check_floats, check_number, same_device
from .relation_inputs import (
    Graphs,
    block_ids,
    graphs_of,
    half_code,
    normalised,
    selection_of,
    without_masked,
)

Features = Tensor | tuple[Tensor, Tensor]
_NORMALIZATIONS = ("pairs", "rows", "sequence")
_REDUCTIONS = ("mean", "sum", "none")


def relation(
    student: Features,
    teacher: Features,
    kind: str = "softmax_kl",
    *,
    similarity: str | None = None,
    student_scale: float | Tensor | None = None,
    teacher_scale: float | Tensor | None = None,
    mask: Tensor | tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
    block: Tensor | None = None,
    block_mode: str = "same",
    relation_heads: int | None = None,
    both_directions: bool = False,
    label_mix: float = 0.0,
    beta: float = 1.0,
    margin: float = 0.0,
    clamp: float | None = None,
    detach_norm: bool = False,
    exclude_diagonal: bool = False,
    normalization: str | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Divergence between the pairwise similarities of the student's and the teacher's tokens.

    No N x N tensor is held: maps are made and used up in chunks of rows, or not made at all where
    an exact d x d form exists (mse, gram_row_l2 and cka with whole or token-masked graphs). With a
    student that requires grad the gradient is made in the same pass as the value.

    Args:
        student: X [..., N, d] (X with itself), or a pair (Q [..., N, d], K [..., M, d]).
            float32, float16, bfloat16 or float64; half types are computed in float32.
        teacher: the same form with its own width; gets a gradient only where it requires one.
        kind: with a = scale x similarity, p = softmax of the teacher's row, q of the student's:
            "softmax_kl" sum p log(p/q) (MiniLM, Wang et al., 2020), "softmax_cross_entropy"
            -sum p log q (TinyCLIP, Wu et al., 2023), "softmax_reverse_kl" sum q log(q/p),
            "softmax_mse" sum (q - p)^2: one value a row;
            "mse", "l1", "smooth_l1" (beta), "huber" (beta), "margin_l1"
            max(|a_s - a_t| - margin, 0) (VideoREPA, 2025): one value a pair;
            "gram_row_l2" sum of squared differences of rows over their L2 norms (similarity
            preserving, Tung and Mori, 2019); "gram_row_l1" PKT (Passalis and Tefas, 2018) with
            its two constants 1e-7;
            "distance", "angle" RKD (Park et al., 2019): smooth-L1 of distances over their mean, of
            the cosines at every vertex (O(N^3 d) work); "cka" 1 - biased linear CKA (Kornblith et
            al., 2019), one value a graph.
        similarity: "dot" or "cosine" (norms at least 1e-12). Default "dot"; "gram_row_l1" is
            defined on cosines.
        student_scale, teacher_scale: None = 1/sqrt(d) for dot (d of the head after regrouping), 1
            for cosine; a number or a 0-d tensor, which gets a gradient.
        mask: bool; [..., N] selects tokens as rows and columns, (rows [..., N], columns [..., M])
            both apart, [..., N, M] pairs. Leading dimensions may stop early ([B, N] for tokens
            [B, heads, N, d]) or be 1; where a mask fits both forms it is one of tokens. What a
            token mask leaves out is never read.
        causal: column <= row.
        block: int ids [..., N]; with block_mode "same" only pairs of one block count, with
            "different" only pairs of two.
        relation_heads: regroup the width into that many heads (MiniLMv2).
        both_directions: average the relations (Q, K) and (K, Q); of a pair with N = M.
        label_mix: softmax kinds: (1 - label_mix) D + label_mix x (-log q of the row's own column).
        beta, margin: see the kinds; beta is also that of distance and angle.
        clamp: lower bound of both maps; no gradient below it.
        detach_norm: cosine: the student's norms carry no gradient.
        exclude_diagonal: leave out the pairs (i, i).
        normalization: what "mean" divides by: "pairs", "rows" (selected ones), or "sequence": the
            mean of each entry of the first dimension, then of entries with any. Default: rows for
            softmax kinds, pairs (triples for angle, graphs for cka) for the others.
        reduction: "mean", "sum" or "none": row kinds (softmax_*, gram_*) [..., N], element kinds
            [..., N, M], distance and angle (their sum) and cka [...].
        num_items: divisor of "mean" instead: a number > 0 or a 0-d tensor.

    Returns:
        float32 (float64 for float64 inputs). A row without a selected column is 0 with gradient 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check_options(kind, similarity, normalization, reduction, block_mode)
    if similarity is None:
        similarity = "cosine" if kind == "gram_row_l1" else "dot"
    if kind == "gram_row_l1" and similarity != "cosine":
        raise ValueError("similarity: gram_row_l1 (PKT) is defined on cosines, got 'dot'")
    s = graphs_of(student, "student", relation_heads)
    t = graphs_of(teacher, "teacher", relation_heads)
    _check_sides(s, t, kind, both_directions, block)
    scales = [
        _scale(student_scale, "student_scale", s, similarity, kind),
        _scale(teacher_scale, "teacher_scale", t, similarity, kind),
    ]
    label_mix = check_number(label_mix, "label_mix")
    if not 0.0 <= label_mix <= 1.0:
        raise ValueError(f"label_mix: expected a number in [0, 1], got {label_mix!r}")
    if label_mix and kind not in R.SOFTMAX_KINDS:
        raise ValueError(f"label_mix: for softmax kinds, got kind {kind!r}")
    if clamp is not None:
        clamp = check_number(clamp, "clamp")
        if kind in R.GRAPH_KINDS:
            raise ValueError(f"clamp: kind {kind!r} has no map to bound")
    selection, product = selection_of(mask, s, block_ids(block, s))
    if product:
        s, t = without_masked(s, t, selection)
    s = normalised(s, kind, similarity, detach_norm, selection)
    t = normalised(t, kind, similarity, False, selection)
    spec = RelationSpec(
        causal=float(causal),
        exclude_diagonal=float(exclude_diagonal),
        block=0.0 if block is None else 1.0 if block_mode == "same" else 2.0,
        beta=check_number(beta, "beta", positive=True),
        margin=_not_negative(margin, "margin"),
        clamped=float(clamp is not None),
        clamp=clamp or 0.0,
        label_mix=label_mix,
        half=half_code(student, teacher) if similarity == "dot" else 0.0,
    )
    whole = product and not (causal or exclude_diagonal or block is not None)
    if kind in ("angle", "cka") and not whole:
        raise ValueError(f"mask: kind {kind!r} takes token masks only, no pairs, causal or block")
    reducer = _Reducer(kind, s, normalization, reduction, num_items)
    if kind == "cka":
        return reducer.graphs(closed.cka(s, t, selection.row_mask))
    loss = _one_direction(kind, s, t, scales, spec, selection, whole, reducer)
    if both_directions:
        turned = selection_of(_turned(mask), s, block_ids(block, s))[0]
        other = _one_direction(kind, s.turned(), t.turned(), scales, spec, turned, whole, reducer)
        loss = (loss + other) / 2
    return loss


def _one_direction(kind, s: Graphs, t: Graphs, scales, spec, selection, whole, reducer) -> Tensor:
    exact = kind == "gram_row_l2" or (kind == "mse" and reducer.mode == "graph")
    if (
        exact
        and whole
        and not spec.clamped
        and (torch.compiler.is_compiling() or kernels_for(kind, s.q, t.q) is not None)
        and closed.is_cheaper(s, t)
    ):
        form = closed.mse if kind == "mse" else closed.gram_row_l2
        return reducer.reduce(form(s, t, *scales, selection, reducer.mode))
    tensors = (s.q, s.k, t.q, t.k, *scales)
    return reducer.reduce(ops.relation(*tensors, kind, spec, selection, reducer.mode))


class _Reducer(NamedTuple):
    """From values per graph, row or pair to what the caller asked for."""

    kind: str
    graph: Graphs
    normalization: str | None
    reduction: str
    num_items: int | float | Tensor | None

    @property
    def mode(self) -> str:
        if self.reduction != "none" or self.kind in R.GRAPH_KINDS:
            return "graph"
        return "pairs" if self.kind in R.ELEMENT_KINDS else "rows"

    def reduce(self, found: ops.Relations) -> Tensor:
        leading = self.graph.leading
        if self.reduction == "none":
            return found.value.view(*leading, *found.value.shape[1:]).to(self.graph.dtype)
        if self.reduction == "sum":
            return found.value.sum().to(self.graph.dtype)
        by_rows = self.normalization == "rows" or (
            self.normalization != "pairs" and self.kind in R.SOFTMAX_KINDS
        )
        return self._mean(found.value, found.rows if by_rows else found.pairs)

    def graphs(self, values: Tensor) -> Tensor:
        """Values of whole graphs (cka)."""
        if self.reduction == "none":
            return values.view(self.graph.leading).to(self.graph.dtype)
        if self.reduction == "sum":
            return values.sum().to(self.graph.dtype)
        return self._mean(values, torch.ones_like(values))

    def _mean(self, values: Tensor, counts: Tensor) -> Tensor:
        items = self.num_items
        if self.normalization == "sequence":
            entries = self.graph.leading[0] if self.graph.leading else 1
            values = values.view(entries, -1).sum(1)
            counts = counts.view(entries, -1).sum(1)
            values = values / counts.clamp(min=1)
            counts = (counts > 0).double()
        divisor = counts.sum().clamp(min=1) if items is None else _items(items)
        return (values.sum() / divisor).to(self.graph.dtype)


def _items(num_items: int | float | Tensor) -> float | Tensor:
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items: expected a 0-d tensor, got {tuple(num_items.shape)}")
        return num_items.double()
    return check_number(num_items, "num_items", positive=True)


def _turned(mask):
    """The mask of the relation (K, Q)."""
    if mask is None:
        return None
    if isinstance(mask, tuple):
        return mask[::-1]
    return mask


def _check_options(kind, similarity, normalization, reduction, block_mode) -> None:
    for value, argument, choices in (
        (kind, "kind", R.KINDS),
        (similarity, "similarity", ("dot", "cosine", None)),
        (normalization, "normalization", (*_NORMALIZATIONS, None)),
        (reduction, "reduction", _REDUCTIONS),
        (block_mode, "block_mode", ("same", "different")),
    ):
        if value not in choices:
            expected = ", ".join(str(c) for c in choices if c is not None)
            raise ValueError(f"{argument}: expected one of {expected}, got {value!r}")


def _not_negative(value: object, argument: str) -> float:
    number = check_number(value, argument)
    if number < 0.0:
        raise ValueError(f"{argument}: expected a number >= 0, got {number!r}")
    return number


def _check_sides(s: Graphs, t: Graphs, kind: str, both_directions: bool, block) -> None:
    if (s.k is None) != (t.k is None):
        raise ValueError("teacher: expected a pair (Q, K) exactly where the student is one")
    if s.leading != t.leading:
        raise ValueError(
            f"teacher: expected the student's leading dimensions {tuple(s.leading)}, got "
            f"{tuple(t.leading)}"
        )
    if s.shape != t.shape:
        raise ValueError(
            f"teacher: expected as many tokens as the student, {s.shape}, got {t.shape}"
        )
    same_device(t.q, "teacher", s.q)
    if (s.dtype == torch.float64) != (t.dtype == torch.float64):
        raise TypeError("teacher: float64 goes with float64 only")
    if s.k is None and both_directions:
        raise ValueError("both_directions: for a pair (Q, K); a self relation has one direction")
    if s.k is not None and kind in R.GRAPH_KINDS:
        raise ValueError(f"student: kind {kind!r} takes X [..., N, d], not a pair")
    if s.shape[0] != s.shape[1] and (both_directions or block is not None):
        what = "both_directions" if both_directions else "block"
        raise ValueError(f"{what}: needs as many rows as columns, got {s.shape}")


def _scale(value, argument: str, graphs: Graphs, similarity: str, kind: str) -> Tensor:
    """() of the compute dtype."""
    if value is None:
        width = graphs.q.shape[-1]
        value = 1.0 if similarity == "cosine" else 1.0 / math.sqrt(width)
    elif kind in R.GRAPH_KINDS:
        raise ValueError(f"{argument}: kind {kind!r} does not depend on a scale")
    if isinstance(value, Tensor):
        check_floats(value, argument)
        if value.numel() != 1:
            raise ValueError(f"{argument}: expected one number, got shape {tuple(value.shape)}")
        same_device(value, argument, graphs.q)
        on_cpu = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if similarity == "cosine" and on_cpu and not bool(value.detach() > 0):
            raise ValueError(f"{argument}: expected a number > 0 for cosine, got {value.item()!r}")
        return value.reshape(()).to(graphs.dtype)
    number = check_number(value, argument, positive=similarity == "cosine")
    return torch.full((), number, dtype=graphs.dtype, device=graphs.q.device)
