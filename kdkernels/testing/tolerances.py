"""Error bounds, each with the reason it follows from. Tests take their tolerances from here."""

from __future__ import annotations

import torch

# contract.md, Numbers: row values of KL-type kinds, relative to float64 of the same inputs.
VALUE_FLOAT32 = 1e-5
# float64 kernels: sums of V terms of relative error 2^-53 each, exp and log within 4 ulp.
VALUE_FLOAT64 = 1e-9

# A gradient entry is (s_v - q_v S) x factor in float32. exp2 is right to 2.5e-7, the argument of
# exp2 to half an ulp of |z| log2(e) / tau (2^-23 x |u| ln 2 for |u| <= 64: 5e-6), and the entry is
# a difference of two such numbers, each at most max(p, q).
GRADIENT_FLOAT32 = 1e-5
GRADIENT_FLOAT64 = 1e-11

# Rounding of the stored gradient: half a unit in the last place.
_ROUNDING = {
    torch.float64: 0.0,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# float16 loses relative accuracy below its smallest normal number; half its spacing there.
_ABSOLUTE = {torch.float16: 2.0**-25}


def value(dtype: torch.dtype) -> float:
    """Relative bound of a row value for logits of `dtype`."""
    return VALUE_FLOAT64 if dtype == torch.float64 else VALUE_FLOAT32


# In float32, d = log p - log q of an entry is right to 2^-24 max(|a|, |z|) / tau: 2.7e-6 for the 45
# that the tests draw at most. A row that lies on one entry (p ~ 1, d ~ 0) shows it: squared in
# kinds that are quadratic at p = q, as it is in those that are not (for cross_entropy and entropy
# it is the rounding of log q).
_FLOOR_QUADRATIC = 4e-12
_FLOOR_LINEAR = 2e-6
LINEAR_KINDS = ("total_variation", "hellinger", "cross_entropy", "entropy")


def floor(kind: object, dtype: torch.dtype) -> float:
    """Absolute error below which a row value of `kind` says nothing."""
    if dtype == torch.float64:
        return (
            1e-14  # the one-pass sum, which is finished by the gap formulas only below 1e-5 of it
        )
    return _FLOOR_LINEAR if kind in LINEAR_KINDS else _FLOOR_QUADRATIC


def assert_values(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, kind: object = "forward_kl"
) -> None:
    """Row values or a loss against float64: relative, above `floor`; inf and NaN equal."""
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=value(dtype),
        atol=floor(kind, dtype),
        equal_nan=True,
    )


def assert_gradient(
    actual: torch.Tensor,
    expected: torch.Tensor,
    scale: torch.Tensor | float,
    dtype: torch.dtype | None = None,
) -> None:
    """A gradient against float64.

    `scale` (N, 1) or a number: the size of the terms whose difference an entry is (factor / tau x
    the row's largest term), which the absolute error is relative to.
    """
    dtype = dtype or actual.dtype
    inner = GRADIENT_FLOAT64 if dtype == torch.float64 else GRADIENT_FLOAT32
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places than expected"
    actual, expected = actual.nan_to_num(0.0), expected.nan_to_num(0.0)
    scale = torch.as_tensor(scale, dtype=torch.float64).nan_to_num(0.0)
    bound = inner * scale.abs() + _ROUNDING[dtype] * expected.abs() * 1.01 + _ABSOLUTE.get(dtype, 0)
    excess = (actual - expected).abs() - bound
    worst = int(excess.argmax()) if excess.numel() else 0
    assert excess.numel() == 0 or float(excess.max()) <= 0.0, (
        f"gradient entry {worst}: {actual.flatten()[worst]!r}, expected "
        f"{expected.flatten()[worst]!r}, over the bound by {float(excess.max()):.3e}"
    )
