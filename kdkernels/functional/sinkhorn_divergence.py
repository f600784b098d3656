"""The Sinkhorn divergence between clouds of points, with GeomLoss' semantics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.annealed import Schedule, annealed
from .checks import check_floats, check_number


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
        GeomLoss, and are made in the forward pass; they have no derivative of their own. Costs of
        up to 16 coordinates are made where they are used, wider points take a matrix a pair of
        clouds.
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

    epsilons = _annealing(p, diameter, blur, scaling)
    schedule = Schedule(tuple(epsilons), p == 1, rho or 0.0, debias)
    final = annealed(x, y, _log_weights(a), _log_weights(b), schedule)
    if return_potentials:
        f, g = (final[0] - final[2], final[1] - final[3]) if debias else final
        return (f[0], g[0]) if single else (f, g)
    value = _divergence(a, b, final, epsilons[-1], rho, debias)
    return value[0] if single else value


# Pieces. ----------------------------------------------------------------------------------------


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


def _annealing(p: int, diameter: float, blur: float, scaling: float) -> list[float]:
    """Epsilons from diameter^p down to blur^p, each end once more."""
    start, stop, step = p * math.log(diameter), p * math.log(blur), p * math.log(scaling)
    count = max(0, math.ceil((stop - start) / step))
    return [diameter**p, *(math.exp(start + i * step) for i in range(count)), blur**p]


def _divergence(a, b, final, epsilon: float, rho: float | None, debias: bool) -> Tensor:
    """(B,) from the final potentials."""
    if rho is None:
        f, g = (final[0] - final[2], final[1] - final[3]) if debias else final
        return (a * f).sum(-1) + (b * g).sum(-1)
    f, g = ((-final[0] / rho).exp(), (-final[1] / rho).exp())
    rest = ((-final[2] / rho).exp(), (-final[3] / rho).exp()) if debias else (1.0, 1.0)
    factor = rho + epsilon / 2
    return factor * ((a * (rest[0] - f)).sum(-1) + (b * (rest[1] - g)).sum(-1))
