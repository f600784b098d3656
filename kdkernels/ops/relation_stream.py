"""Row values and gradients of two relation maps, piece by piece: the maps are never held.

Three ways, by shape and backend:
    tiles    softmax kinds of half tokens on tensor cores, of any tokens in Triton: one kernel
    blocks   float32 on a CPU with AVX2 or AVX-512: one kernel walks over blocks of rows that fit
             the cache, products included
    chunks   everything else: torch makes the products of a chunk of rows, the backend's row kernel
             turns them in place into gradients, torch multiplies these back; two chunks of memory,
             and as deterministic as torch's matrix products
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import relation_spec as R
from ..backends.registry import pick, pick_any, settings
from ..backends.relation_spec import RelationSpec
from .common import empty

# Entries of one chunk of one map. CPU: both maps' chunks fit the caches of the cores that work on
# them; CUDA: large enough to fill the device.
_ENTRIES = {"cpu": 1 << 18, "cuda": 1 << 26}
# Fewer rows make the matrix products slow; with many columns chunks are larger instead.
_ROWS = 64
# The walk in blocks: smaller maps are less work in chunks of several graphs.
_SMALL_MAP = 32 * 32
# The walk in blocks: jobs that few graphs are cut into, each with a gradient of the keys.
_PARTS = 8
# Entries of the unit differences that the angle kind holds at a time.
_ANGLE_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}


class Selection(NamedTuple):
    """Which pairs count: the conjunction of all that is given."""

    row_mask: Tensor | None = None  # (H, N) bool
    column_mask: Tensor | None = None  # (H, M) bool
    pair_mask: Tensor | None = None  # (P, N, M) bool
    pair_index: Tensor | None = None  # (H,) int64: the mask of each graph
    row_block: Tensor | None = None  # (H, N) int64
    column_block: Tensor | None = None  # (H, M) int64


class Streamed(NamedTuple):
    """What a walk over the maps gives; gradients are those of the sum of all row values."""

    rows: Tensor  # (H, N, ROW) float64
    q_s: Tensor | None  # (H, N, d): gradients
    k_s: Tensor | None
    q_t: Tensor | None
    k_t: Tensor | None
    pairs: Tensor | None  # (H, N, M) the entries, where asked for


def chunk_shape(graphs: int, rows: int, columns: int, device: str) -> tuple[int, int]:
    """(graphs, rows) of one chunk; several graphs only where their rows are whole."""
    entries = _ENTRIES[device]
    height = max(1, min(rows, max(_ROWS, entries // max(columns, 1))))
    if height < rows:
        return 1, height
    return max(1, min(graphs, entries // max(rows * columns, 1))), height


def kernels_for(kind: str, q_s: Tensor, q_t: Tensor | None) -> ModuleType | None:
    """The backend whose kernels serve this relation; None: the dense torch reference does.

    Raises:
        RuntimeError, ValueError: the backend that was asked for does not serve it.
    """
    streamed = kind in R.SOFTMAX_KINDS or kind == "log_sum_exp"
    families = ("relation", "softmax_relation") if streamed else ("relation",)
    backend = pick_any(families, q_s.device.type)
    if hasattr(backend, "relation_rows"):
        return backend
    if not hasattr(backend, "softmax_relation"):
        return None
    fits = _widest(q_s, q_t) <= R.WIDEST and q_s.dtype == torch.float32
    return backend if fits or settings().backend is not None else None


def _widest(q_s: Tensor, q_t: Tensor | None) -> int:
    return max(q_s.shape[-1], 0 if q_t is None else q_t.shape[-1])


def _takes_tiles(backend, kind: str, q_s: Tensor, q_t: Tensor | None, spec) -> bool:
    """Whether the tile kernel serves: the only one there is, or half tokens on tensor cores."""
    if not hasattr(backend, "softmax_relation"):
        return False
    if not hasattr(backend, "relation_rows"):
        return True
    streamed = kind in R.SOFTMAX_KINDS or kind == "log_sum_exp"
    if not (streamed and spec.half and q_s.dtype == torch.float32):
        return False
    capable = q_s.device.type != "cuda" or torch.cuda.get_device_capability(q_s.device) >= (8, 0)
    return capable and _widest(q_s, q_t) <= R.WIDEST and 0 < q_s.shape[0] <= 65535


class _Side:
    """One side of the relation: its products and where their gradients go.

    Every row of queries belongs to one chunk, so its gradient is written, not added. The keys' is
    added up transposed, (d, M), which is the faster layout of that product on the CPU (a quarter).
    """

    def __init__(self, q: Tensor, k: Tensor | None, need: bool, symmetric: bool):
        self.q, self.k = q, q if k is None else k
        self.itself, self.symmetric = k is None, symmetric and k is None
        self.dq = self.dk = self.turned = None
        if not need:
            return
        self.dq = empty(tuple(q.shape), q.dtype, q.device)
        if not self.symmetric:
            graphs, columns, width = self.k.shape
            make = torch.zeros if q.shape[1] == 0 else torch.empty
            self.turned = make((graphs, width, columns), dtype=q.dtype, device=q.device)

    def products(self, graphs: slice, rows: slice, out: Tensor) -> None:
        q, k = self.q[graphs, rows], self.k[graphs]
        if q.shape[0] == 1:
            torch.mm(q[0], k[0].t(), out=out[0])
        else:
            torch.bmm(q, k.mT, out=out)

    def accumulate(self, gradient: Tensor, graphs: slice, rows: slice) -> None:
        """Adds the share of d(sum) / d(products) (h, r, M) of one chunk."""
        if self.dq is None:
            return
        q, k, dq = self.q[graphs, rows], self.k[graphs], self.dq[graphs, rows]
        factor = 2.0 if self.symmetric else 1.0
        turned = None if self.turned is None else self.turned[graphs]
        # What stood there before the first rows is not read.
        beta = 0.0 if rows.start == 0 else 1.0
        if q.shape[0] == 1:
            dq[0].addmm_(gradient[0], k[0], beta=0.0, alpha=factor)
            if turned is not None:
                turned[0].addmm_(q[0].t(), gradient[0], beta=beta)
        else:
            dq.baddbmm_(gradient, k, beta=0.0, alpha=factor)
            if turned is not None:
                turned.baddbmm_(q.mT, gradient, beta=beta)

    def finish(self) -> None:
        """After the last chunk: the keys' gradient in the layout of the keys."""
        if self.turned is None:
            return
        if self.itself:
            self.dq += self.turned.mT
            self.dk = self.dq
        else:
            self.dk = self.turned.mT.contiguous()
        self.turned = None


