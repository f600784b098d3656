"""Sorted transport between softmaxed rows (ULD) and the Sinkhorn divergence between clouds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import transport as ops
from ..ops.common import functorch_active
from .checks import check_floats, check_number, same_device
from .ground_cost import square_distance

_REDUCTIONS = ("none", "sum", "mean")


def sorted_transport(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    student_row_scale: Tensor | None = None,
    teacher_row_scale: Tensor | None = None,
    exclude_student: Tensor | None = None,
    exclude_teacher: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Distance of two vocabularies that share no ids: sum over ranks of |p_(r) - q_(r)|, the sorted
    probabilities of teacher and student (universal logit distillation, Boizard et al. 2024).

    It is the least L1 distance over all matchings of the vocabularies. Softmax keeps the order, so
    the logits are sorted: 16-bit logits by counting their values, wider ones by radix.

    Args:
        student: Logits [..., V], float32, float16, bfloat16 or float64.
        teacher: Logits [..., V'], the same leading shape; V' may differ, the shorter side is padded
            with probability 0. Its dtype is free (float64 goes with float64).
        temperature: Of the student, > 0.
        teacher_temperature: Of the teacher; default the student's.
        mask: Bool, leading shape: rows that count. Others give 0 and no gradient.
        weight: Float, leading shape: factor of each row; constant.
        student_row_scale: Float, leading shape, >= 0: multiplies the row's probabilities (merged
            tokens); gets its gradient.
        teacher_row_scale: Likewise for the teacher.
        exclude_student: Ids (int64 [E]) or a bool mask [V] that are left out after the softmax.
        exclude_teacher: Likewise [V'].
        reduction: "none", "sum" or "mean" (over selected rows).
        num_items: Divisor in place of the mean's count.

    Returns:
        float32 (float64), a scalar or the leading shape. The gradient where probabilities tie is the
        mean of the signs the tied entries share.
    """
    check_floats(student, "student")
    check_floats(teacher, "teacher")
    same_device(teacher, "teacher", student)
    if student.dim() < 1 or teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher: expected leading shape {tuple(student.shape[:-1])} like the student, got "
            f"shape {tuple(teacher.shape)}"
        )
    if student.shape[-1] == 0 or teacher.shape[-1] == 0:
        raise ValueError("student, teacher: expected at least one column")
    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        raise TypeError(
            f"teacher: float64 goes with float64 only, got student {student.dtype} and teacher "
            f"{teacher.dtype}"
        )
    tau = check_number(temperature, "temperature", positive=True)
    tau_t = tau
    if teacher_temperature is not None:
        tau_t = check_number(teacher_temperature, "teacher_temperature", positive=True)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: goes with reduction 'mean', got {reduction!r}")
    leading = student.shape[:-1]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    z, t = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', mask)}")
        same_device(mask, "mask", student)
        if mask.shape != leading:
            raise ValueError(f"mask: expected shape {tuple(leading)}, got {tuple(mask.shape)}")
        mask = mask.reshape(-1).contiguous()
    scale_s = _per_row(student_row_scale, "student_row_scale", leading, student, dtype)
    scale_t = _per_row(teacher_row_scale, "teacher_row_scale", leading, student, dtype)
    weight = _per_row(weight, "weight", leading, student, dtype)
    arguments = (
        z,
        t,
        mask,
        scale_s,
        scale_t,
        _excluded(exclude_student, "exclude_student", student),
        _excluded(exclude_teacher, "exclude_teacher", teacher),
    )
    if reduction == "none":
        rows = ops.sorted_transport(*arguments, tau, tau_t)
        return (rows if weight is None else rows * weight).view(leading)
    factor = _factor(reduction, num_items, z.shape[0], mask, weight, dtype, student)
    only_student = student.requires_grad and not any(
        x is not None and x.requires_grad for x in (teacher, scale_s, scale_t, factor)
    )
    eager = not torch.compiler.is_compiling() and not functorch_active()
    if only_student and eager and torch.is_grad_enabled():
        return ops.sorted_transport_total(*arguments, factor, tau, tau_t)
    return (ops.sorted_transport(*arguments, tau, tau_t) * factor).sum()


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: int = 2,
    blur: float = 0.05,
    reach: float | None = None,
    scaling: float = 0.5,
    diameter: float | None = None,
    debias: bool = True,
    return_potentials: bool = False,
):
    """Sinkhorn divergence between weighted clouds with the semantics of GeomLoss' `SamplesLoss`
    (Feydy et al. 2019): symmetric annealed iterations from the diameter down to `blur`.

    Args:
        x: [N, d] or [B, N, d]. y: [M, d] or [B, M, d].
        a, b: Weights [N] or [B, N], [M] or [B, M]; default uniform.
        p: Cost exponent: 2 is ||x - y||^2 / 2, 1 is ||x - y||.
        blur: Length at which details blur; epsilon = blur^p.
        reach: Length of unbalanced transport, rho = reach^p; None is balanced.
        scaling: Ratio of successive lengths, in (0, 1).
        diameter: Upper bound of distances; None reads it off the data (one synchronisation, and not
            under torch.compile).
        debias: Subtract the self-terms, so that equal clouds give 0.
        return_potentials: Return the pair of potentials (F, G) on x and y instead of the value.

    Returns:
        A scalar, or [B] for batches. Gradients flow through the last half-step (envelope), as in
        GeomLoss.
    """
    check_floats(x, "x")
    check_floats(y, "y")
    if x.dim() not in (2, 3) or y.dim() != x.dim() or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"y: expected a cloud like x {tuple(x.shape)} with the same width, got {tuple(y.shape)}"
        )
    if p not in (1, 2):
        raise ValueError(f"p: expected 1 or 2, got {p!r}")
    blur = check_number(blur, "blur", positive=True)
    scaling = check_number(scaling, "scaling", positive=True)
    if scaling >= 1.0:
        raise ValueError(f"scaling: expected a number below 1, got {scaling!r}")
    rho = None if reach is None else check_number(reach, "reach", positive=True) ** p
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    single = x.dim() == 2
    x, y = x.to(dtype), y.to(dtype)
    if single:
        x, y = x[None], y[None]
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"y: expected {x.shape[0]} clouds like x, got {y.shape[0]}")
    a = _weights(a, "a", x)
    b = _weights(b, "b", y)
    if diameter is None:
        if torch.compiler.is_compiling():
            raise ValueError("diameter: needed under torch.compile, where data cannot be read")
        diameter = _diameter(x, y)
    diameter = check_number(diameter, "diameter", positive=True)

    cost_xy, cost_yx = _cloud_cost(x, y.detach(), p), _cloud_cost(y, x.detach(), p)
    log_a, log_b = _log_weights(a), _log_weights(b)
    pairs = [(cost_xy, log_b, 1), (cost_yx, log_a, 0)]
    if debias:
        pairs += [(_cloud_cost(x, x.detach(), p), log_a, 2), (_cloud_cost(y, y.detach(), p), log_b, 3)]
    lengths = _annealing(p, diameter, blur, scaling)
    with torch.no_grad():
        plain = [(c.detach(), w, k) for c, w, k in pairs]
        epsilon = lengths[0]
        damping = _damping(epsilon, rho)
        potentials = [damping * _softmin(epsilon, c, w) for c, w, _ in plain]
        for epsilon in lengths:
            damping = _damping(epsilon, rho)
            moved = [
                damping * _softmin(epsilon, c, w + potentials[k] / epsilon) for c, w, k in plain
            ]
            potentials = [(old + new) / 2 for old, new in zip(potentials, moved, strict=True)]
    # The last half-step carries the gradient.
    final = [
        damping * _softmin(epsilon, c, (w + potentials[k] / epsilon).detach()) for c, w, k in pairs
    ]
    if return_potentials:
        f, g = (final[0] - final[2], final[1] - final[3]) if debias else final
        return (f[0], g[0]) if single else (f, g)
    value = _divergence(a, b, final, epsilon, rho, debias)
    return value[0] if single else value


