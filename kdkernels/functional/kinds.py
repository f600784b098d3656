"""The kinds of `kdkernels.divergence`: names, parameters, and their numbers in a spec."""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

from torch import Tensor

from ..backends import spec as S

KindTuple = tuple[tuple[str, float], ...]


class Kind(NamedTuple):
    """One kind: its code, the parameters it takes with their defaults, its outer map."""

    code: int = S.KIND_NONE
    parameters: tuple[tuple[str, float], ...] = ()
    outer: int = S.IDENTITY
    linear: tuple[tuple[str, float], ...] = ()


KINDS: dict[str, Kind] = {
    "forward_kl": Kind(linear=(("forward_kl", 1.0),)),
    "cross_entropy": Kind(linear=(("cross_entropy", 1.0),)),
    "reverse_kl": Kind(linear=(("reverse_kl", 1.0),)),
    "jeffreys": Kind(linear=(("forward_kl", 1.0), ("reverse_kl", 1.0))),
    "entropy": Kind(linear=(("entropy", 1.0),)),
    "jensen_shannon": Kind(S.JENSEN_SHANNON, (("beta", 0.5),)),
    "skew_forward_kl": Kind(S.SKEW_FORWARD, (("alpha", 0.1),)),
    "skew_reverse_kl": Kind(S.SKEW_REVERSE, (("alpha", 0.1),)),
    "total_variation": Kind(S.TOTAL_VARIATION),
    "hellinger": Kind(S.SQUARED_HELLINGER, outer=S.SQRT),
    "squared_hellinger": Kind(S.SQUARED_HELLINGER),
    "bhattacharyya": Kind(S.SQUARED_HELLINGER, outer=S.BHATTACHARYYA),
    "alpha": Kind(S.ALPHA, (("alpha", 0.5),)),
    "renyi": Kind(S.ALPHA, (("alpha", 0.5),), outer=S.RENYI),
    "alpha_beta": Kind(S.ALPHA_BETA, (("alpha", 0.5), ("beta", 0.5))),
    "triangular": Kind(S.TRIANGULAR),
    "chi_squared": Kind(S.CHI_SQUARED),
}
_UNIT_INTERVAL = ("jensen_shannon", "skew_forward_kl", "skew_reverse_kl")
# Scalar parameters at which a kind is one of the linear group: (kind, parameters) -> linear kind.
_LIMITS = {
    ("jensen_shannon", (0.0,)): "forward_kl",
    ("jensen_shannon", (1.0,)): "reverse_kl",
    ("skew_forward_kl", (0.0,)): "forward_kl",
    ("skew_reverse_kl", (0.0,)): "reverse_kl",
    ("alpha", (1.0,)): "forward_kl",
    ("alpha", (0.0,)): "reverse_kl",
    ("renyi", (1.0,)): "forward_kl",
    ("alpha_beta", (1.0, 0.0)): "forward_kl",
    ("alpha_beta", (0.0, 1.0)): "reverse_kl",
}


_TOO_MANY = (
    "kind: forward_kl, reverse_kl, cross_entropy, jeffreys and entropy combine freely, with one "
    "other kind at most; got {}"
)


def look_up(name: str) -> Kind:
    """The kind called `name`; ValueError with the nearest names otherwise."""
    found = KINDS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, KINDS, n=3, cutoff=0.4) or sorted(KINDS)
        raise ValueError(f"kind: unknown divergence {name!r}; did you mean {', '.join(near)}?")
    return found


def check_parameter(kind: str, name: str, value: float) -> None:
    """Range of a scalar `beta` or `alpha`."""
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if kind in _UNIT_INTERVAL and not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1] for kind {kind!r}, got {value!r}")
    if kind == "renyi" and value < 0.0:
        raise ValueError(f"{name}: expected a number >= 0 for kind 'renyi', got {value!r}")


def _parameters(kind: str, beta, alpha) -> tuple[tuple[str, float | Tensor], ...]:
    """(name, value) of the parameters that `kind` takes, defaults filled in."""
    given = {"beta": beta, "alpha": alpha}
    out = []
    for name, default in KINDS[kind].parameters:
        value = given.pop(name)
        if value is None:
            value = default
        elif not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"{name}: expected a number or a tensor, got {type(value).__name__}"
                )
            value = float(value)
            check_parameter(kind, name, value)
        out.append((name, value))
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: kind {kind!r} takes no such parameter")
    return tuple(out)