class _DistanceSide(_Side):
    """The same for weights W of differences: d value = sum W_ij <q_i - k_j, d(q_i - k_j)>."""

    def __init__(self, q: Tensor, k: Tensor | None, need: bool):
        super().__init__(q, k, False, False)
        if need:
            self.dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
            self.dk = self.dq if self.itself else torch.zeros_like(self.k)

    def accumulate_differences(
        self, weights: Tensor, row_sums: Tensor, graphs: slice, rows: slice
    ) -> None:
        """Adds the share of one chunk."""
        if self.dq is None:
            return
        q, k = self.q[graphs, rows], self.k[graphs]
        self.dq[graphs, rows] += row_sums.to(q.dtype)[:, :, None] * q - torch.bmm(weights, k)
        self.dk[graphs] += weights.sum(1)[:, :, None] * k - torch.bmm(weights.mT, q)


def _walk(
    student,
    teacher,
    scales,
    kind,
    spec,
    selection,
    out,
    *,
    norms=None,
    means=None,
    row_weight=None,
    pair_weight=None,
    pairs=None,
):
    """One walk over the maps with the row kernel; fills `out` (H, N, ROW)."""
    device = student.q.device.type
    graphs, rows = student.q.shape[:2]
    columns = student.k.shape[1]
    height, width = chunk_shape(graphs, rows, columns, device)[::-1]
    backend = pick("relation", device)
    dtype = student.q.dtype
    buffer_s = empty((width * height * columns,), dtype, student.q.device)
    buffer_t = None if teacher is None else torch.empty_like(buffer_s)
    distance = kind in ("distance_sum", "distance")
    spec = spec._replace(kind=float(R.CODES[kind]))

    def part(tensor: Tensor | None, g: slice, r: slice | None = None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor[g] if r is None else tensor[g, r]

    for g0 in range(0, graphs, width):
        g = slice(g0, min(g0 + width, graphs))
        for r0 in range(0, rows, height):
            r = slice(r0, min(r0 + height, rows))
            shape = (g.stop - g0, r.stop - r0, columns)
            size = shape[0] * shape[1] * columns
            products_s = buffer_s[:size].view(shape)
            student.products(g, r, products_s)
            products_t = None
            if teacher is not None:
                products_t = buffer_t[:size].view(shape)
                teacher.products(g, r, products_t)
            pair_mask, pair_index = selection.pair_mask, selection.pair_index
            if pair_mask is not None:
                pair_mask, pair_index = pair_mask[:, r], part(pair_index, g)
            report = out[g, r]
            backend.relation_rows(
                products_s,
                products_t,
                scales[0],
                scales[1],
                part(selection.row_mask, g, r),
                part(selection.column_mask, g),
                pair_mask,
                pair_index,
                part(selection.row_block, g, r),
                part(selection.column_block, g),
                part(row_weight, g, r),
                part(pair_weight, g, r),
                None if norms is None else norms[:, g],
                part(means, g),
                part(pairs, g, r),
                report,
                spec._replace(first_row=float(r0)),
            )
            if distance:
                student.accumulate_differences(products_s, report[..., R.WEIGHT_S], g, r)
                if teacher.dq is not None:
                    teacher.accumulate_differences(products_t, report[..., R.WEIGHT_T], g, r)
            else:
                student.accumulate(products_s, g, r)
                if teacher is not None:
                    teacher.accumulate(products_t, g, r)
    student.finish()
    if teacher is not None:
        teacher.finish()


def stream(
    q_s: Tensor,
    k_s: Tensor | None,
    q_t: Tensor | None,
    k_t: Tensor | None,
    scale_s: Tensor,
    scale_t: Tensor | None,
    kind: str,
    spec: RelationSpec,
    selection: Selection,
    *,
    row_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    want_pairs: bool = False,
) -> Streamed:
    """Values of every row and the gradients that `spec` asks for.

    q: (H, N, d), k: (H, M, d) or None (= q); float32 or float64. scale: () of the same dtype.
    row_weight (H, N), pair_weight (H, N, M): multiply the gradients, not the values.
    """
    need_s, need_t = bool(spec.need_student), bool(spec.need_teacher)
    graphs, rows = q_s.shape[:2]
    columns = rows if k_s is None else k_s.shape[1]
    backend = kernels_for(kind, q_s, q_t)
    if pair_weight is None and not want_pairs and _takes_tiles(backend, kind, q_s, q_t, spec):
        return _tiles(
            backend, q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, row_weight
        )
    if kind == "angle":
        return _angle(q_s, q_t, spec, selection, row_weight)
    if kind == "distance":
        return _distance(backend, q_s, k_s, q_t, k_t, scale_s, scale_t, spec, selection, row_weight)
    symmetric = (
        kind in R.ELEMENT_KINDS
        and pair_weight is None
        and _is_symmetric(k_s, spec, selection, row_weight)
    )
    if pair_weight is None and not want_pairs and _takes_blocks(backend, q_s, q_t, columns):
        return _blocks(
            backend, q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, row_weight,
            symmetric,
        )  # fmt: skip
    student = _Side(q_s, k_s, need_s, symmetric)
    teacher = None if q_t is None else _Side(q_t, k_t, need_t, symmetric)
    out = empty((graphs, rows, R.ROW), torch.float64, q_s.device)
    pairs = empty((graphs, rows, columns), q_s.dtype, q_s.device) if want_pairs else None
    _walk(
        student,
        teacher,
        (scale_s, scale_t),
        kind,
        spec,
        selection,
        out,
        row_weight=row_weight,
        pair_weight=pair_weight,
        pairs=pairs,
    )
    return Streamed(
        out,
        student.dq,
        None if student.itself else student.dk,
        None if teacher is None else teacher.dq,
        None if teacher is None or teacher.itself else teacher.dk,
        pairs,
    )


def _is_symmetric(k_s: Tensor | None, spec, selection: Selection, row_weight) -> bool:
    """Whether entry (i, j) of a kind of pairs is entry (j, i), selection included."""
    return (
        k_s is None
        and row_weight is None
        and selection.row_mask is selection.column_mask
        and selection.pair_mask is None
        and selection.row_block is selection.column_block
        and not spec.causal
    )


def _tiles(
    backend, q_s, k_s, q_t, k_t, scale_s, scale_t, kind, spec, selection, row_weight
) -> Streamed:
    """The softmax kinds by a kernel that makes and uses up the maps in tiles."""
    need_s, need_t = bool(spec.need_student), bool(spec.need_teacher) and q_t is not None
    graphs, rows = q_s.shape[:2]
    columns = rows if k_s is None else k_s.shape[1]
    own = (q_s, q_s if k_s is None else k_s, q_t, q_t if k_t is None else k_t)
    gradients = [
        empty(tuple(x.shape), torch.float32, x.device) if need else None
        for x, need in zip(own, (need_s, need_s, need_t, need_t))
    ]
    report = empty((graphs, rows, R.ROW), torch.float64, q_s.device)
    if graphs * rows == 0 or columns == 0:
        for x in (report, *gradients):
            if x is not None:
                x.zero_()
    else:
        # The numbers of half tokens are the same in their own dtype; Triton's kernel takes float32.
        half = R.HALVES[int(spec.half)] if hasattr(backend, "relation_rows") else torch.float32
        statistics = empty((graphs, rows, R.STATISTICS), torch.float32, q_s.device)
        if q_s.dtype == torch.float32:
            own = tuple(None if x is None else x.to(half).contiguous() for x in own)
        backend.softmax_relation(
            *own,
            scale_s,
            scale_t,
            *selection,
            row_weight,
            report,
            statistics,
            *gradients,
            spec._replace(kind=float(R.CODES[kind])),
        )
    for queries, other in ((0, k_s), (2, k_t)):
        if other is None and gradients[queries] is not None:
            gradients[queries] += gradients[queries + 1]
            gradients[queries + 1] = None
    return Streamed(report, *gradients, None)


def _takes_blocks(backend, q_s: Tensor, q_t: Tensor | None, columns: int) -> bool:
    """Whether the walk in blocks serves: float32 on vectors with fused multiply-add, and maps and
    tokens that are not mostly zeros once they fill panels and the width's unit."""
    if not hasattr(backend, "relation_walk") or q_s.shape[1] * columns < _SMALL_MAP:
        return False
    if q_s.dtype != torch.float32 or backend.isa() == "baseline":
        return False
    narrowest = min(x.shape[-1] for x in (q_s, q_t) if x is not None)
    return 2 * narrowest >= backend.RELATION_WIDTH_UNIT


def _blocks(
    backend,
    q_s,
    k_s,
    q_t,
    k_t,
    scale_s,
    scale_t,
    kind,
    spec,
    selection,
    row_weight,
    symmetric,
    *,
    norms=None,
    means=None,
) -> Streamed:
    """A kernel that keeps a block of rows cached, products included; distances: symmetric ones."""
    need_s, need_t = bool(spec.need_student), bool(spec.need_teacher) and q_t is not None
    graphs, rows = q_s.shape[:2]
    columns = rows if k_s is None else k_s.shape[1]
    # Of the shape alone: how many parts there are decides in which order the gradients are added.
    parts = _PARTS if symmetric else _PARTS // max(graphs, 1)
    parts = max(1, min(parts, rows // _ROWS))
    out = empty((graphs, rows, R.ROW), torch.float64, q_s.device)

    def side(q: Tensor | None, k: Tensor | None, need: bool) -> tuple[Tensor | None, ...]:
        if q is None:
            return (None,) * 6
        q = _padded(q, backend.RELATION_WIDTH_UNIT)
        k = None if k is None else _padded(k, backend.RELATION_WIDTH_UNIT)
        width, unit = q.shape[-1], backend.RELATION_PANEL_UNIT

        def make(*shape: int) -> Tensor:
            return empty((*shape, width), q.dtype, q.device)

        panels = make(graphs, -(-columns // unit) * unit)
        dq = make(graphs, rows) if need else None
        dk = make(graphs, columns) if need and k is not None else None
        further = make(parts - 1, graphs, columns) if need and parts > 1 and not symmetric else None
        return q, k, panels, dq, dk, further

    student, teacher = side(q_s, k_s, need_s), side(q_t, k_t, need_t)
    backend.relation_walk(
        student,
        teacher,
        scale_s,
        scale_t,
        *selection,
        row_weight,
        norms,
        means,
        out,
        symmetric,
        parts,
        spec._replace(kind=float(R.CODES[kind])),
    )
    gradients = (student[3], student[4], teacher[3], teacher[4])
    widths = (q_s, q_s, q_t, q_t)
    cut = (
        None if g is None else g[..., : x.shape[-1]].contiguous() for g, x in zip(gradients, widths)
    )
    return Streamed(out, *cut, None)


def _padded(tokens: Tensor, unit: int) -> Tensor:
    """Contiguous, with a width that is a multiple of `unit`: zeros change no product."""
    return F.pad(tokens, (0, -tokens.shape[-1] % unit)).contiguous()


def _squared_norms(q_s, k_s, q_t, k_t) -> Tensor:
    """(4, H, max(N, M)): of student rows and columns, teacher rows and columns."""
    parts = [q_s, q_s if k_s is None else k_s, q_t, q_t if k_t is None else k_t]
    longest = max(x.shape[1] for x in parts)
    out = q_s.new_zeros((4, q_s.shape[0], longest))
    for i, x in enumerate(parts):
        out[i, :, : x.shape[1]] = torch.linalg.vecdot(x, x)
    return out


def _distance(backend, q_s, k_s, q_t, k_t, scale_s, scale_t, spec, selection, row_weight):
    """Two walks: means of the distances and their gradient, then the values and theirs.

    The loss depends on the means, so its gradient is A - (H / mean^2 count) B: A from the second
    walk, B = d(sum of distances) from the first, and H a sum that the second knows at its end.
    """
    norms = _squared_norms(q_s, k_s, q_t, k_t)
    symmetric = _is_symmetric(k_s, spec, selection, row_weight)
    blocks = symmetric and _takes_blocks(backend, q_s, q_t, q_s.shape[1])

    def walk(kind: str, means: Tensor | None = None) -> Streamed:
        tokens = (q_s, k_s, q_t, k_t, scale_s, scale_t)
        if blocks:
            return _blocks(
                backend, *tokens, kind, spec, selection, None, True, norms=norms, means=means
            )
        student = _DistanceSide(q_s, k_s, bool(spec.need_student))
        teacher = _DistanceSide(q_t, k_t, bool(spec.need_teacher))
        out = empty((*q_s.shape[:2], R.ROW), torch.float64, q_s.device)
        scales = (scale_s, scale_t)
        _walk(student, teacher, scales, kind, spec, selection, out, norms=norms, means=means)
        gradients = (side.dq for side in (student, teacher))
        keys = (None if side.itself else side.dk for side in (student, teacher))
        dq_s, dq_t, dk_s, dk_t = *gradients, *keys
        return Streamed(out, dq_s, dk_s, dq_t, dk_t, None)

    first = walk("distance_sum")
    total = first.rows.sum(1)  # (H, ROW)
    count = total[:, R.POSITIVE_S : R.POSITIVE_T + 1].clamp(min=1)
    means = (total[:, R.SUM_S : R.SUM_T + 1] / count).contiguous()
    second = walk("distance", means)
    squared = means.square() * count
    along = second.rows[..., R.SCALE_S : R.SCALE_T + 1].sum(1)
    slope = torch.where(squared > 0, along / squared, 0.0)
    for i, (a, b) in enumerate(zip(second[1:5], first[1:5])):
        if a is not None:
            a -= slope[:, i // 2, None, None].to(q_s.dtype) * b
    # A distance has no scale.
    second.rows[..., R.SCALE_S : R.SCALE_T + 1] = 0.0
    return second


def _unit_differences(x: Tensor, vertices: slice) -> tuple[Tensor, Tensor]:
    """(x_i - x_j) / |x_i - x_j| for the vertices j: (J, N, d), and 1 / norm (0 for duplicates)."""
    difference = x[None, :, :] - x[vertices, None, :]
    norm = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    inverse = torch.where(norm > R.NORM_FLOOR, 1 / norm, torch.zeros_like(norm))
    return difference.mul_(inverse), inverse


def _add_unit_gradient(into: Tensor, gradient: Tensor, unit: Tensor, inverse, vertices) -> None:
    along = torch.linalg.vecdot(gradient, unit)[..., None]
    gradient = (gradient - along * unit) * inverse
    into += gradient.sum(0)
    into[vertices] -= gradient.sum(1)


def _angle(q_s, q_t, spec, selection, row_weight) -> Streamed:
    """Angles at vertex j are the cosines of the unit differences from j: for a block of vertices a
    smooth-L1 relation whose graphs are the vertices. O(N^3 d) work, O(N d) memory."""
    need_s, need_t = bool(spec.need_student), bool(spec.need_teacher)
    graphs, rows, width = q_s.shape
    width = max(width, q_t.shape[2])
    step = max(1, min(rows, _ANGLE_ENTRIES[q_s.device.type] // max(rows * width, 1)))
    out = torch.zeros((graphs, rows, R.ROW), dtype=torch.float64, device=q_s.device)
    dq_s = torch.zeros_like(q_s) if need_s else None
    dq_t = torch.zeros_like(q_t) if need_t else None
    one = q_s.new_ones(())
    for h in range(graphs):
        mask = None if selection.row_mask is None else selection.row_mask[h]
        for j0 in range(0, rows, step):
            j = slice(j0, min(j0 + step, rows))
            unit_s, inverse_s = _unit_differences(q_s[h], j)
            unit_t, inverse_t = _unit_differences(q_t[h], j)
            tokens = None
            if mask is not None:
                tokens = (mask[j, None] & mask[None, :]).contiguous()
            part = stream(
                unit_s,
                None,
                unit_t,
                None,
                one,
                one,
                "smooth_l1",
                spec,
                Selection(row_mask=tokens, column_mask=tokens),
            )
            out[h, j] = part.rows.sum(1)
            if need_s:
                _add_unit_gradient(dq_s[h], part.q_s, unit_s, inverse_s, j)
            if need_t:
                _add_unit_gradient(dq_t[h], part.q_t, unit_t, inverse_t, j)
    out[..., R.SCALE_S : R.SCALE_T + 1] = 0.0
    return Streamed(out, dq_s, None, dq_t, None, None)
