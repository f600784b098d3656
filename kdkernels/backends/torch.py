"""The plain torch reference: textbook formulas in float64, gradients by autograd.

It is the oracle of every test, and serves where no kernel does. It is written to be read beside the
table of docs/divergence.md, not to be fast.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import spec as S
from .spec import DivergenceSpec
from .torch_gromov import assignment, graph_nodes_bwd, graph_nodes_fwd  # noqa: F401
from .torch_transport import (  # noqa: F401
    annealed,
    sinkhorn_bwd,
    sinkhorn_fwd,
    sinkhorn_workspace,
    sorted_transport,
    sorted_workspace,
)

FAMILIES = ("divergence", "transport", "relation", "gromov")

# Stands in for log-probability -inf: exp(-2000) is 0 in float64, and 0 * -2000 is 0 where 0 * inf
# would be NaN. Rows whose true value is infinite are named by `_infinite`. Summands that a bound is
# put on must be beyond any bound themselves; no power of a probability is taken there.
_LOWEST = -2000.0
_LOWEST_BOUNDED = -1e30


def why_not() -> str:
    """Why this backend is not available; empty if it is."""
    return ""


def _log_softmax(
    logits: Tensor, tau: Tensor, columns: int, lowest: float = _LOWEST
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / tau) with `lowest` for impossible entries, and the mask of those."""
    dead = logits == -torch.inf
    if 0 < columns < logits.shape[-1]:
        dead = dead | (torch.arange(logits.shape[-1], device=logits.device) >= columns)
    scaled = torch.where(dead, torch.zeros_like(logits), logits) / tau[:, None]
    alive = ~dead
    top = torch.where(alive, scaled, -torch.inf).amax(-1, keepdim=True).detach()
    top = torch.where(alive.any(-1, keepdim=True), top, torch.zeros_like(top))
    total = torch.where(alive, (scaled - top).exp(), torch.zeros_like(scaled)).sum(-1, keepdim=True)
    total = torch.where(alive.any(-1, keepdim=True), total, torch.ones_like(total))
    lse = top + total.log()
    # Impossible entries still carry the gradient of the log-sum-exp: a forward kind that is
    # infinite on them has the gradient (P q - p) / tau on the others, all of p's mass in P.
    return torch.where(dead, lowest - (lse - lse.detach()), scaled - lse), dead


def _mixture(lp: Tensor, lq: Tensor, w: Tensor) -> Tensor:
    """log(w p + (1 - w) q), entry by entry; exactly lp where lp = lq."""
    w = w[:, None]
    above, below = (lq - lp).clamp(max=0), (lp - lq).clamp(max=0)  # logs of the smaller's share
    from_p = lp + torch.where(w == 0, above, torch.log1p((1 - w) * torch.expm1(above)))
    from_q = lq + torch.where(w == 1, below, torch.log1p(w * torch.expm1(below)))
    return torch.where(lq < lp, from_p, from_q)


def _generator(x: Tensor, y: Tensor, log_ratio: Tensor) -> Tensor:
    """y - x + x log(x / y) >= 0, entry by entry, right to its own size also where y is close to x.

    Summed over normalised rows it is KL(x, y): y - x adds up to 0.
    """
    near = log_ratio.abs() < 1
    small = torch.where(near, log_ratio, 0.0)
    return torch.where(near, x * (torch.expm1(-small) + small), y - x + x * log_ratio)


def _summand(lx: Tensor, ly: Tensor, signed: float) -> Tensor:
    """x log(x / y) + y - x of each entry (N, V), or if signed x log(x / y) alone."""
    x, y = lx.exp(), ly.exp()
    generator = _generator(x, y, lx - ly)
    return generator + (x - y) if signed else generator


def _kl(lx: Tensor, ly: Tensor) -> Tensor:
    """sum x log(x / y), (N,)."""
    return _summand(lx, ly, 0.0).sum(-1)