# Pieces. ----------------------------------------------------------------------------------------


def _per_row(value, argument: str, leading: torch.Size, student: Tensor, dtype) -> Tensor | None:
    """(N,) of the compute dtype, keeping its gradient."""
    if value is None:
        return None
    check_floats(value, argument)
    same_device(value, argument, student)
    if value.shape != leading:
        raise ValueError(f"{argument}: expected shape {tuple(leading)}, got {tuple(value.shape)}")
    return value.to(dtype).reshape(-1).contiguous()


def _excluded(ids, argument: str, logits: Tensor) -> Tensor | None:
    """(V,) bool."""
    if ids is None:
        return None
    size = logits.shape[-1]
    ids = torch.as_tensor(ids, device=logits.device)
    if ids.dtype == torch.bool:
        if ids.shape != (size,):
            raise ValueError(f"{argument}: expected a mask of shape ({size},), got {tuple(ids.shape)}")
        return ids.contiguous()
    if ids.dtype not in (torch.int64, torch.int32) and ids.numel():
        raise TypeError(f"{argument}: expected integer ids or a bool mask, got {ids.dtype}")
    ids = ids.to(torch.int64).reshape(-1)
    if ids.numel() and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(f"{argument}: expected ids 0 to {size - 1}, got {low} to {high}")
    mask = torch.zeros(size, dtype=torch.bool, device=logits.device)
    return mask.index_fill(0, ids, True)


