"""Softmax relations in Triton: maps of products streamed tile by tile, no row of them in memory.

    forward   one program a block of rows: a walk over the columns for maxima and sums, a second for
              the values, which are sums of non-negative terms and keep their digits at any gap
    backward  one program a block of rows for the queries' gradients and the scales', one a block of
              columns for the keys'; both make the tiles again from the statistics of the forward

Products of float32 tokens take three tf32 products (float32's accuracy on tensor cores).
Deterministic: fixed tiles, no atomics. Formulas: csrc/relation/relation.h, of which the row kernels
here serve the softmax kinds and log_sum_exp, for widths up to 256.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import relation_spec as R
from ..relation_spec import RelationSpec

# Statistics of a row, float32.
_STATS = R.STATISTICS
(_TOP_S, _INVERSE_S, _TOP_T, _INVERSE_T, _LSE_S, _SHIFT, _MEAN_S, _MEAN_T, _MIX) = range(_STATS)
TOP_S, INVERSE_S = tl.constexpr(_TOP_S), tl.constexpr(_INVERSE_S)
TOP_T, INVERSE_T = tl.constexpr(_TOP_T), tl.constexpr(_INVERSE_T)
LSE_S, SHIFT = tl.constexpr(_LSE_S), tl.constexpr(_SHIFT)
MEAN_S, MEAN_T, MIX = tl.constexpr(_MEAN_S), tl.constexpr(_MEAN_T), tl.constexpr(_MIX)
STATS = tl.constexpr(_STATS)
ROW = tl.constexpr(R.ROW)
VALUE, COUNT = tl.constexpr(R.VALUE), tl.constexpr(R.COUNT)
SCALE_S, SCALE_T = tl.constexpr(R.SCALE_S), tl.constexpr(R.SCALE_T)
KL = tl.constexpr(R.CODES["softmax_kl"])
CROSS_ENTROPY = tl.constexpr(R.CODES["softmax_cross_entropy"])
REVERSE_KL = tl.constexpr(R.CODES["softmax_reverse_kl"])
MSE = tl.constexpr(R.CODES["softmax_mse"])
INFINITY = tl.constexpr(float("inf"))
# Tokens of a tile, columns of the tokens at a time, columns of a gradient: what sm_90 holds
# in registers without spills. Run times are not measured yet.
_HERE, _THERE, _SLICE, _OUT, _WARPS = 64, 32, 32, 64, 8


@triton.jit
def _tokens(pointer, h, at, count, width, first, WIDE: tl.constexpr):
    """(block, WIDE) columns from `first` of tokens of graph h; 0 past the last ones."""
    columns = first + tl.arange(0, WIDE)
    inside = (at[:, None] < count) & (columns[None, :] < width)
    offset = (h * count + at[:, None]) * width + columns[None, :]
    return tl.load(pointer + offset, mask=inside, other=0.0)


@triton.jit
def _products(
    left, right, h, i, rows, j, columns, width, M: tl.constexpr, N: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """(M, N) inner products of the tokens i of `left` and j of `right`, a slice at a time."""
    out = tl.zeros((M, N), tl.float32)
    for first in range(0, width, SLICE):
        a = _tokens(left, h, i, rows, width, first, SLICE)
        b = _tokens(right, h, j, columns, width, first, SLICE)
        out += tl.dot(a, tl.trans(b), input_precision="tf32x3")
    return out


@triton.jit
def _selected(
    h, i, j, rows, columns, row_mask, column_mask, pair_mask, pair_index, row_block, column_block,
    diagonal, CAUSAL: tl.constexpr, OFF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """(block of rows, block of columns): which pairs count."""
    on = (i[:, None] < rows) & (j[None, :] < columns)
    if row_mask is not None:
        on = on & (tl.load(row_mask + h * rows + i, mask=i < rows, other=0) != 0)[:, None]
    if column_mask is not None:
        on = on & (tl.load(column_mask + h * columns + j, mask=j < columns, other=0) != 0)[None, :]
    if pair_mask is not None:
        p = h
        if pair_index is not None:
            p = tl.load(pair_index + h)
        offset = (p * rows + i[:, None]) * columns + j[None, :]
        on = on & (tl.load(pair_mask + offset, mask=on, other=0) != 0)
    own = i[:, None] + diagonal
    if CAUSAL:
        on = on & (j[None, :] <= own)
    if OFF:
        on = on & (j[None, :] != own)
    if BLOCKS != 0:
        left = tl.load(row_block + h * rows + i, mask=i < rows, other=0)
        right = tl.load(column_block + h * columns + j, mask=j < columns, other=0)
        same = left[:, None] == right[None, :]
        on = on & (same if BLOCKS == 1 else same == 0)
    return on


@triton.jit
def _bounded(product, scale, clamp, CLAMPED: tl.constexpr):
    a = scale * product
    if CLAMPED:
        a = tl.maximum(a, clamp)
    return a


@triton.jit
def _generator(p, q, d):
    """p (e^-d - 1 + d) for q = p e^-d: not negative, accurate where d is small."""
    tail = d * (-1.0 / 5040) + 1.0 / 720
    tail = d * tail - 1.0 / 120
    tail = d * tail + 1.0 / 24
    tail = d * tail - 1.0 / 6
    tail = d * tail + 0.5
    return tl.where(tl.abs(d) < 0.25, p * (d * d * tail), p * d + (q - p))


@triton.jit
def _terms(p, q, a_s, a_t, lse_s, shift, KIND: tl.constexpr):
    """(value, what the student's gradient needs summed, the teacher's) of a tile."""
    if KIND == KL:
        value = _generator(p, q, (a_t - a_s) - shift)
        mean_s, mean_t = value * 0.0, value
    elif KIND == CROSS_ENTROPY:
        value = p * (lse_s - a_s)
        mean_s, mean_t = value * 0.0, value
    elif KIND == REVERSE_KL:
        value = _generator(q, p, (a_s - a_t) + shift)
        mean_s, mean_t = value, value * 0.0
    else:
        x = q - p
        value = x * x
        mean_s, mean_t = x * q, x * p
    return value, mean_s, mean_t


@triton.jit
def _forward_kernel(
    q_s, k_s, q_t, k_t, scale_s, scale_t, row_mask, column_mask, pair_mask, pair_index, row_block,
    column_block, stats, report, rows, columns, width_s, width_t, diagonal, clamp, label_mix,
    KIND: tl.constexpr, TEACHER: tl.constexpr, CAUSAL: tl.constexpr, OFF: tl.constexpr,
    BLOCKS: tl.constexpr, CLAMPED: tl.constexpr, LABELLED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Statistics and values of a block of rows. Programs: (blocks of rows, graphs)."""
    h = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c_s = tl.load(scale_s)
    if TEACHER:
        c_t = tl.load(scale_t)
    top_s = tl.full((BLOCK_M,), -INFINITY, tl.float32)
    top_t = tl.full((BLOCK_M,), -INFINITY, tl.float32)
    sum_s = tl.zeros((BLOCK_M,), tl.float32)
    sum_t = tl.zeros((BLOCK_M,), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        on = _selected(h, i, j, rows, columns, row_mask, column_mask, pair_mask, pair_index,
                       row_block, column_block, diagonal, CAUSAL, OFF, BLOCKS)  # fmt: skip
        count += tl.sum(on.to(tl.float32), 1)
        a_s = _products(q_s, k_s, h, i, rows, j, columns, width_s, BLOCK_M, BLOCK_N, SLICE)
        a_s = _bounded(a_s, c_s, clamp, CLAMPED)
        new = tl.maximum(top_s, tl.max(tl.where(on, a_s, -INFINITY), 1))
        base = tl.where(new == -INFINITY, 0.0, new)
        sum_s = sum_s * tl.exp(top_s - base)
        sum_s += tl.sum(tl.where(on, tl.exp(a_s - base[:, None]), 0.0), 1)
        top_s = new
        if TEACHER:
            a_t = _products(q_t, k_t, h, i, rows, j, columns, width_t, BLOCK_M, BLOCK_N, SLICE)
            a_t = _bounded(a_t, c_t, clamp, CLAMPED)
            new = tl.maximum(top_t, tl.max(tl.where(on, a_t, -INFINITY), 1))
            base = tl.where(new == -INFINITY, 0.0, new)
            sum_t = sum_t * tl.exp(top_t - base)
            sum_t += tl.sum(tl.where(on, tl.exp(a_t - base[:, None]), 0.0), 1)
            top_t = new
    some = count > 0
    top_s = tl.where(some, top_s, 0.0)
    top_t = tl.where(some & TEACHER, top_t, 0.0)
    log_s = tl.log(tl.where(some, sum_s, 1.0))
    log_t = tl.log(tl.where(some & TEACHER, sum_t, 1.0))
    lse_s = top_s + log_s
    shift = (top_t - top_s) + (log_t - log_s)
    inverse_s = tl.where(some, 1.0 / tl.where(some, sum_s, 1.0), 0.0)
    inverse_t = tl.where(some & TEACHER, 1.0 / tl.where(some & TEACHER, sum_t, 1.0), 0.0)
    value = tl.zeros((BLOCK_M,), tl.float32)
    mean_s = tl.zeros((BLOCK_M,), tl.float32)
    mean_t = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M,), tl.float32)
    if TEACHER:
        label = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, columns, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            on = _selected(h, i, j, rows, columns, row_mask, column_mask, pair_mask, pair_index,
                           row_block, column_block, diagonal, CAUSAL, OFF, BLOCKS)  # fmt: skip
            a_s = _products(q_s, k_s, h, i, rows, j, columns, width_s, BLOCK_M, BLOCK_N, SLICE)
            a_s = _bounded(a_s, c_s, clamp, CLAMPED)
            a_t = _products(q_t, k_t, h, i, rows, j, columns, width_t, BLOCK_M, BLOCK_N, SLICE)
            a_t = _bounded(a_t, c_t, clamp, CLAMPED)
            q = tl.where(on, tl.exp(a_s - top_s[:, None]), 0.0) * inverse_s[:, None]
            p = tl.where(on, tl.exp(a_t - top_t[:, None]), 0.0) * inverse_t[:, None]
            term, one, two = _terms(p, q, a_s, a_t, lse_s[:, None], shift[:, None], KIND)
            value += tl.sum(tl.where(on, term, 0.0), 1)
            mean_s += tl.sum(tl.where(on, one, 0.0), 1)
            mean_t += tl.sum(tl.where(on, two, 0.0), 1)
            if LABELLED:
                here = on & (j[None, :] == i[:, None] + diagonal)
                mixed += tl.sum(tl.where(here, label_mix, 0.0), 1)
                label += tl.sum(tl.where(here, a_s, 0.0), 1)
        value = (1.0 - mixed) * value + mixed * (lse_s - label)
    else:
        value = tl.where(some, lse_s, 0.0)
    inside = i < rows
    row = stats + (h * rows + i) * STATS
    tl.store(row + TOP_S, top_s, mask=inside)
    tl.store(row + INVERSE_S, inverse_s, mask=inside)
    tl.store(row + TOP_T, top_t, mask=inside)
    tl.store(row + INVERSE_T, inverse_t, mask=inside)
    tl.store(row + LSE_S, lse_s, mask=inside)
    tl.store(row + SHIFT, shift, mask=inside)
    tl.store(row + MEAN_S, mean_s, mask=inside)
    tl.store(row + MEAN_T, mean_t, mask=inside)
    tl.store(row + MIX, mixed, mask=inside)
    row = report + (h * rows + i) * ROW
    for k in tl.static_range(ROW):
        tl.store(row + k, tl.zeros((BLOCK_M,), tl.float64), mask=inside)
    tl.store(row + VALUE, value.to(tl.float64), mask=inside)
    tl.store(row + COUNT, count.to(tl.float64), mask=inside)


