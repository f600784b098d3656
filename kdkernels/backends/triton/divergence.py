"""Divergences in Triton: one program a row, blocks of columns.

    pass 1  running maxima and sums of both rows; for forward KL and cross entropy also the value
    pass 2  the sums of divergence_math.terms: value, S and T (for forward KL and cross entropy only
            where the value of pass 1 is too small to be accurate, or an entry is impossible)
    pass 3  the gradients that are wanted

The contract is csrc/divergence/divergence.h. Deterministic: fixed blocks, no atomics.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import spec as S
from ..spec import DivergenceSpec
from ..torch import selection, unit_factors
from .common import INTERPRETED
from .divergence_math import (
    ALPHA,
    BHATTACHARYYA,
    INFINITY,
    NO_KIND,
    SKEW_REVERSE,
    excess_of,
    hardly_overlaps,
    log1p,
    needs_correction,
    outer_value,
    overlap_terms,
    stopped_and_flowing,
    terms,
    zero_times,
)
from .divergence_rows import (
    CENTRE_S,
    CENTRE_T,
    DIVERGENCE,
    FACTOR,
    HUGE,
    LABEL_LSE,
    LOG2E,
    MAX_S,
    MAX_T,
    SLOPE,
    SMALL,
    STATS,
    SUM_S,
    SUM_T,
    VALUE,
    entry,
    fill,
    gradients,
    load,
    log_ratio,
    reference,
    reference_again,
    rescale,
    round_to,
    row_number,
)

# Columns a tile, at 8 entries a thread: one 16-byte load of half logits. Compiled for sm_80 and
# sm_90 that takes up to 237 registers and 48 bytes of stack; 16 a thread take 255 and spill.
# Run times are not measured yet.
_BLOCK = 2048
_ENTRIES = 8


@triton.jit
def _forward_kernel(
    student, teacher, labels, selected, tau_s_rows, tau_t_rows, first_rows, second_rows,
    stats, grad_student, grad_teacher, grad_tau,
    stride_s, stride_t, grad_stride_s, grad_stride_t, width_s, width_t, valid_s, valid_t,
    tau_s_number, tau_t_number, first_number, second_number, f, r, x, h, other, label_weight, clip,
    element, F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr,
    DETACH: tl.constexpr, OUTER: tl.constexpr, SQUARED: tl.constexpr, CLIP: tl.constexpr,
    ELEMENT: tl.constexpr, LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of a row (all but factor and unit, which are read), and the wanted gradients."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    if teacher is not None:
        teacher += row * stride_t
    stats += row * STATS
    if grad_student is not None:
        grad_student += row * grad_stride_s
    if grad_teacher is not None:
        grad_teacher += row * grad_stride_t
    if grad_tau is not None:
        grad_tau += row * 2
    if tl.load(selected + row) == 0:
        for i in tl.static_range(FACTOR):
            tl.store(stats + i, 0.0)
        if grad_student is not None:
            fill(grad_student, width_s, 0.0, BLOCK)
        if grad_teacher is not None:
            fill(grad_teacher, width_t, 0.0, BLOCK)
        if grad_tau is not None:
            tl.store(grad_tau, 0.0)
            tl.store(grad_tau + 1, 0.0)
    else:
        _selected_row(
            row, student, teacher, labels, tau_s_rows, tau_t_rows, first_rows, second_rows, stats,
            grad_student, grad_teacher, grad_tau, width_s, width_t, valid_s, valid_t,
            tau_s_number, tau_t_number, first_number, second_number, f, r, x, h, other,
            label_weight, clip, element, F, R, X, H, KIND, DETACH, OUTER, SQUARED, CLIP, ELEMENT,
            LABEL, BLOCK,
        )  # fmt: skip


@triton.jit
def _selected_row(
    row, student, teacher, labels, tau_s_rows, tau_t_rows, first_rows, second_rows,
    stats, grad_student, grad_teacher, grad_tau, width_s, width_t, valid_s, valid_t,
    tau_s_number, tau_t_number, first_number, second_number, f, r, x, h, other, label_weight, clip,
    element, F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr,
    DETACH: tl.constexpr, OUTER: tl.constexpr, SQUARED: tl.constexpr, CLIP: tl.constexpr,
    ELEMENT: tl.constexpr, LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HAS_TEACHER: tl.constexpr = teacher is not None
    # Forward KL and cross entropy come out of pass 1.
    ONE_PASS: tl.constexpr = HAS_TEACHER and KIND == NO_KIND and not R and not H and ELEMENT == 0
    tau_s = row_number(tau_s_rows, tau_s_number, row)
    tau_t = row_number(tau_t_rows, tau_t_number, row)
    first = row_number(first_rows, first_number, row)
    if KIND == ALPHA:
        second = 1.0 - first
    else:
        second = row_number(second_rows, second_number, row)
    # What only the data can tell: such a row is NaN with gradient 0.
    bad = (tau_s > 0) == 0
    if HAS_TEACHER:
        bad = bad | ((tau_t > 0) == 0)
    if KIND != NO_KIND and KIND <= SKEW_REVERSE:
        bad = bad | (((first >= 0) & (first <= 1)) == 0)
    k_s, k_t = 1.0 / tau_s, 1.0 / tau_t
    k2_s, k2_t = k_s * LOG2E, k_t * LOG2E
    lanes = tl.arange(0, BLOCK)
    end = valid_s
    if HAS_TEACHER:
        end = tl.maximum(valid_s, valid_t)

    # Pass 1.
    top_s = tl.full((), -INFINITY, tl.float32)
    top_t = tl.full((), -INFINITY, tl.float32)
    r_s = tl.full((), 0.0, tl.float32)
    r_t = tl.full((), 0.0, tl.float32)
    anchor_z = tl.full((), 0.0, tl.float32)
    anchor = tl.full((), 0.0, tl.float32)
    total_s = tl.zeros((BLOCK,), tl.float32)
    total_t = tl.zeros((BLOCK,), tl.float32)
    total_1 = tl.zeros((BLOCK,), tl.float32)  # at tau = 1, for the label term
    total_d = tl.zeros((BLOCK,), tl.float32)  # p-weighted differences of the logits less anchor
    total_x = tl.zeros((BLOCK,), tl.float32)  # p-weighted student logits less anchor_z
    lost = tl.full((BLOCK,), -INFINITY, tl.float32)  # teacher logits over impossible student ones
    for start in range(0, end, BLOCK):
        columns = start + lanes
        z = load(student, columns, valid_s)
        new_s = tl.maximum(top_s, tl.max(z, 0))
        started = top_s != -INFINITY
        about = reference(new_s)
        total_s = total_s * rescale(started, r_s, about, k2_s) + tl.exp2((z - about) * k2_s)
        if LABEL:
            total_1 = total_1 * rescale(started, r_s, about, LOG2E) + tl.exp2((z - about) * LOG2E)
        r_s = about
        if HAS_TEACHER:
            a = load(teacher, columns, valid_t)
            new_t = tl.maximum(top_t, tl.max(a, 0))
            about = reference(new_t)
            e_t = tl.exp2((a - about) * k2_t)
            moved = rescale(top_t != -INFINITY, r_t, about, k2_t)
            r_t = about
            total_t = total_t * moved + e_t
            if ONE_PASS:
                known = (start == 0) & (tl.abs(new_s) + tl.abs(new_t) < HUGE)
                anchor_z = tl.where(known, new_s, anchor_z)
                anchor = tl.where(known, new_t - new_s, anchor)
                gone = z == -INFINITY
                lost = tl.maximum(lost, tl.where(gone, a, -INFINITY))
                gone = gone | (a == -INFINITY)
                free_z = tl.where(gone, 0.0, z - anchor_z)
                free_d = tl.where(gone, 0.0, a) - tl.where(gone, 0.0, z) - anchor
                difference = free_d * k_t + tl.where(k_t == k_s, 0.0, free_z * (k_t - k_s))
                total_d = total_d * moved + tl.where(gone, 0.0, zero_times(e_t, difference))
                if X:
                    total_x = total_x * moved + tl.where(gone, 0.0, zero_times(e_t, free_z))
            top_t = new_t
        top_s = new_s
    max_s = tl.where(top_s == -INFINITY, 0.0, top_s * k2_s)
    max_t = tl.where(top_t == -INFINITY, 0.0, top_t * k2_t)
    sum_s, sum_t = tl.sum(total_s, 0), tl.sum(total_t, 0)
    one_s, one_t = tl.where(sum_s == 0, 1.0, sum_s), tl.where(sum_t == 0, 1.0, sum_t)
    log_s, log_t = tl.log(one_s), tl.log(one_t)
    gap = log_ratio(one_t, one_s)

    # Pass 2.
    no_q = bad & (bad == 0)
    no_p = no_q
    value = tl.full((), 0.0, tl.float32)
    centre_s = tl.full((), 0.0, tl.float32)
    centre_t = tl.full((), 0.0, tl.float32)
    unfinished = tl.full((), 1, tl.int32)
    if ONE_PASS:
        no_q = tl.exp2((tl.max(lost, 0) - r_t) * k2_t) / one_t > 0
        shifts = (anchor - (r_t - r_s)) * k_t
        shifts += tl.where(k_t == k_s, 0.0, (anchor_z - r_s) * (k_t - k_s))
        small = tl.sum(total_d, 0) / one_t + shifts - gap  # forward KL
        if F:
            value += f * small
            centre_t += f * small
        if X:
            cross = log_s - (tl.sum(total_x, 0) / one_t + anchor_z - r_s) * k_s
            value += x * cross
            centre_t += x * cross
            if not F:
                small = cross
        centre_t = tl.where(no_q, INFINITY, centre_t)
        unfinished = tl.where((small < SMALL) & (no_q == 0), 1, 0)
    # The normalisers are rounded, so all d are off by one common number: 1e-7, which is much where
    # the rows differ by little. sum (q - p) is that number; where it counts, `gap` is corrected and
    # the row is read once more.
    reads = tl.full((), 0, tl.int32)
    while unfinished != 0:
        sum_value = tl.zeros((BLOCK,), tl.float32)
        sum_cs = tl.zeros((BLOCK,), tl.float32)
        sum_ct = tl.zeros((BLOCK,), tl.float32)
        sum_excess = tl.zeros((BLOCK,), tl.float32)
        lost_p = tl.zeros((BLOCK,), tl.float32)  # p of entries with q = 0
        lost_q = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, end, BLOCK):
            columns = start + lanes
            z = load(student, columns, valid_s)
            if HAS_TEACHER:
                a = load(teacher, columns, valid_t)
            else:
                a = z
            p, q, d, lp, lq = entry(
                z, a, r_s, r_t, 1.0 / one_s, 1.0 / one_t, log_s, log_t, gap, k_s, k_t, HAS_TEACHER
            )
            v, _, _, cs, ct = terms(
                p, q, d, lp, lq, f, r, x, h, other, first, second, element,
                F, R, X, H, KIND, DETACH, ELEMENT,
            )  # fmt: skip
            sum_value += v
            sum_cs += cs
            if HAS_TEACHER:
                sum_ct += ct
                sum_excess += excess_of(p, q, d)
                lost_p += tl.where(z == -INFINITY, p, 0.0)
                lost_q += tl.where(a == -INFINITY, q, 0.0)
        value = tl.sum(sum_value, 0)
        centre_s = tl.sum(sum_cs, 0)
        centre_t = tl.sum(sum_ct, 0)
        no_q = tl.sum(lost_p, 0) > 0
        no_p = tl.sum(lost_q, 0) > 0
        unfinished = tl.full((), 0, tl.int32)
        if HAS_TEACHER:
            excess = tl.sum(sum_excess, 0)
            again = (reads == 0) & needs_correction(excess, value, KIND)
            unfinished = tl.where(again, 1, 0)
            gap = tl.where(again, gap - log1p(excess), gap)
        reads += 1
    overlap = tl.full((), 0.0, tl.float32)
    if OUTER >= BHATTACHARYYA and ELEMENT == 0:
        if hardly_overlaps(value, first, OUTER):
            sum_value = tl.zeros((BLOCK,), tl.float32)
            sum_cs = tl.zeros((BLOCK,), tl.float32)
            sum_ct = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, end, BLOCK):
                columns = start + lanes
                z = load(student, columns, valid_s)
                a = load(teacher, columns, valid_t)
                _, _, _, lp, lq = entry(
                    z, a, r_s, r_t, 1.0 / one_s, 1.0 / one_t, log_s, log_t, gap, k_s, k_t, True
                )
                v, cs, ct = overlap_terms(lp, lq, first, OUTER)
                sum_value += v
                sum_cs += cs
                sum_ct += ct
            overlap = tl.sum(sum_value, 0)
            centre_s = tl.sum(sum_cs, 0)
            centre_t = tl.sum(sum_ct, 0)

    # The row's own arithmetic.
    stopped, flowing = stopped_and_flowing(no_q, no_p, first, second, F, R, X, KIND, ELEMENT)
    divergence, slope = outer_value(value, overlap, first, OUTER)
    divergence = tl.where(stopped | flowing, INFINITY, divergence)
    slope = tl.where(stopped, 0.0, tl.where(flowing, 1.0, slope))
    centre_t = tl.where(flowing & (centre_t != centre_t), INFINITY, centre_t)
    if HAS_TEACHER:
        impossible = sum_t == 0
        broken = (sum_s != sum_s) | (sum_t != sum_t)
        divergence = tl.where(broken, float("nan"), divergence)
        divergence = tl.where(impossible, 0.0, divergence)
        slope = tl.where(impossible, 0.0, slope)
    value = divergence
    if CLIP:
        slope = tl.where(value > clip, 0.0, slope)
        value = tl.where(value > clip, clip, value)
    if SQUARED:
        value *= tau_s * tau_s
        slope *= tau_s * tau_s
    lse = tl.full((), 0.0, tl.float32)
    if LABEL:
        label = tl.load(labels + row)
        bad = bad | (label < 0) | (label >= width_s)
        there = (label >= 0) & (label < valid_s)
        z = tl.load(student + label, mask=there, other=-INFINITY).to(tl.float32)
        dead = z == -INFINITY
        sum_1 = tl.sum(total_1, 0)
        log_1 = tl.log(tl.where(sum_1 == 0, 1.0, sum_1))
        lse = r_s + log_1
        value += label_weight * tl.where(dead, INFINITY, r_s - tl.where(dead, 0.0, z) + log_1)
    else:
        label = tl.full((), -1, tl.int64)
    slope = tl.where(value != value, float("nan"), slope)
    value = tl.where(bad, float("nan"), value)
    slope = tl.where(bad, 0.0, slope)
    divergence = tl.where(bad, float("nan"), divergence)
    tl.store(stats + MAX_S, max_s)
    tl.store(stats + SUM_S, sum_s)
    tl.store(stats + MAX_T, max_t)
    tl.store(stats + SUM_T, gap)  # the sum is sum_s e^gap, which keeps the correction
    tl.store(stats + DIVERGENCE, divergence)
    tl.store(stats + CENTRE_S, centre_s)
    tl.store(stats + CENTRE_T, centre_t)
    tl.store(stats + SLOPE, slope)
    tl.store(stats + LABEL_LSE, lse)
    tl.store(stats + VALUE, value)
    if grad_student is not None or grad_teacher is not None or grad_tau is not None:
        g = tl.load(stats + FACTOR)
        gradients(
            student, teacher, grad_student, grad_teacher, grad_tau, width_s, width_t, valid_s,
            valid_t, label, r_s, sum_s, r_t, gap, divergence, centre_s, centre_t, slope, lse,
            value, g, tau_s, tau_t, first, second, f, r, x, h, other, label_weight, clip,
            element, F, R, X, H, KIND, DETACH, OUTER, SQUARED, CLIP, ELEMENT, LABEL, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward_kernel(
    student, teacher, labels, tau_s_rows, tau_t_rows, first_rows, second_rows,
    stats, factors, grad_student, grad_teacher, grad_tau,
    stride_s, stride_t, grad_stride_s, grad_stride_t, width_s, width_t, valid_s, valid_t,
    tau_s_number, tau_t_number, first_number, second_number, f, r, x, h, other, label_weight, clip,
    element, F: tl.constexpr, R: tl.constexpr, X: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr,
    DETACH: tl.constexpr, OUTER: tl.constexpr, SQUARED: tl.constexpr, CLIP: tl.constexpr,
    ELEMENT: tl.constexpr, LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    if teacher is not None:
        teacher += row * stride_t
    stats += row * STATS
    if grad_student is not None:
        grad_student += row * grad_stride_s
    if grad_teacher is not None:
        grad_teacher += row * grad_stride_t
    if grad_tau is not None:
        grad_tau += row * 2
    first = row_number(first_rows, first_number, row)
    if KIND == ALPHA:
        second = 1.0 - first
    else:
        second = row_number(second_rows, second_number, row)
    if LABEL:
        label = tl.load(labels + row)
    else:
        label = tl.full((), -1, tl.int64)
    tau_s = row_number(tau_s_rows, tau_s_number, row)
    tau_t = row_number(tau_t_rows, tau_t_number, row)
    r_s = reference_again(tl.load(stats + MAX_S), 1.0 / tau_s * LOG2E, student, valid_s, BLOCK)
    if teacher is not None:
        r_t = reference_again(tl.load(stats + MAX_T), 1.0 / tau_t * LOG2E, teacher, valid_t, BLOCK)
    else:
        r_t = r_s
    gradients(
        student, teacher, grad_student, grad_teacher, grad_tau, width_s, width_t, valid_s, valid_t,
        label, r_s, tl.load(stats + SUM_S), r_t, tl.load(stats + SUM_T),
        tl.load(stats + DIVERGENCE), tl.load(stats + CENTRE_S), tl.load(stats + CENTRE_T),
        tl.load(stats + SLOPE), tl.load(stats + LABEL_LSE), tl.load(stats + VALUE),
        tl.load(factors + row), tau_s, tau_t, first, second, f, r, x, h, other, label_weight, clip,
        element, F, R, X, H, KIND, DETACH, OUTER, SQUARED, CLIP, ELEMENT, LABEL, BLOCK,
    )  # fmt: skip


@triton.jit
def _scale_kernel(tensor, factor, stride, width, blocks, BLOCK: tl.constexpr):
    """rows of `width` times one number; nothing is touched where it is 1."""
    number = tl.load(factor).to(tl.float32)
    if number != 1.0:
        program = tl.program_id(0).to(tl.int64)
        columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        pointers = tensor + (program // blocks) * stride + columns
        inside = columns < width
        scaled = tl.load(pointers, mask=inside).to(tl.float32) * number
        tl.store(pointers, round_to(scaled, tensor.dtype.element_ty), mask=inside)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check(name: str, logits: Tensor) -> None:
    if logits.dtype not in _FLOATS:
        raise TypeError(
            f"backend 'triton': {name}: expected float32, float16 or bfloat16, got {logits.dtype}"
        )


def _device(tensor: Tensor):
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _block(width: int) -> int:
    return max(16, min(_BLOCK, triton.next_power_of_2(width)))


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _valid(columns: float, width: int) -> int:
    return int(columns) if 0 < columns < width else width


def _arguments(
    student: Tensor,
    teacher: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
    spec: DivergenceSpec,
) -> tuple[tuple, dict]:
    """What both kernels take after their pointers: numbers, and compile-time options."""
    width_s = student.shape[1]
    width_t = 0 if teacher is None else teacher.shape[1]
    numbers = (
        _row_stride(student), _row_stride(teacher), _row_stride(grad_student),
        _row_stride(grad_teacher), width_s, width_t, _valid(spec.student_columns, width_s),
        _valid(spec.teacher_columns, width_t), float(spec.student_temperature),
        float(spec.teacher_temperature), float(spec.first), float(spec.second),
        float(spec.forward_kl), float(spec.reverse_kl), float(spec.cross_entropy),
        float(spec.entropy), float(spec.other), float(spec.label_weight), float(spec.clip_token),
        float(spec.clip_element),
    )  # fmt: skip
    options = {
        "F": spec.forward_kl != 0, "R": spec.reverse_kl != 0, "X": spec.cross_entropy != 0,
        "H": spec.entropy != 0, "KIND": int(spec.kind), "DETACH": spec.detach_mixture != 0,
        "OUTER": int(spec.outer), "SQUARED": spec.temperature_squared != 0,
        "CLIP": spec.clip_token > 0,
        "ELEMENT": 0 if spec.clip_element <= 0 else 2 if spec.clip_signed else 1,
        "LABEL": spec.label_weight != 0, "BLOCK": _block(max(width_s, width_t)),
    }  # fmt: skip
    if not INTERPRETED:
        options["num_warps"] = max(1, options["BLOCK"] // (32 * _ENTRIES))
    return numbers, options


def divergence_fwd(
    student,
    teacher,
    labels,
    mask,
    weight,
    student_temperature,
    teacher_temperature,
    first,
    second,
    num_items,
    value,
    stats,
    grad_student,
    grad_teacher,
    grad_temperature,
    spec,
) -> None:
    """Forward of csrc/divergence/divergence.h."""
    spec = DivergenceSpec(*spec)
    _check("student", student)
    if teacher is not None:
        _check("teacher", teacher)
    selected = selection(labels, mask, student.shape[0], student.device, spec.ignore_index)
    # The reduction is (N,) arithmetic on the device: no number comes back to the host.
    if weight is not None:
        weight = torch.where(selected, weight.double(), 0.0)
    items = None if num_items is None else num_items.double()
    unit = unit_factors(selected, weight, items, spec)
    factor = unit if weight is None else unit * weight
    stats[:, S.FACTOR] = factor.to(stats.dtype)
    stats[:, S.UNIT] = unit.to(stats.dtype)
    numbers, options = _arguments(student, teacher, grad_student, grad_teacher, spec)
    if student.shape[0] > 0:
        with _device(student):
            _forward_kernel[(student.shape[0],)](
                student,
                teacher,
                labels,
                selected.view(torch.uint8),
                student_temperature,
                teacher_temperature,
                first,
                second,
                stats,
                grad_student,
                grad_teacher,
                grad_temperature,
                *numbers,
                **options,
            )
    rows = stats[:, S.VALUE].double()
    weighted = torch.where(factor == 0, 0.0, rows * factor)
    value.copy_(weighted if spec.reduction == S.NONE else weighted.sum())


def divergence_bwd(
    student,
    teacher,
    labels,
    mask,
    student_temperature,
    teacher_temperature,
    first,
    second,
    stats,
    upstream,
    grad_student,
    grad_teacher,
    grad_temperature,
    spec,
) -> None:
    """Backward of csrc/divergence/divergence.h, from the logits and the statistics."""
    spec = DivergenceSpec(*spec)
    _check("student", student)
    if teacher is not None:
        _check("teacher", teacher)
    factor = stats[:, S.FACTOR]
    factors = torch.where(factor == 0, 0.0, factor * upstream).contiguous()
    numbers, options = _arguments(student, teacher, grad_student, grad_teacher, spec)
    if student.shape[0] > 0:
        with _device(student):
            _backward_kernel[(student.shape[0],)](
                student,
                teacher,
                labels,
                student_temperature,
                teacher_temperature,
                first,
                second,
                stats,
                factors,
                grad_student,
                grad_teacher,
                grad_temperature,
                *numbers,
                **options,
            )


def scale(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-d), in place; tensor (N, V) of any row stride, or contiguous.

    A factor of 1, which is what `loss.backward()` sends, is seen on the device and writes nothing.
    """
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        rows, width, stride = 1, tensor.numel(), 0
    else:
        (rows, width), stride = tensor.shape, tensor.stride(0)
    block = _block(width)
    blocks = triton.cdiv(width, block)
    with _device(tensor):
        _scale_kernel[(rows * blocks,)](
            tensor, factor.contiguous(), stride, width, blocks, BLOCK=block
        )