def _alpha_beta(lp: Tensor, lq: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Entries of the AB divergence (N, V): (a/s p^s + b/s q^s - p^a q^b) / (a b), s = a + b, and
    its true limits on the axes. Written with `_generator`, which divides only by the larger
    exponent."""
    a, b = alpha[:, None], beta[:, None]
    d = lp - lq
    s = a + b
    x, y, w = (s * lp).exp(), (s * lq).exp(), (a * lp + b * lq).exp()

    def side(x, y, d, big, little):
        whole = torch.where(s == 0, 0.0, _generator(x, y, s * d) / torch.where(s == 0, 1.0, s))
        part = _generator(x, w, little * d) / torch.where(little == 0, 1.0, little)
        return (whole - torch.where(little == 0, 0.0, part)) / torch.where(big == 0, 1.0, big)

    out = torch.where(a.abs() >= b.abs(), side(x, y, d, a, b), side(y, x, -d, b, a))
    return torch.where((a == 0) & (b == 0), d * d / 2, out)


def _other(lp: Tensor, lq: Tensor, spec: DivergenceSpec, first: Tensor, second: Tensor) -> Tensor:
    """Entries (N, V) of the one kind outside the linear group, before its outer map."""
    p, q = lp.exp(), lq.exp()
    kind, signed = int(spec.kind), spec.clip_signed
    if kind == S.JENSEN_SHANNON:
        inside = ((first > 0) & (first < 1))[:, None]
        w = torch.where(inside[:, 0], first, torch.full_like(first, 0.5))
        m = _mixture(lp, lq, w)
        w = w[:, None]
        mixed = w * _summand(lp, m, signed) + (1 - w) * _summand(lq, m, signed)
        # The ends are forward and reverse KL, the trainers' convention; the limits would be 0.
        backward = (first > 0)[:, None]
        ends = torch.where(backward, _summand(lq, lp, signed), _summand(lp, lq, signed))
        return torch.where(inside, mixed, ends)
    if kind == S.SKEW_FORWARD:
        m = _mixture(lp, lq, first)
        zero = (first == 0)[:, None]
        return torch.where(zero, _summand(lp, lq, signed), _summand(lp, m, signed))
    if kind == S.SKEW_REVERSE:
        source = lq.detach() if spec.detach_mixture else lq
        m = _mixture(lp, source, 1 - first)
        zero = (first == 0)[:, None]
        return torch.where(zero, _summand(lq, lp, signed), _summand(lq, m, signed))
    if kind == S.TOTAL_VARIATION:
        return (p - q).abs() / 2
    if kind == S.SQUARED_HELLINGER:
        root = (lp / 2).exp() - (lq / 2).exp()
        return root * root / 2
    if kind == S.TRIANGULAR:
        both = p + q
        empty = both == 0
        return torch.where(empty, 0.0, (p - q) ** 2 / torch.where(empty, 1.0, both))
    if kind == S.CHI_SQUARED:
        # q (p/q - 1)^2; an entry with q = 0 adds nothing or makes the row infinite (`_infinite`).
        possible = q > 0
        ratio = torch.where(possible, lp - torch.where(possible, lq, 0.0), 0.0)
        entries = q * torch.expm1(ratio) ** 2
        bounded = (spec.clip_element > 0) & (p > 0) & ~possible
        return torch.where(bounded, torch.inf, entries)
    if kind == S.ALPHA:
        second = 1 - first
    return _alpha_beta(lp, lq, first, second)


def _outer(row: Tensor, lp: Tensor, lq: Tensor, spec: DivergenceSpec, first: Tensor) -> Tensor:
    """The outer map of a kind's row value (N,)."""
    if spec.outer == S.SQRT:
        equal = row == 0
        return torch.where(equal, torch.zeros_like(row), torch.where(equal, 1.0, row).sqrt())
    if spec.outer == S.IDENTITY:
        return row
    if spec.outer == S.BHATTACHARYYA:
        alpha = torch.full_like(first, 0.5)
        inside, k = -row, torch.full_like(first, -1.0)
    else:
        alpha = first
        k = torch.where(first == 1, torch.ones_like(first), first - 1)
        inside = first * k * row
    # 1 + inside is the overlap of the rows, which is summed itself where 1 + inside has lost it.
    apart = (inside < -0.5) & (spec.clip_element <= 0)
    overlap = (alpha[:, None] * lp + (1 - alpha[:, None]) * lq).exp().sum(-1)
    disjoint = apart & (overlap <= 0)
    near = torch.log1p(torch.where(apart, 0.0, inside))
    far = torch.where(apart & ~disjoint, overlap, 1.0).log()
    value = torch.where(disjoint, torch.inf, torch.where(apart, far, near) / k)
    return torch.where(first == 1, row, value) if spec.outer == S.RENYI else value


def _infinite(
    spec: DivergenceSpec, first: Tensor, second: Tensor, no_q: Tensor, no_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows whose value is inf: (with the gradient of their finite part, with gradient 0).

    no_q: somewhere q = 0 < p; no_p: somewhere p = 0 < q.
    """
    never = torch.zeros_like(no_q)
    if spec.clip_element > 0:  # every summand is bounded
        return never, never
    flowing = no_q if spec.forward_kl or spec.cross_entropy else never
    stopped = no_p if spec.reverse_kl else never
    kind = int(spec.kind)
    if kind == S.JENSEN_SHANNON:
        flowing = flowing | (no_q & (first == 0))
        stopped = stopped | (no_p & (first == 1))
    elif kind == S.SKEW_FORWARD:
        flowing = flowing | (no_q & (first == 0))
    elif kind == S.SKEW_REVERSE:
        stopped = stopped | (no_p & (first == 0))
    elif kind == S.CHI_SQUARED:
        stopped = stopped | no_q
    elif kind in (S.ALPHA, S.ALPHA_BETA):
        beta = 1 - first if kind == S.ALPHA else second
        # q^beta diverges for beta < 0; beta = 0 keeps p^alpha log(p / q), like forward_kl.
        flowing = flowing | (no_q & (beta == 0))
        stopped = stopped | (no_q & (beta < 0)) | (no_p & (first <= 0))
        # Opposed exponents whose sum is not positive diverge at either zero.
        stopped = stopped | ((no_q | no_p) & (first + beta <= 0) & (beta != 0))
    return flowing, stopped


def row_values(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    selected: Tensor,
    tau_s: Tensor,
    tau_t: Tensor,
    first: Tensor,
    second: Tensor,
    spec: DivergenceSpec,
) -> tuple[Tensor, Tensor]:
    """(D before clip, row value before its weight), each (N,), float64. Differentiable."""
    zero = torch.zeros((), dtype=torch.float64, device=student.device)
    z = torch.where(selected[:, None], student, zero)
    power = int(spec.kind) in (S.ALPHA, S.ALPHA_BETA)
    lowest = _LOWEST_BOUNDED if spec.clip_element > 0 and not power else _LOWEST
    lq, dead_q = _log_softmax(z, tau_s, int(spec.student_columns), lowest)
    if teacher is None:
        lp, dead_p = torch.zeros_like(lq), torch.zeros_like(dead_q)
        impossible = torch.zeros_like(selected)
    else:
        a = torch.where(selected[:, None], teacher, zero)
        lp, dead_p = _log_softmax(a, tau_t, int(spec.teacher_columns), lowest)
        impossible = dead_p.all(-1)
        # Vocabularies of different allocated size: the shorter row is impossible beyond its end.
        width = max(lp.shape[-1], lq.shape[-1])
        lp, dead_p = _widen(lp, dead_p, width, lowest)
        lq, dead_q = _widen(lq, dead_q, width, lowest)
    p, q = lp.exp(), lq.exp()
    flowing = stopped = torch.zeros_like(selected)
    if teacher is not None:
        flowing, stopped = _infinite(
            spec, first, second, (dead_q & (p > 0)).any(-1), (dead_p & (q > 0)).any(-1)
        )
        # A row without gradient: its terms may be 0 * inf.
        lp, lq = (torch.where(stopped[:, None], 0.0, x) for x in (lp, lq))
        p, q = lp.exp(), lq.exp()
    entries = torch.zeros_like(lq)
    if spec.forward_kl:
        entries = entries + spec.forward_kl * _summand(lp, lq, spec.clip_signed)
    if spec.reverse_kl:
        entries = entries + spec.reverse_kl * _summand(lq, lp, spec.clip_signed)
    if spec.cross_entropy:
        entries = entries - spec.cross_entropy * (p * lq)
    if spec.entropy:
        entries = entries - spec.entropy * (q * lq)
    if spec.kind:
        entries = entries + spec.other * _other(lp, lq, spec, first, second)
    if spec.clip_element > 0:
        entries = torch.where(entries > spec.clip_element, spec.clip_element, entries)
    value = entries.sum(-1)
    if spec.outer != S.IDENTITY:  # such a kind stands alone
        value = _outer(value, lp, lq, spec, first)
    value = torch.where(stopped, torch.inf, value + torch.where(flowing, torch.inf, 0.0))
    divergence = torch.where(impossible, zero, value)
    value = divergence
    if spec.clip_token > 0:
        value = torch.where(value > spec.clip_token, spec.clip_token, value)
    if spec.temperature_squared:
        value = value * tau_s**2
    if spec.label_weight:
        log_soft, dead = _log_softmax(z, torch.ones_like(tau_s), int(spec.student_columns))
        index = _label_index(labels, selected, dead)
        nll = -log_soft.gather(-1, index)[:, 0]
        nll = nll + torch.where(dead.gather(-1, index)[:, 0], torch.inf, 0.0)
        value = value + spec.label_weight * nll
    return torch.where(selected, divergence, zero), torch.where(selected, value, zero)


def _label_index(labels: Tensor, selected: Tensor, dead: Tensor) -> Tensor:
    """Column of each selected row's label (N, 1); a label out of range is an error."""
    bad = selected & ((labels < 0) | (labels >= dead.shape[-1]))
    if labels.device.type == "cpu" and bool(bad.any()):
        worst = int(labels[bad][0])
        raise ValueError(f"labels: expected 0 to {dead.shape[-1] - 1} or ignore_index, got {worst}")
    return torch.where(selected & ~bad, labels, torch.zeros_like(labels))[:, None]


def _widen(
    log_probability: Tensor, dead: Tensor, width: int, lowest: float = _LOWEST
) -> tuple[Tensor, Tensor]:
    missing = width - log_probability.shape[-1]
    if missing == 0:
        return log_probability, dead
    pad = torch.nn.functional.pad
    return pad(log_probability, (0, missing), value=lowest), pad(dead, (0, missing), value=True)


def selection(
    labels: Tensor | None, mask: Tensor | None, rows: int, device: torch.device, ignore_index: float
) -> Tensor:
    """Selected rows (N,) bool."""
    chosen = torch.ones(rows, dtype=torch.bool, device=device)
    if labels is not None:
        chosen = chosen & (labels != int(ignore_index))
    return chosen if mask is None else chosen & mask


def unit_factors(
    selected: Tensor, weight: Tensor | None, num_items: Tensor | None, spec: DivergenceSpec
) -> Tensor:
    """selected / divisor, (N,) float64: what multiplies weight x row value."""
    unit = selected.double()
    counted = unit
    if spec.normalize_weights and weight is not None:
        counted = torch.where(selected, weight, 0.0)
    if spec.reduction in (S.NONE, S.SUM):
        return unit
    if num_items is not None:
        return unit / num_items
    if spec.num_items > 0:
        return unit / spec.num_items
    if spec.reduction == S.BATCHMEAN:
        return unit / spec.batch
    if spec.reduction == S.SEQUENCE_MEAN:
        if counted.numel() == 0:
            return unit
        counted = counted.reshape(int(spec.batch), -1)
        per_entry = counted.sum(-1, keepdim=True)
        entries = (per_entry > 0).sum().clamp(min=1)
        scale = torch.where(per_entry > 0, 1 / (per_entry * entries), 0.0)
        return unit * scale.expand(counted.shape).reshape(-1)
    total = counted.sum()
    return unit * torch.where(total > 0, 1 / total, 0.0)


def autograd_on():
    """A context in which torch records and differentiates, whoever called.

    A registered operator runs below the autograd dispatch keys, so enable_grad alone records
    nothing there.
    """
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        key = getattr(torch._C.DispatchKey, name, None)
        exclude = exclude if key is None else exclude.remove(key)
    stack = contextlib.ExitStack()
    include = torch._C._dispatch_tls_local_include_set()
    stack.enter_context(torch._C._ForceDispatchKeyGuard(include, exclude))
    stack.enter_context(torch.enable_grad())
    return stack


def _per_row(tensor: Tensor | None, number: float, like: Tensor) -> Tensor:
    """(N,) float64 leaf from a per-row tensor or a number."""
    if tensor is None:
        return torch.full(like.shape[:1], number, dtype=torch.float64, device=like.device)
    return tensor.detach().double().clone()


def _rows(
    student,
    teacher,
    labels,
    mask,
    student_temperature,
    teacher_temperature,
    first,
    second,
    spec,
    grad_student,
    grad_teacher,
    grad_temperature,
):
    """The differentiable row values and the leaves that gradients are wanted for."""
    z = student.detach().double()
    a = None if teacher is None else teacher.detach().double()
    tau_s = _per_row(student_temperature, spec.student_temperature, student)
    tau_t = _per_row(teacher_temperature, spec.teacher_temperature, student)
    leaves = []
    if grad_student is not None:
        leaves.append((z.requires_grad_(), grad_student))
    if grad_teacher is not None:
        leaves.append((a.requires_grad_(), grad_teacher))
    if grad_temperature is not None:
        leaves.append((tau_s.requires_grad_(), grad_temperature[:, 0]))
        leaves.append((tau_t.requires_grad_(), grad_temperature[:, 1]))
    selected = selection(labels, mask, student.shape[0], student.device, spec.ignore_index)
    with autograd_on():
        divergence, value = row_values(
            z,
            a,
            labels,
            selected,
            tau_s,
            tau_t,
            _per_row(first, spec.first, student),
            _per_row(second, spec.second, student),
            spec,
        )
    return selected, divergence, value, leaves


def _differentiate(value: Tensor, factor: Tensor, leaves: list) -> None:
    """Write d(sum factor * value)/d(leaf) into each leaf's output; rows with factor 0 give 0."""
    if not leaves:
        return
    if value.requires_grad:
        inputs = [leaf for leaf, _ in leaves]
        ones = torch.ones_like(value)
        with autograd_on():
            gradients = torch.autograd.grad(value, inputs, ones, allow_unused=True)
    else:
        gradients = [None] * len(leaves)
    broken = value.isnan()
    for (_, out), gradient in zip(leaves, gradients):
        if gradient is None:
            gradient = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
        scale, nan = factor, broken
        if gradient.dim() == 2:
            scale, nan = factor[:, None], broken[:, None]
        product = torch.where(scale == 0, 0.0, gradient * scale)
        out.copy_(torch.where(nan & (scale != 0), torch.nan, product))


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
    """Forward of csrc/divergence/divergence.h. Of the statistics only value, factor and unit are
    filled: the backward of this backend starts again from the logits."""
    spec = DivergenceSpec(*spec)
    selected, divergence, rows, leaves = _rows(
        student,
        teacher,
        labels,
        mask,
        student_temperature,
        teacher_temperature,
        first,
        second,
        spec,
        grad_student,
        grad_teacher,
        grad_temperature,
    )
    weight = None if weight is None else weight.double()
    items = None if num_items is None else num_items.double()
    unit = unit_factors(selected, weight, items, spec)
    factor = unit if weight is None else torch.where(unit == 0, 0.0, unit * weight)
    weighted = torch.where(factor == 0, 0.0, rows.detach() * factor)
    value.copy_(weighted if spec.reduction == S.NONE else weighted.sum())
    stats.zero_()
    stats[:, S.DIVERGENCE] = divergence.detach().to(stats.dtype)
    stats[:, S.VALUE] = rows.detach().to(stats.dtype)
    stats[:, S.FACTOR] = factor.to(stats.dtype)
    stats[:, S.UNIT] = unit.to(stats.dtype)
    _differentiate(rows, factor, leaves)


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
    """Backward of csrc/divergence/divergence.h, from the logits."""
    spec = DivergenceSpec(*spec)
    _, _, rows, leaves = _rows(
        student,
        teacher,
        labels,
        mask,
        student_temperature,
        teacher_temperature,
        first,
        second,
        spec,
        grad_student,
        grad_teacher,
        grad_temperature,
    )
    factor = stats[:, S.FACTOR].double()
    _differentiate(rows, torch.where(factor == 0, 0.0, factor * upstream.double()), leaves)


def scale(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-d), in place."""
    tensor.mul_(factor.to(tensor.dtype))


from .torch_divergence_sum import (  # noqa: E402,F401
    DIVERGENCE_SUM_PARTS,
    divergence_sum_bwd,
    divergence_sum_fwd,
)
from .torch_token_stats import (  # noqa: E402,F401  needs the functions above
    label_log_probs_bwd,
    label_log_probs_fwd,
    token_stats,
)