@triton.jit
def _slopes(
    product_s, product_t, on, own, c_s, c_t, clamp, row, inside, KIND: tl.constexpr,
    TEACHER: tl.constexpr, CLAMPED: tl.constexpr, LABELLED: tl.constexpr,
):  # fmt: skip
    """d row value / d a of both sides, a tile; `row`: statistics of its rows."""
    top_s = tl.load(row + TOP_S, mask=inside, other=0.0)[:, None]
    inverse_s = tl.load(row + INVERSE_S, mask=inside, other=0.0)[:, None]
    a_s = _bounded(product_s, c_s, clamp, CLAMPED)
    q = tl.where(on, tl.exp(a_s - top_s), 0.0) * inverse_s
    g_s, g_t = q, q * 0.0
    if TEACHER:
        top_t = tl.load(row + TOP_T, mask=inside, other=0.0)[:, None]
        inverse_t = tl.load(row + INVERSE_T, mask=inside, other=0.0)[:, None]
        lse_s = tl.load(row + LSE_S, mask=inside, other=0.0)[:, None]
        shift = tl.load(row + SHIFT, mask=inside, other=0.0)[:, None]
        mean_s = tl.load(row + MEAN_S, mask=inside, other=0.0)[:, None]
        mean_t = tl.load(row + MEAN_T, mask=inside, other=0.0)[:, None]
        a_t = _bounded(product_t, c_t, clamp, CLAMPED)
        p = tl.where(on, tl.exp(a_t - top_t), 0.0) * inverse_t
        if KIND == KL:
            g_s, g_t = q - p, p * ((a_t - a_s) - shift - mean_t)
        elif KIND == CROSS_ENTROPY:
            g_s, g_t = q - p, p * ((lse_s - a_s) - mean_t)
        elif KIND == REVERSE_KL:
            g_s, g_t = q * ((a_s - a_t) + shift - mean_s), p - q
        else:
            x = q - p
            g_s, g_t = 2.0 * q * (x - mean_s), -2.0 * p * (x - mean_t)
        if LABELLED:
            mixed = tl.load(row + MIX, mask=inside, other=0.0)[:, None]
            g_s = (1.0 - mixed) * g_s + mixed * (q - tl.where(own, 1.0, 0.0))
            g_t = (1.0 - mixed) * g_t
        if CLAMPED:
            g_t = tl.where(a_t > clamp, g_t, 0.0)
    if CLAMPED:
        g_s = tl.where(a_s > clamp, g_s, 0.0)
    return tl.where(on, g_s, 0.0), tl.where(on, g_t, 0.0)