def _pairs(kind: str | KindTuple) -> KindTuple:
    if isinstance(kind, str):
        look_up(kind)
        return ((kind, 1.0),)
    if not isinstance(kind, (tuple, list)) or not kind:
        raise TypeError(
            f"kind: expected a name or a tuple of (name, coefficient), got {type(kind).__name__}"
        )
    out = []
    for entry in kind:
        if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not isinstance(entry[0], str):
            raise TypeError(f"kind: expected pairs (name, coefficient), got {entry!r}")
        name, coefficient = entry
        look_up(name)
        if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
            raise TypeError(f"kind: the coefficient of {name!r} must be a number")
        if not math.isfinite(coefficient):
            raise ValueError(f"kind: the coefficient of {name!r} must be finite")
        out.append((name, float(coefficient)))
    return tuple(out)


def splits(kind: KindTuple) -> bool:
    """Whether a tuple needs more than one pass: a kind that is a function of a whole sum
    (hellinger, bhattacharyya, renyi) stands in it beside others or with a coefficient."""
    pairs = _pairs(kind)
    return any(KINDS[name].outer for name, _ in pairs) and pairs != ((pairs[0][0], 1.0),)


def parts_of(kind: str | KindTuple, beta, alpha) -> list[tuple[float, str | KindTuple, dict]]:
    """(coefficient, kind, its parameters) of each pass that `kind` needs."""
    parameters = {"beta": beta, "alpha": alpha}
    if isinstance(kind, str) or not splits(kind):
        return [(1.0, kind, parameters)]
    pairs = _pairs(kind)
    whole = [(n, c) for n, c in pairs if KINDS[n].outer]
    linear = tuple((n, c) for n, c in pairs if not KINDS[n].outer and c != 0.0)
    if sum(KINDS[n].code != S.KIND_NONE for n, _ in pairs) > 1:
        raise ValueError(_TOO_MANY.format(", ".join(n for n, _ in pairs)))
    (name, coefficient), *_ = whole
    taken = parameters if KINDS[name].parameters else {}
    out = [(coefficient, name, taken)]
    return [(1.0, linear, {} if taken else parameters), *out] if linear else out


class Program(NamedTuple):
    """What `kind`, `beta` and `alpha` mean: numbers of the spec, and per-row parameters."""

    numbers: dict[str, float]
    tensors: dict[str, tuple[str, Tensor]]  # spec field -> (argument's name, tensor)
    names: tuple[str, ...]


def program(
    kind: str | KindTuple,
    beta: float | Tensor | None,
    alpha: float | Tensor | None,
    detach_mixture: bool,
) -> Program:
    """Resolve `kind`.

    Raises:
        ValueError: unknown kind, parameter out of range or not taken, kinds that do not combine.
        TypeError: `kind`, `beta` or `alpha` of another type.
    """
    pairs = _pairs(kind)
    if detach_mixture and tuple(name for name, _ in pairs) != ("skew_reverse_kl",):
        raise ValueError(f"detach_mixture: goes with kind 'skew_reverse_kl' alone, got {kind!r}")
    numbers: dict[str, float] = {}
    tensors: dict[str, tuple[str, Tensor]] = {}
    parametric = [name for name, _ in pairs if KINDS[name].parameters]
    if not parametric and (beta is not None or alpha is not None):
        _parameters(pairs[0][0], beta, alpha)
    for name, coefficient in pairs:
        found = KINDS[name]
        values: tuple[tuple[str, float | Tensor], ...] = ()
        if found.parameters:
            values = _parameters(name, beta, alpha)
            scalars = tuple(v for _, v in values)
            if not any(isinstance(v, Tensor) for v in scalars) and (name, scalars) in _LIMITS:
                found, values = KINDS[_LIMITS[name, scalars]], ()
        for field, factor in found.linear:
            numbers[field] = numbers.get(field, 0.0) + factor * coefficient
        if found.code == S.KIND_NONE:
            continue
        if "kind" in numbers:
            raise ValueError(_TOO_MANY.format(", ".join(n for n, _ in pairs)))
        numbers.update(kind=float(found.code), other=coefficient, outer=float(found.outer))
        numbers["detach_mixture"] = float(detach_mixture)
        for field, (argument, value) in zip(("first", "second"), values):
            if isinstance(value, Tensor):
                tensors[field] = (argument, value)
            else:
                numbers[field] = value
    linear = any(numbers.get(f) for f in ("forward_kl", "reverse_kl", "cross_entropy", "entropy"))
    if numbers.get("outer") and (linear or numbers["other"] != 1.0):
        raise ValueError(
            "kind: hellinger, bhattacharyya and renyi are functions of a whole sum and stand alone "
            f"with coefficient 1; got {pairs!r}. Add separate calls instead"
        )
    return Program(numbers, tensors, tuple(n for n, _ in pairs))
