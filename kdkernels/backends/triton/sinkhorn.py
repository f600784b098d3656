"""Dense Sinkhorn in Triton, to 4096 columns: one launch for the rows and one for the columns of
each iteration. A program takes a tile of rows of one problem and leaves the tile's column sums; one
program a problem adds them in order, updates the columns and decides whether the problem goes on.

The contract is csrc/transport/transport.h. Deterministic: fixed tiles, no atomics. float32;
float64 is refused by name. Sorted transport has no Triton kernel: torch.sort serves it, 64 rows at
a time, so that the sorted copies stay small.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import torch_transport
from ..transport_spec import ENVELOPE, IMPLICIT, SinkhornSpec
from .common import INTERPRETED
from .sinkhorn_rows import (
    LARGE_SUM,
    LOG2E,
    MAX_EXPONENT,
    NO_LOG,
    SMALL_SUM,
    column_log_sum,
    corrected_ratio,
    density,
    kernel_row,
    log2_of,
    masses,
    potential,
    sizes,
    solved_row,
)

# A row in registers: 4096 columns are 8 entries a thread of 16 warps. Compiled for sm_80 no kernel
# spills. Run times are not measured yet.
MAX_COLUMNS = 4096
_TILES = 128  # at most, of a problem's rows
_TILE_ROWS = 8  # at least
_COLUMN_BLOCK = 512
_SORTED_ROWS = 64
_ROUNDS = 100  # of the implicit gradient, at least

START, STEP, APPLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# Forward. ---------------------------------------------------------------------------------------


@triton.jit
def _forward_rows(
    cost, a, log_v, f, done, stopped, partial, row_linear, row_sums, plan,
    student_lengths, teacher_lengths, rows, columns, cost_batch, cost_row, a_stride, tile_rows,
    scratch, history, k, damping, log_denominator, t,
    SOLVE: tl.constexpr, HAS_V: tl.constexpr, REPORT: tl.constexpr, KEEP: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr, DAMPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sweep over a tile: solve its rows (or keep them), add up their columns, report."""
    tile, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, m, _ = sizes(student_lengths, teacher_lengths, problem, rows, columns)
    runs = (n > 0) & (m > 0)
    if not REPORT:
        runs = runs & (tl.load(stopped + problem) == 0)
    if runs:
        slot = tl.zeros((), tl.int64) + t
        if REPORT:
            slot = tl.load(done + problem) - 1
        if not KEEP:
            slot = slot * 0
        cost += problem * cost_batch
        step = tl.zeros((), tl.int64) + cost_row
        f += slot * history + problem * rows
        lanes = tl.arange(0, BLOCK)
        inside = lanes < m
        v = tl.zeros((BLOCK,), tl.float32)
        if HAS_V:
            v = tl.load(log_v + problem * scratch + lanes, mask=inside, other=NO_LOG)
        sums = tl.zeros((BLOCK,), tl.float32)
        for i in range(tile * tile_rows, tl.minimum((tile + 1) * tile_rows, n)):
            mass = masses(a, a_stride, problem, i, n)
            row = cost + i * step
            x = kernel_row(row, v, k, lanes, m, HAS_V)
            if SOLVE:
                found, e, factor = solved_row(x, mass, log_denominator, damping, DAMPED)
                tl.store(f + i, found)
            elif REPORT:
                e = tl.exp2(x + tl.load(f + i))
                factor = mass
            else:  # u is one, zero where a is zero
                e = tl.exp2(x)
                factor = tl.where(mass > 0, 1.0, 0.0)
            p = e * factor
            sums += p
            if REPORT:
                c = tl.load(row + lanes, mask=inside, other=0.0)
                # An infinite cost carries no mass and costs nothing.
                linear = tl.sum(tl.where(p == 0, 0.0, p * tl.where(p == 0, 0.0, c)), 0)
                tl.store(row_linear + problem * scratch + i, linear)
                if row_sums is not None:
                    tl.store(row_sums + problem * rows + i, tl.sum(p, 0))
                if plan is not None:
                    at = plan + (problem * rows + i) * columns
                    tl.store(at + lanes, p, mask=inside)
        tl.store(partial + problem * scratch + tile * columns + lanes, sums, mask=inside)


