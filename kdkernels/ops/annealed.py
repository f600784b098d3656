"""The Sinkhorn divergence's potentials under autograd: one node, whose forward also makes the
slopes that its backward multiplies by. Derivatives are those of the last softmin by its points."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.registry import pick
from .clouds import square_distance
from .common import empty, functorch_active, refuse_jvp, refuse_vmap
from .once import refuse_dual
from .registered import define, implement, library, once

# Points of more coordinates come with their costs (kMostCoordinates of csrc/transport).
_MOST_COORDINATES = 16


class Schedule(NamedTuple):
    """The numbers of a run."""

    epsilons: tuple[float, ...]  # both ends once more, as in GeomLoss
    root: bool  # the cost is the distance, otherwise half its square
    rho: float  # 0: balanced
    debias: bool


define(
    "annealed(Tensor x, Tensor y, Tensor log_a, Tensor log_b, float[] epsilons, bool root, "
    "float rho, bool debias, bool need_x, bool need_y) -> (Tensor, Tensor)"
)


def side_slices(rows: int, columns: int, debias: bool) -> list[slice]:
    """Where the sides (x to y, y to x, x to x, y to y) lie in (B, S)."""
    ends, sizes = 0, (rows, columns, rows, columns)
    slices = []
    for size in sizes[: 4 if debias else 2]:
        slices.append(slice(ends, ends + size))
        ends += size
    return slices


def _costs(x: Tensor, y: Tensor, schedule: Schedule) -> list[Tensor | None]:
    """Of each side, where making them at every use would cost more than reading them."""
    count = 4 if schedule.debias else 2
    if x.shape[-1] <= _MOST_COORDINATES:
        return [None] * count

    def cost(rows: Tensor, columns: Tensor) -> Tensor:
        square = square_distance(rows, columns)
        return square.clamp_(min=1e-8).sqrt_() if schedule.root else square.div_(2)

    costs = [cost(x, y)]
    costs.append(costs[0].transpose(1, 2).contiguous())
    return [*costs, cost(x, x), cost(y, y)][:count]


@torch.no_grad()
def _run(x, y, log_a, log_b, schedule: Schedule, need_x: bool, need_y: bool):
    """(potentials (B, S), slopes (B, d, S)); only the wanted sides' slopes are made."""
    batch, rows, width = x.shape
    slices = side_slices(rows, y.shape[1], schedule.debias)
    total = slices[-1].stop
    dtype, device = x.dtype, x.device
    potentials = empty((batch, total), dtype, device)
    slopes = empty((batch, width, total) if need_x or need_y else (0,), dtype, device)
    with torch.autocast(device.type, enabled=False):
        costs = _costs(x, y, schedule)
        given = costs[0] is not None
        pick("transport", device.type).annealed(
            x.transpose(1, 2).contiguous(),
            y.transpose(1, 2).contiguous(),
            log_a,
            log_b,
            tuple(costs),
            potentials,
            slopes if (need_x or need_y) and not given else None,
            empty((2, batch, total), dtype, device),
            schedule.epsilons,
            schedule.root,
            schedule.rho,
            need_x,
            need_y,
        )
        if given:
            points = ((x, y), (y, x), (x, x), (y, y))
            for side, (weights, (own, other)) in enumerate(zip(costs, points, strict=False)):
                if need_y if side % 2 else need_x:  # sum_j W_ij (x_i - y_j)
                    slope = own * weights.sum(-1, keepdim=True) - weights @ other
                    slopes[:, :, slices[side]] = slope.transpose(1, 2)
    return potentials, slopes


def _gradients(upstream, slopes, rows: int, columns: int, debias: bool, need_x, need_y):
    """(x's, y's) of shape (B, ., d), each or None."""
    slices = side_slices(rows, columns, debias)
    grads = []
    for first, needed in ((0, need_x), (1, need_y)):
        grad = None
        for part in slices[first::2] if needed else ():
            share = upstream[:, None, part] * slopes[:, :, part]
            grad = share if grad is None else grad + share
        grads.append(None if grad is None else grad.transpose(1, 2))
    return grads


def _setup(ctx, inputs, output):
    x, y, _, _, _, _, _, ctx.debias, *_ = inputs
    ctx.sizes = x.shape[1], y.shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, y)


def _backward(ctx, upstream, _):
    slopes, x, y = ctx.saved_tensors
    need_x, need_y = ctx.needs_input_grad[:2]
    grads = _gradients(upstream, slopes, *ctx.sizes, ctx.debias, need_x, need_y)
    return (*once("sinkhorn_divergence", grads, [x, y, upstream]), *(None,) * 8)


def _annealed(x, y, log_a, log_b, epsilons, root, rho, debias, need_x, need_y):
    schedule = Schedule(tuple(epsilons), root, rho, debias)
    return _run(x, y, log_a, log_b, schedule, need_x, need_y)


def _annealed_fake(x, y, log_a, log_b, epsilons, root, rho, debias, need_x, need_y):
    total = (2 if debias else 1) * (x.shape[1] + y.shape[1])
    slopes = (x.shape[0], x.shape[2], total) if need_x or need_y else (0,)
    return x.new_empty((x.shape[0], total)), x.new_empty(slopes)


class _FunctorchAnnealed(torch.autograd.Function):
    """The torch.func door."""

    vmap = refuse_vmap("sinkhorn_divergence")
    jvp = refuse_jvp("sinkhorn_divergence")
    forward = staticmethod(_annealed)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def annealed(
    x: Tensor,  # (B, N, d) float32 or float64
    y: Tensor,  # (B, M, d)
    log_a: Tensor,  # (B, N), without gradient
    log_b: Tensor,  # (B, M)
    schedule: Schedule,
) -> list[Tensor]:
    """The potentials of the sides, (B, N) and (B, M) in turn: two, or four with debias."""
    refuse_dual("sinkhorn_divergence", x, y)
    inside = functorch_active()  # there requires_grad says nothing
    recording = torch.is_grad_enabled()
    need_x, need_y = (inside or (recording and t.requires_grad) for t in (x, y))
    run = _FunctorchAnnealed.apply if inside else torch.ops.kdkernels.annealed.default
    potentials, _ = run(
        x, y, log_a.contiguous(), log_b.contiguous(), list(schedule.epsilons), schedule.root,
        schedule.rho, schedule.debias, need_x, need_y,
    )  # fmt: skip
    return [potentials[:, s] for s in side_slices(x.shape[1], y.shape[1], schedule.debias)]


implement("annealed", _annealed, _annealed_fake)
torch.library.register_autograd("kdkernels::annealed", _backward, setup_context=_setup, lib=library)
