"""Checks of what `sinkhorn` is given: marginals, lengths, reach. Data is looked at where that costs
no synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.registry import pick
from .checks import check_floats, check_number, may_look


def at_least_zero(number, argument: str) -> float:
    number = check_number(number, argument)
    if number < 0:
        raise ValueError(f"{argument}: expected a number >= 0, got {number!r}")
    return number


def parse_reach(reach) -> tuple[float | None, float | None]:
    if reach is None:
        return None, None
    pair = tuple(reach) if isinstance(reach, (tuple, list)) else (reach, reach)
    if len(pair) != 2:
        raise ValueError(f"reach: expected a number or a pair, got {len(pair)} of them")
    return tuple(None if r is None else check_number(r, "reach", positive=True) for r in pair)


def batch_of(cost, a, b, student_lengths, teacher_lengths) -> tuple[int, bool]:
    """(number of problems, whether the caller passed a single one)."""
    if cost.dim() == 3:
        return cost.shape[0], False
    for tensor, rank in ((a, 2), (b, 2), (student_lengths, 1), (teacher_lengths, 1)):
        if isinstance(tensor, Tensor) and tensor.dim() == rank:
            return tensor.shape[0], False
    return 1, True


def parse_marginal(
    given, argument: str, batch: int, size: int, cost: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """(B, size) of the compute dtype, last stride 1; None stays None."""
    if given is None:
        return None
    check_floats(given, argument)
    if given.device != cost.device:
        raise ValueError(
            f"{argument}: expected a tensor on {cost.device} like the cost, got {given.device}"
        )
    if given.shape not in ((size,), (batch, size)):
        raise ValueError(
            f"{argument}: expected shape ({size},) or ({batch}, {size}), got {tuple(given.shape)}"
        )
    if given.dtype != dtype:
        given = given.to(dtype)
    if given.stride(-1) != 1 and size > 1:
        given = given.contiguous()
    return given if given.dim() == 2 else given.expand(batch, size)


def parse_lengths(lengths, argument: str, batch: int, size: int, cost: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{argument}: expected int64, got {lengths.dtype}")
    if lengths.device != cost.device:
        raise ValueError(
            f"{argument}: expected a tensor on {cost.device} like the cost, got {lengths.device}"
        )
    if lengths.shape not in ((), (batch,)):
        raise ValueError(f"{argument}: expected shape ({batch},), got {tuple(lengths.shape)}")
    lengths = lengths.to(torch.int64).expand(batch).contiguous()
    if may_look(lengths) and lengths.numel():
        low, high = (int(x) for x in torch.aminmax(lengths))
        if low < 0 or high > size:
            raise ValueError(f"{argument}: expected 0 to {size}, got {low} to {high}")
    return lengths


def inside_of(size: int, lengths: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, size) bool, None for all."""
    if lengths is None:
        return None
    return torch.arange(size, device=like.device) < lengths[:, None]


def uniform(batch: int, size: int, lengths: Tensor | None, like: Tensor) -> Tensor:
    if lengths is None:
        return like.new_full((batch, size), 1.0 / max(size, 1))
    share = 1.0 / lengths.clamp(min=1).to(like.dtype)
    return torch.where(inside_of(size, lengths, like), share[:, None], 0.0)


def marginals_fit(cost: Tensor, a, b, student_lengths, teacher_lengths, *, balanced: bool) -> bool:
    """Whether nothing is wrong with the marginals, by the CPU kernels' own look at them. False also
    where they have none to offer: `check_marginals` then says."""
    if a is None and b is None:
        return True
    if cost.device.type != "cpu" or not may_look(cost):
        return False
    look = getattr(pick("transport", "cpu"), "marginals_fit", None)
    return look is not None and look(a, b, student_lengths, teacher_lengths, balanced)


def check_marginals(a, b, student_lengths, teacher_lengths, *, balanced: bool):
    """The marginals with zeros beyond the lengths, and which problems are bad (None: looked)."""
    inside_a = inside_of(a.shape[1], student_lengths, a)
    inside_b = inside_of(b.shape[1], teacher_lengths, b)
    a = a if inside_a is None else torch.where(inside_a, a, 0.0)
    b = b if inside_b is None else torch.where(inside_b, b, 0.0)
    plain_a, plain_b = a.detach(), b.detach()
    mass_a, mass_b = plain_a.sum(-1), plain_b.sum(-1)
    # Masses made in half precision differ by its rounding.
    unequal = (mass_a - mass_b).abs() > 1e-3 * torch.maximum(mass_a, mass_b)
    for lengths in (student_lengths, teacher_lengths):
        if lengths is not None:  # an empty problem has no mass on that side
            unequal = unequal & (lengths > 0)
    if may_look(a):
        for argument, marginal in (("a", plain_a), ("b", plain_b)):
            if not bool((marginal >= 0).all()) or bool(marginal.isinf().any()):
                raise ValueError(
                    f"{argument}: expected finite marginals >= 0, got {float(marginal.min())!r} to "
                    f"{float(marginal.max())!r}"
                )
        if balanced and bool(unequal.any()):
            index = int(unequal.nonzero()[0, 0])
            raise ValueError(
                f"b: expected the mass of a ({float(mass_a[index])!r}) without reach, got "
                f"{float(mass_b[index])!r} in problem {index}"
            )
        return a, b, None
    bad = ~((plain_a >= 0).all(-1) & (plain_b >= 0).all(-1) & (mass_a + mass_b).isfinite())
    if balanced:
        bad = bad | unequal
    return torch.where(bad[:, None], 1.0, a), torch.where(bad[:, None], 1.0, b), bad


def check_finite(cost: Tensor, student_lengths, teacher_lengths) -> None:
    """NaN inside a problem raises."""
    nan = cost.detach().isnan()
    for dim, lengths in ((1, student_lengths), (2, teacher_lengths)):
        if lengths is not None:
            inside = inside_of(cost.shape[dim], lengths, cost)
            nan = nan & (inside[:, :, None] if dim == 1 else inside[:, None, :])
    if bool(nan.any()):
        index = tuple(int(i) for i in nan.nonzero()[0])
        raise ValueError(f"cost: contains NaN, first at {index}")


def refuse_nan(value: Tensor, cost: Tensor, student_lengths, teacher_lengths) -> None:
    """A value that is NaN because the cost was: named, where data may be looked at."""
    if not may_look(value):
        return
    total = float(value.detach().sum())
    if total != total:
        check_finite(cost, student_lengths, teacher_lengths)