@triton.jit
def _forward_columns(
    cost, a, b, log_v, f, g, done, stopped, partial, student_lengths, teacher_lengths,
    rows, columns, cost_batch, cost_row, a_stride, b_stride, tiles, scratch, history_f, history_g,
    k, damping, log_denominator, tolerance, t, slot_f, slot_g,
    HAS_V: tl.constexpr, HAS_F: tl.constexpr, DAMPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns of a problem from the tiles' sums, and whether it stops."""
    problem = tl.program_id(0).to(tl.int64)
    n, m, _ = sizes(student_lengths, teacher_lengths, problem, rows, columns)
    if (n > 0) & (m > 0) & (tl.load(stopped + problem) == 0):
        cost += problem * cost_batch
        step = tl.zeros((), tl.int64) + cost_row
        f += slot_f * history_f + problem * rows
        g += slot_g * history_g + problem * columns
        error = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, m, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            inside = lanes < m
            total = tl.zeros((BLOCK,), tl.float32)
            for tile in range(tiles):
                at = partial + problem * scratch + tile * columns + lanes
                total += tl.load(at, mask=inside, other=0.0)
            log_b = log2_of(masses(b, b_stride, problem, lanes, m))
            before = tl.zeros((BLOCK,), tl.float32)
            if HAS_V:
                before = tl.load(log_v + problem * scratch + lanes, mask=inside, other=0.0)
            fine = (total > SMALL_SUM) & (total < LARGE_SUM)
            log_sum = tl.log2(tl.where(fine, total, 1.0)) - tl.where(fine, before, 0.0)
            if tl.sum(tl.where(inside & (fine == 0), 1, 0), 0) > 0:
                again = column_log_sum(cost, a, a_stride, f, problem, step, k, lanes, n, m, HAS_F)
                log_sum = tl.where(fine, log_sum, again)
            found = potential(log_sum, log_denominator, damping, DAMPED)
            found = tl.where((log_sum == NO_LOG) & (log_b == NO_LOG), 0.0, found)
            tl.store(g + lanes, found, mask=inside)
            tl.store(log_v + problem * scratch + lanes, log_b + found, mask=inside)
            if HAS_V:
                counts = inside & (log_b != NO_LOG)
                after = tl.exp2(tl.where(counts, log_b + found + log_sum, NO_LOG))
                error += tl.abs(after - tl.exp2(tl.where(counts, before + log_sum, NO_LOG)))
        tl.store(done + problem, t + 1)
        if HAS_V:
            if tolerance > 0:
                tl.store(stopped + problem, (tl.sum(error, 0) <= tolerance).to(tl.int32))


# Backward. --------------------------------------------------------------------------------------


@triton.jit
def _backward_rows(
    cost, a, b, f, g, done, w, q, alpha, z_sum, partial, sums_next, linear_bar, rows_bar,
    columns_bar, plan_bar, f_bar, grad_cost, grad_a, student_lengths, teacher_lengths,
    rows, columns, cost_batch, cost_row, a_stride, b_stride, tile_rows, scratch,
    history_f, history_g, k, epsilon, damping, denominator, t,
    STAGE: tl.constexpr, IMPLICIT: tl.constexpr, ENVELOPE: tl.constexpr, FIRST: tl.constexpr,
    KEEP: tl.constexpr, COLUMNS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sweep of the adjoint over a tile: the rows' adjoints, the columns' sums, the cost's
    gradient. Unrolled: the sweep of iteration t. FIRST: the first round of the fixed point."""
    tile, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, m, _ = sizes(student_lengths, teacher_lengths, problem, rows, columns)
    ran = tl.load(done + problem)
    runs = (n > 0) & (m > 0) & (ran > 0)
    UNROLLED: tl.constexpr = STAGE == STEP and not IMPLICIT
    if UNROLLED:
        runs = runs & (t < ran)
    if runs:
        slot = ran - 1
        if UNROLLED:
            slot = slot * 0 + t
        slot_f = slot
        if UNROLLED and COLUMNS_FIRST:
            slot_f = slot - 1
        unit = slot_f < 0  # the rows still have their start: one, zero where a is zero
        # The step that follows; in START, whose columns were solved from these rows or, columns
        # first, from those before.
        slot_next = slot_f
        if UNROLLED or (STAGE == START and COLUMNS_FIRST and not IMPLICIT):
            slot_next = slot_f - 1
        unit_next = slot_next < 0
        if not KEEP:
            slot, slot_f, slot_next = slot * 0, slot_f * 0, slot_next * 0
        last = UNROLLED == 0
        if UNROLLED:
            last = t == ran - 1
        cost += problem * cost_batch
        step = tl.zeros((), tl.int64) + cost_row
        f_next = f + tl.maximum(slot_next, 0) * history_f + problem * rows
        f += tl.maximum(slot_f, 0) * history_f + problem * rows
        lanes = tl.arange(0, BLOCK)
        inside = lanes < m
        at_column = problem * columns + lanes
        of_g = tl.load(g + slot * history_g + at_column, mask=inside, other=0.0)
        mass_b = masses(b, b_stride, problem, lanes, m)
        bar_linear = tl.zeros((), tl.float32)
        if linear_bar is not None:
            bar_linear = tl.load(linear_bar + problem)
        bar_columns = tl.zeros((BLOCK,), tl.float32)
        if columns_bar is not None:
            bar_columns = tl.load(columns_bar + at_column, mask=inside, other=0.0)
        of_w = tl.zeros((BLOCK,), tl.float32)
        of_q = tl.zeros((BLOCK,), tl.float32)
        if STAGE != START:
            of_w = tl.load(w + problem * scratch + lanes, mask=inside, other=0.0)
            of_q = tl.load(q + problem * scratch + lanes, mask=inside, other=0.0)
        sums = tl.zeros((BLOCK,), tl.float32)
        sums_of_next = tl.zeros((BLOCK,), tl.float32)
        for i in range(tile * tile_rows, tl.minimum((tile + 1) * tile_rows, n)):
            at_row = problem * rows + i
            mass = masses(a, a_stride, problem, i, n)
            of_f = tl.where(unit, 0.0, tl.load(f + i))
            e, c = density(cost + i * step, of_g, of_f, k, lanes, m)
            scale = tl.where(unit, tl.where(mass > 0, 1.0, 0.0), mass)
            z = tl.zeros((), tl.float32)
            bar = tl.zeros((BLOCK,), tl.float32)
            if STAGE == START and not ENVELOPE:
                bar += bar_columns
                if linear_bar is not None:
                    bar += bar_linear * tl.where(e == 0, 0.0, c)
                if rows_bar is not None:
                    bar += tl.load(rows_bar + at_row)
                if plan_bar is not None:
                    bar += tl.load(plan_bar + at_row * columns + lanes, mask=inside, other=0.0)
                bar = tl.where(e == 0, 0.0, bar)
            if STAGE == APPLY:
                z = tl.load(z_sum + problem * scratch + i)
            elif not ENVELOPE:
                following = tl.where(unit_next, tl.where(mass > 0, 1.0, 0.0), mass)
                moved = tl.where(unit_next, 0.0, tl.load(f_next + i)) - of_f
                sums_of_next += e * (following * tl.exp2(tl.minimum(moved, MAX_EXPONENT)))
                if STAGE == START:
                    total = tl.sum(e * mass_b, 0)
                else:
                    total = tl.sum(e * of_q, 0)
                if STAGE == START:
                    slope = tl.sum(bar * mass_b * e, 0)
                    tl.store(alpha + problem * scratch + i, slope)
                else:
                    slope = -tl.sum(e * of_w, 0)
                    if not COLUMNS_FIRST and (UNROLLED or FIRST):
                        # The plan's own share, of the last iteration.
                        own = tl.load(alpha + problem * scratch + i)
                        slope += tl.where(last, own, 0.0)
                solves = unit == 0
                if STAGE == START:
                    solves = solves & COLUMNS_FIRST
                adjoint = mass * slope
                if f_bar is not None:
                    if STAGE == START and COLUMNS_FIRST:
                        adjoint += tl.load(f_bar + at_row) * LOG2E
                    if STAGE == STEP and not COLUMNS_FIRST and (UNROLLED or FIRST):
                        adjoint += tl.where(last, tl.load(f_bar + at_row), 0.0) * LOG2E
                ratio = corrected_ratio(of_f, damping, denominator, total)
                z = tl.where(solves, damping * adjoint * ratio, 0.0)
                kept = tl.load(grad_a + at_row)
                tl.store(grad_a + at_row, kept + tl.where(solves, slope, 0.0))
                if IMPLICIT:
                    before = tl.load(z_sum + problem * scratch + i)
                    tl.store(z_sum + problem * scratch + i, before + z)
            if STAGE == START:
                share = bar * e * scale
                sums += share - e * z
                out = e * scale * mass_b * bar_linear
                if not ENVELOPE:
                    # The implicit mode applies all z together, in APPLY.
                    moved = -share
                    if not IMPLICIT:
                        moved += e * z
                    out += moved * mass_b / epsilon
                if grad_cost is not None:
                    tl.store(grad_cost + at_row * columns + lanes, out, mask=inside)
            else:
                sums += e * z
                if grad_cost is not None and (UNROLLED or STAGE == APPLY):
                    at = grad_cost + at_row * columns + lanes
                    out = tl.load(at, mask=inside, other=0.0)
                    out += e * (of_w * scale + of_q * z) / epsilon
                    tl.store(at, out, mask=inside)
        at_tile = problem * scratch + tile * columns + lanes
        tl.store(partial + at_tile, sums, mask=inside)
        tl.store(sums_next + at_tile, sums_of_next, mask=inside)


@triton.jit
def _backward_columns(
    b, g, done, w, q, r, w_sum, partial, sums_next, g_bar, grad_b, student_lengths,
    teacher_lengths, rows, columns, b_stride, tiles, scratch, history_g, damping, denominator, t,
    IMPLICIT: tl.constexpr, FIRST: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Between two sweeps: the columns' adjoint, and what the next sweep needs of it."""
    problem = tl.program_id(1).to(tl.int64)
    n, m, _ = sizes(student_lengths, teacher_lengths, problem, rows, columns)
    ran = tl.load(done + problem)
    runs = (n > 0) & (m > 0) & (ran > 0)
    if not IMPLICIT:
        runs = runs & (t < ran)
    if runs:
        lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = lanes < m
        slot = ran - 1
        first = slot * 0 + (1 if FIRST else 0)
        if not IMPLICIT:
            slot = slot * 0 + t
            first = (slot == ran - 1).to(tl.int64)
        if not KEEP:
            slot = slot * 0
        beta = tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for tile in range(tiles):
            at = problem * scratch + tile * columns + lanes
            beta += tl.load(partial + at, mask=inside, other=0.0)
            total += tl.load(sums_next + at, mask=inside, other=0.0)
        at = problem * scratch + lanes
        ratio = tl.where(first == 0, tl.load(r + at, mask=inside, other=0.0), -1.0)
        beta = -beta * ratio
        total = total * tl.abs(ratio)
        at_column = problem * columns + lanes
        kept = tl.load(grad_b + at_column, mask=inside, other=0.0)
        tl.store(grad_b + at_column, kept + beta, mask=inside)
        mass = masses(b, b_stride, problem, lanes, m)
        of_g = tl.load(g + slot * history_g + at_column, mask=inside, other=0.0)
        adjoint = mass * beta
        if g_bar is not None:
            own = tl.load(g_bar + at_column, mask=inside, other=0.0)
            adjoint += tl.where(first == 0, 0.0, own) * LOG2E
        of_w = damping * adjoint * corrected_ratio(of_g, damping, denominator, total)
        tl.store(w + at, of_w, mask=inside)
        if IMPLICIT:
            before = tl.load(w_sum + at, mask=inside, other=0.0)
            tl.store(w_sum + at, before + of_w, mask=inside)
            of_q = mass
            ratio = tl.full((BLOCK,), 1.0, tl.float32)
        elif KEEP:
            earlier = tl.load(
                g + tl.maximum(slot - 1, 0) * history_g + at_column, mask=inside, other=0.0
            )
            ratio = tl.exp2(tl.minimum(earlier - of_g, MAX_EXPONENT))
            began = slot == 0
            start = tl.exp2(tl.where(mass > 0, -of_g, NO_LOG))
            of_q = tl.where(began, start, mass * ratio)
            ratio = tl.where(began, 1.0, ratio)
        else:
            of_q = tl.exp2(tl.where(mass > 0, -of_g, NO_LOG))
            ratio = tl.full((BLOCK,), 1.0, tl.float32)
        tl.store(q + at, of_q, mask=inside)
        tl.store(r + at, ratio, mask=inside)


# Entry points. ----------------------------------------------------------------------------------


def _tiling(rows: int) -> tuple[int, int]:
    """(rows a tile, tiles)."""
    size = max(_TILE_ROWS, triton.cdiv(rows, _TILES))
    return size, max(1, triton.cdiv(rows, size))


def sinkhorn_workspace(rows: int, columns: int, on_cuda: bool = False) -> int:
    """Scratch elements of a problem: five columns, three rows, the tiles' sums twice."""
    return columns * (5 + 2 * _tiling(rows)[1]) + 3 * rows


class _Problem:
    """A call's tensors and the pieces of its workspace."""

    def __init__(self, cost: Tensor, f: Tensor, workspace: Tensor, spec):
        if cost.dtype != torch.float32:
            raise TypeError(f"cost: backend 'triton' takes float32, got {cost.dtype}")
        self.spec = SinkhornSpec(*spec)
        self.batch, self.rows, self.columns = cost.shape
        if self.columns > MAX_COLUMNS:
            raise ValueError(
                f"cost: backend 'triton' takes up to {MAX_COLUMNS} columns, got {self.columns}"
            )
        self.cost = cost
        self.scratch = workspace.shape[1]
        self.tile_rows, self.tiles = _tiling(self.rows)
        widths = [self.columns] * 5 + [self.rows] * 3 + [self.tiles * self.columns]
        starts = [sum(widths[:k]) for k in range(10)]
        flat = workspace.view(-1)
        pieces = [flat[start:] for start in starts]
        self.log_v, self.w, self.q, self.r, self.w_sum = pieces[:5]
        self.alpha, self.z_sum, self.row_linear, self.partial, self.sums_next = pieces[5:]
        self.block = max(16, triton.next_power_of_2(self.columns))
        self.column_block = min(_COLUMN_BLOCK, self.block)
        self.keep = f.shape[0] > 1
        self.k = 1.4426950408889634 / self.spec.epsilon
        self.device = torch.cuda.device(cost.device) if cost.is_cuda else contextlib.nullcontext()

    @property
    def history(self) -> tuple[int, int]:
        """Elements from one kept iteration to the next, of f and of g."""
        return self.batch * self.rows, self.batch * self.columns

    def options(self, block: int) -> dict:
        if INTERPRETED:
            return {"BLOCK": block}
        return {"BLOCK": block, "num_warps": max(1, min(16, block // 128))}


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def sinkhorn_fwd(
    cost, a, b, student_lengths, teacher_lengths, f, g, done, linear, rows, columns, plan,
    workspace, spec,
) -> None:  # fmt: skip
    """Fill the outputs (csrc/transport/transport.h)."""
    p = _Problem(cost, f, workspace, spec)
    s = p.spec
    for tensor in (f, g, done, rows, columns, plan):  # what lies beyond the lengths is zero
        if tensor is not None:
            tensor.zero_()
    workspace.zero_()
    if p.batch == 0 or p.rows == 0 or p.columns == 0:
        if linear is not None:
            linear.zero_()
        return
    first = s.columns_first != 0
    iterations = int(s.iterations)
    stopped = torch.zeros((p.batch,), dtype=torch.int32, device=cost.device)
    log_denominator = math.log2(s.denominator) if s.denominator else -math.inf
    lengths = (student_lengths, teacher_lengths)
    start_v = torch.ones((p.batch, p.columns), device=cost.device) if b is None else b
    log_v = workspace[:, : p.columns]  # v starts at one, at zero where b is zero
    log_v.copy_(torch.where(start_v == 0, -torch.inf, 0.0))

    def sweep(t: int, *, solve: bool, has_v: bool, report: bool) -> None:
        _forward_rows[(p.tiles, p.batch)](
            cost, a, p.log_v, f, done, stopped, p.partial, p.row_linear,
            rows if report else None, plan if report else None, *lengths, p.rows, p.columns,
            cost.stride(0), cost.stride(1), _stride(a), p.tile_rows, p.scratch, p.history[0],
            p.k, s.damping_a, log_denominator, t,
            SOLVE=solve, HAS_V=has_v, REPORT=report, KEEP=p.keep, COLUMNS_FIRST=first,
            DAMPED=s.damping_a != 1 or s.denominator != 0, **p.options(p.block),
        )  # fmt: skip

    with p.device:
        for t in range(iterations):
            # Order "columns": the sweep of iteration t solves the rows of iteration t - 1.
            start = first and t == 0
            slot = max(t - 1, 0) if first else t
            sweep(slot, solve=not start, has_v=not start, report=False)
            _forward_columns[(p.batch,)](
                cost, a, b, p.log_v, f, g, done, stopped, p.partial, *lengths, p.rows, p.columns,
                cost.stride(0), cost.stride(1), _stride(a), _stride(b), p.tiles, p.scratch,
                *p.history, p.k, s.damping_b, log_denominator, s.tolerance, t,
                slot if p.keep else 0, t if p.keep else 0,
                HAS_V=not start, HAS_F=not start, DAMPED=s.damping_b != 1 or s.denominator != 0,
                **p.options(p.column_block),
            )  # fmt: skip
        sweep(0, solve=first, has_v=True, report=True)
    bad = _bad_lengths(p, *lengths)
    pieces = workspace[:, 5 * p.columns :]
    if linear is not None:
        at = 2 * p.rows
        total = pieces[:, at : at + p.rows].double().sum(1)
        linear.copy_(total if bad is None else torch.where(bad, torch.nan, total))
    if columns is not None:
        sums = pieces[:, 3 * p.rows :][:, : p.tiles * p.columns]
        sums = sums.reshape(p.batch, p.tiles, p.columns).sum(1)
        if teacher_lengths is not None:
            inside = torch.arange(p.columns, device=cost.device) < teacher_lengths[:, None]
            sums = torch.where(inside, sums, 0.0)
        columns.copy_(torch.where((done > 0)[:, None], sums, 0.0))


def _bad_lengths(p: _Problem, student_lengths, teacher_lengths) -> Tensor | None:
    """(B,) bool: lengths that no tensor has."""
    bad = None
    for lengths, size in ((student_lengths, p.rows), (teacher_lengths, p.columns)):
        if lengths is not None:
            own = (lengths < 0) | (lengths > size)
            bad = own if bad is None else bad | own
    return bad


def sinkhorn_bwd(
    cost, a, b, student_lengths, teacher_lengths, f, g, done, linear_bar, rows_bar, columns_bar,
    plan_bar, f_bar, g_bar, grad_cost, grad_a, grad_b, workspace, spec,
) -> None:  # fmt: skip
    """Gradients from the stored potentials (csrc/transport/transport.h)."""
    p = _Problem(cost, f, workspace, spec)
    s = p.spec
    for tensor in (grad_a, grad_b, workspace):
        tensor.zero_()
    ragged = student_lengths is not None or teacher_lengths is not None
    if grad_cost is not None and ragged:
        grad_cost.zero_()
    if p.batch == 0 or p.rows == 0 or p.columns == 0:
        return
    first = s.columns_first != 0
    implicit, envelope = int(s.mode) == IMPLICIT, int(s.mode) == ENVELOPE
    lengths = (student_lengths, teacher_lengths)

    def sweep(stage: tl.constexpr, t: int = 0, *, w: Tensor = p.w, opening: bool = False) -> None:
        _backward_rows[(p.tiles, p.batch)](
            cost, a, b, f, g, done, w, p.q, p.alpha, p.z_sum, p.partial, p.sums_next, linear_bar,
            rows_bar, columns_bar, plan_bar, f_bar, grad_cost, grad_a, *lengths, p.rows, p.columns,
            cost.stride(0), cost.stride(1), _stride(a), _stride(b), p.tile_rows, p.scratch,
            *p.history, p.k, s.epsilon, s.damping_a, s.denominator, t,
            STAGE=stage, IMPLICIT=implicit, ENVELOPE=envelope, FIRST=opening, KEEP=p.keep,
            COLUMNS_FIRST=first, **p.options(p.block),
        )  # fmt: skip

    def columns(t: int, opening: bool = False) -> None:
        _backward_columns[(triton.cdiv(p.columns, p.column_block), p.batch)](
            b, g, done, p.w, p.q, p.r, p.w_sum, p.partial, p.sums_next, g_bar, grad_b, *lengths,
            p.rows, p.columns, _stride(b), p.tiles, p.scratch, p.history[1], s.damping_b,
            s.denominator, t,
            IMPLICIT=implicit, FIRST=opening, KEEP=p.keep, **p.options(p.column_block),
        )  # fmt: skip

    with p.device:
        sweep(START)
        if envelope:
            return
        if implicit:
            for t in range(max(_ROUNDS, int(s.iterations))):
                columns(t, opening=t == 0)
                sweep(STEP, opening=t == 0)
            sweep(APPLY, w=p.w_sum)
            return
        for t in range(int(s.iterations) - 1, -1, -1):
            columns(t)
            sweep(STEP, t)


# The Sinkhorn divergence: composed. ----


def annealed(x, *arguments) -> None:
    """Fill the potentials and slopes (csrc/transport/transport.h) by torch, in x's precision."""
    torch_transport.annealed_in(x.dtype, x, *arguments)


# Sorted transport: torch's sort. ----------------------------------------------------------------

sorted_workspace = torch_transport.sorted_workspace


def sorted_transport(
    student, teacher, mask, student_scale, teacher_scale, student_excluded, teacher_excluded,
    coefficient, value, slopes, grad_student, workspace, student_temperature, teacher_temperature,
) -> None:  # fmt: skip
    """Fill value, slopes and the gradient by the reference, a chunk of rows at a time."""

    def cut(tensor: Tensor | None, rows: slice) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    for start in range(0, student.shape[0], _SORTED_ROWS):
        rows = slice(start, start + _SORTED_ROWS)
        torch_transport.sorted_transport(
            student[rows], teacher[rows], cut(mask, rows), cut(student_scale, rows),
            cut(teacher_scale, rows), student_excluded, teacher_excluded, cut(coefficient, rows),
            value[rows], slopes[rows], cut(grad_student, rows), workspace, student_temperature,
            teacher_temperature,
        )  # fmt: skip
