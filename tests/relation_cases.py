"""What the relation tests share: tokens, the dense float64 statement, comparison of both."""

from __future__ import annotations

import torch

import kdkernels as kd

ROW_KINDS = (
    "softmax_kl",
    "softmax_cross_entropy",
    "softmax_reverse_kl",
    "softmax_mse",
    "gram_row_l2",
    "gram_row_l1",
)
ELEMENT_KINDS = ("mse", "l1", "smooth_l1", "huber", "margin_l1")
GRAPH_KINDS = ("distance", "angle", "cka")
KINDS = ROW_KINDS + ELEMENT_KINDS + GRAPH_KINDS


def options_of(kind: str) -> dict:
    """Parameters under which the kind is not trivial."""
    return {
        "margin_l1": {"similarity": "cosine", "margin": 0.05},
        "smooth_l1": {"beta": 0.3},
        "huber": {"beta": 0.2},
        "gram_row_l1": {"similarity": "cosine"},
    }.get(kind, {})


def tokens(*shape: int, dtype=torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def leaves_of(side):
    return side if isinstance(side, tuple) else (side,)


def gradients(student, teacher, *args, teacher_grad=False, weight=None, **options):
    """Loss, gradients of the student's tensors, of the teacher's if asked for, of tensor scales."""

    def leaf(x):
        return x.detach().clone().requires_grad_()

    s = tuple(leaf(x) for x in leaves_of(student))
    t = tuple(leaf(x) if teacher_grad else x for x in leaves_of(teacher))
    scales = {k: leaf(v) for k, v in options.items() if k.endswith("_scale") and torch.is_tensor(v)}
    options = {**options, **scales}
    loss = kd.relation(
        s if isinstance(student, tuple) else s[0],
        t if isinstance(teacher, tuple) else t[0],
        *args,
        **options,
    )
    total = loss if weight is None else loss * weight
    wanted = [*s, *(t if teacher_grad else ()), *scales.values()]
    return loss.detach(), torch.autograd.grad(total.sum(), wanted)


def reference(student, teacher, *args, **options):
    """The same on the dense float64 reference."""

    def wide(x):
        if torch.is_tensor(x) and x.is_floating_point():
            return x.detach().double()
        return x

    s, t = (
        tuple(wide(x) for x in side) if isinstance(side, tuple) else wide(side)
        for side in (student, teacher)
    )
    with kd.use_backend("torch"):
        return gradients(s, t, *args, **{k: wide(v) for k, v in options.items()})


def assert_same(student, teacher, *args, value=1e-5, gradient=2e-5, **options) -> None:
    """Value (relative) and gradients (to the size of the largest entry) against the reference."""
    loss, found = gradients(student, teacher, *args, **options)
    expected, wanted = reference(student, teacher, *args, **options)
    scale = expected.abs().max().clamp(min=1e-6)
    assert float((loss.double() - expected).abs().max()) <= value * float(scale), (loss, expected)
    for a, b in zip(found, wanted, strict=True):
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(a.dtype, 0.0)
        bound = (gradient + rounding) * float(b.abs().max().clamp(min=1e-7))
        assert float((a.double() - b).abs().max()) <= bound, float((a.double() - b).abs().max())