def _factor(reduction, num_items, rows: int, mask, weight, dtype, student: Tensor) -> Tensor:
    """(N,) what each row is multiplied by before the sum."""
    factor = torch.ones(rows, dtype=dtype, device=student.device) if weight is None else weight
    if mask is not None:
        factor = torch.where(mask, factor, 0.0)
    if reduction == "sum":
        return factor
    if isinstance(num_items, Tensor):
        return factor / num_items.to(device=student.device, dtype=dtype)
    if num_items is not None:
        return factor / check_number(num_items, "num_items", positive=True)
    if mask is not None:
        return factor / mask.sum().clamp(min=1).to(dtype)
    return factor / max(rows, 1)


def _weights(given, argument: str, cloud: Tensor) -> Tensor:
    batch, size, _ = cloud.shape
    if given is None:
        return cloud.new_full((batch, size), 1.0 / size)
    check_floats(given, argument)
    if given.shape not in ((size,), (batch, size)):
        raise ValueError(
            f"{argument}: expected shape ({size},) or ({batch}, {size}), got {tuple(given.shape)}"
        )
    return given.to(cloud.dtype).expand(batch, size)


def _log_weights(weights: Tensor) -> Tensor:
    """log, -1e5 for zero."""
    plain = weights.detach()
    return torch.where(plain > 0, plain.clamp(min=torch.finfo(plain.dtype).tiny).log(), -1e5)


def _diameter(x: Tensor, y: Tensor) -> float:
    """Diagonal of the box around all points of the batch."""
    both = torch.cat([x.detach().flatten(0, 1), y.detach().flatten(0, 1)])
    return float((both.amax(0) - both.amin(0)).norm())


def _cloud_cost(x: Tensor, y: Tensor, p: int) -> Tensor:
    square = square_distance(x, y)
    return square / 2 if p == 2 else square.clamp(min=1e-8).sqrt()


def _annealing(p: int, diameter: float, blur: float, scaling: float) -> list[float]:
    """Epsilons from diameter^p down to blur^p, each end once more."""
    start, stop, step = p * math.log(diameter), p * math.log(blur), p * math.log(scaling)
    count = max(0, math.ceil((stop - start) / step))
    return [diameter**p, *(math.exp(start + i * step) for i in range(count)), blur**p]


def _damping(epsilon: float, rho: float | None) -> float:
    return 1.0 if rho is None else 1.0 / (1.0 + epsilon / rho)


def _softmin(epsilon: float, cost: Tensor, log_weights: Tensor) -> Tensor:
    """-epsilon log sum_j exp(log_weights_j - cost_ij / epsilon)."""
    return -epsilon * (log_weights.unsqueeze(-2) - cost / epsilon).logsumexp(-1)


def _divergence(a, b, final, epsilon: float, rho: float | None, debias: bool) -> Tensor:
    """(B,) from the final potentials."""
    if rho is None:
        f, g = (final[0] - final[2], final[1] - final[3]) if debias else final
        return (a * f).sum(-1) + (b * g).sum(-1)
    f, g = ((-final[0] / rho).exp(), (-final[1] / rho).exp())
    rest = ((-final[2] / rho).exp(), (-final[3] / rho).exp()) if debias else (1.0, 1.0)
    factor = rho + epsilon / 2
    return factor * ((a * (rest[0] - f)).sum(-1) + (b * (rest[1] - g)).sum(-1))