@triton.jit
def _backward_kernel(
    q_s, k_s, q_t, k_t, scale_s, scale_t, row_mask, column_mask, pair_mask, pair_index, row_block,
    column_block, row_weight, stats, report, gradient, rows, columns, width_s, width_t, diagonal,
    clamp,
    OF_ROWS: tl.constexpr, OF_TEACHER: tl.constexpr, KIND: tl.constexpr, TEACHER: tl.constexpr,
    CAUSAL: tl.constexpr, OFF: tl.constexpr, BLOCKS: tl.constexpr, CLAMPED: tl.constexpr,
    LABELLED: tl.constexpr, HERE: tl.constexpr, THERE: tl.constexpr, SLICE: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Gradients of one side: of the queries of a block of rows (and the sums for the scale), or of
    the keys of a block of columns. Programs: (blocks, graphs, slices of OUT columns of tokens)."""
    h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * OUT
    c_s = tl.load(scale_s)
    c_t = c_s
    if TEACHER:
        c_t = tl.load(scale_t)
    at = tl.program_id(0) * HERE + tl.arange(0, HERE)
    of_here = rows if OF_ROWS else columns
    of_there = columns if OF_ROWS else rows
    if OF_TEACHER:
        own_tokens = k_t if OF_ROWS else q_t
        width, scale = width_t, c_t
    else:
        own_tokens = k_s if OF_ROWS else q_s
        width, scale = width_s, c_s
    out = tl.zeros((HERE, OUT), tl.float32)
    total = tl.zeros((HERE,), tl.float32)
    for start in range(0, of_there, THERE):
        to = start + tl.arange(0, THERE)
        if OF_ROWS:
            i, j = at, to
            product_s = _products(q_s, k_s, h, i, rows, j, columns, width_s, HERE, THERE, SLICE)
        else:
            i, j = to, at
            product_s = _products(q_s, k_s, h, i, rows, j, columns, width_s, THERE, HERE, SLICE)
        product_t = product_s
        if TEACHER:
            if OF_ROWS:
                product_t = _products(q_t, k_t, h, i, rows, j, columns, width_t, HERE, THERE, SLICE)
            else:
                product_t = _products(q_t, k_t, h, i, rows, j, columns, width_t, THERE, HERE, SLICE)
        on = _selected(h, i, j, rows, columns, row_mask, column_mask, pair_mask, pair_index,
                       row_block, column_block, diagonal, CAUSAL, OFF, BLOCKS)  # fmt: skip
        own = on & (j[None, :] == i[:, None] + diagonal)
        row = stats + (h * rows + i) * STATS
        g_s, g_t = _slopes(product_s, product_t, on, own, c_s, c_t, clamp, row, i < rows, KIND,
                           TEACHER, CLAMPED, LABELLED)  # fmt: skip
        g, product = g_s, product_s
        if OF_TEACHER:
            g, product = g_t, product_t
        if OF_ROWS:
            # Without the rows' weights, which the caller applies where it adds the rows.
            total += tl.sum(g * product, 1)
        if row_weight is not None:
            g = g * tl.load(row_weight + h * rows + i, mask=i < rows, other=0.0)[:, None]
        there = _tokens(own_tokens, h, to, of_there, width, first, OUT)
        if OF_ROWS:
            out += tl.dot(g, there, input_precision="tf32x3")
        else:
            out += tl.dot(tl.trans(g), there, input_precision="tf32x3")
    inside = at < of_here
    columns_of = first + tl.arange(0, OUT)
    offset = (h * of_here + at[:, None]) * width + columns_of[None, :]
    tl.store(gradient + offset, scale * out, mask=inside[:, None] & (columns_of < width)[None, :])
    if OF_ROWS:
        if first == 0:
            where = report + (h * rows + at) * ROW + (SCALE_T if OF_TEACHER else SCALE_S)
            tl.store(where, total.to(tl.float64), mask=inside)


def _contiguous(selection) -> list[Tensor | None]:
    """Masks as bytes, everything contiguous."""
    out = []
    for x in selection:
        if x is not None:
            x = x.contiguous()
            x = x.view(torch.uint8) if x.dtype == torch.bool else x
        out.append(x)
    return out


def softmax_relation(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    scale_s: Tensor,
    scale_t: Tensor | None,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    pair_mask: Tensor | None,
    pair_index: Tensor | None,
    row_block: Tensor | None,
    column_block: Tensor | None,
    row_weight: Tensor | None,
    report: Tensor,
    stats: Tensor,
    dq_s: Tensor | None,
    dk_s: Tensor | None,
    dq_t: Tensor | None,
    dk_t: Tensor | None,
    spec: RelationSpec,
) -> None:
    """Fills the rows' report (H, N, ROW), the statistics (H, N, STATISTICS) and the gradients that
    are not None, float32.

    q (H, N, d), k (H, M, d): contiguous, not empty, d <= 256; scales () float32; masks as in
    ops.relation_stream.Selection; row_weight (H, N) multiplies the gradients.
    """
    if q_s.dtype == torch.float64:
        raise TypeError(f"student: triton kernels take no {q_s.dtype}")
    graphs, rows, width_s = q_s.shape
    columns, teacher = k_s.shape[1], q_t is not None
    width_t = q_t.shape[2] if teacher else 1
    if max(width_s, width_t) > R.WIDEST:
        raise ValueError(f"student: triton kernels take widths up to {R.WIDEST}, got {width_s}")
    selection = (row_mask, column_mask, pair_mask, pair_index, row_block, column_block)
    tensors = (q_s, k_s, q_t, k_t, scale_s, scale_t, *_contiguous(selection))
    shape = (rows, columns, width_s, width_t, int(spec.diagonal) + int(spec.first_row), spec.clamp)
    flags = dict(
        KIND=int(spec.kind),
        TEACHER=teacher,
        CAUSAL=bool(spec.causal),
        OFF=bool(spec.exclude_diagonal),
        BLOCKS=int(spec.block),
        CLAMPED=bool(spec.clamped),
        LABELLED=bool(spec.label_mix),
        SLICE=_SLICE,
        num_warps=_WARPS,
        num_stages=1,
    )
    grid = (triton.cdiv(rows, _HERE), graphs)
    _forward_kernel[grid](
        *tensors, stats, report, *shape, spec.label_mix, BLOCK_M=_HERE, BLOCK_N=_THERE, **flags
    )
    weight = None if row_weight is None else row_weight.contiguous()
    for gradient, of_rows, of_teacher in (
        (dq_s, True, False),
        (dk_s, False, False),
        (dq_t, True, True),
        (dk_t, False, True),
    ):
        if gradient is None:
            continue
        _, count, width = gradient.shape
        _backward_kernel[triton.cdiv(count, _HERE), graphs, triton.cdiv(width, _OUT)](
            *tensors,
            weight,
            stats,
            report,
            gradient,
            *shape,
            OF_ROWS=of_rows,
            OF_TEACHER=of_teacher,
            HERE=_HERE,
            THERE=_THERE,
            OUT=_OUT,
            **flags,
        )
