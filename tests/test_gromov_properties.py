"""Properties of graphs on logits and of Gromov-Wasserstein bounds, over drawn shapes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels as kd

FEW = settings(max_examples=25, deadline=None, derandomize=True)
SHAPES = dict(
    seed=st.integers(0, 10**6),
    sequences=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    widths=st.tuples(st.integers(2, 300), st.integers(2, 300)),
)


def draw(seed, sequences, lengths, widths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    out = [
        (torch.randn(sequences, t, v, generator=generator, dtype=torch.float64) * 3).to(dtype)
        for t, v in zip(lengths, widths)
    ]
    return (*out, generator)


@FEW
@given(
    k=st.integers(1, 40),
    p=st.sampled_from((1, 2)),
    aggregate=st.sampled_from(("mean", "sum")),
    **SHAPES,
)
def test_invariances(seed, sequences, lengths, widths, k, p, aggregate):
    """Shifts and scales of a row, the order of the vocabulary and of the positions change nothing;
    swapping the sides neither; equal sides give 0; nothing is negative."""
    student, teacher, generator = draw(seed, sequences, lengths, widths, torch.float64)
    options = dict(k=min(k, *(w - 1 for w in widths)), p=p, aggregate=aggregate, reduction="none")
    loss = kd.graph_on_logits(student, teacher, **options)
    # The floor 1e-6 of the deviation is not scale invariant, and a narrow row's may be small.
    close = dict(rtol=1e-3, atol=1e-3)
    assert bool((loss >= 0).all())
    shift = torch.randn(*student.shape[:-1], 1, generator=generator, dtype=torch.float64) * 10
    scale = torch.rand(*student.shape[:-1], 1, generator=generator, dtype=torch.float64) * 3 + 1
    moved = kd.graph_on_logits(student * scale + shift, teacher, **options)
    torch.testing.assert_close(moved, loss, **close)
    columns = torch.randperm(widths[0], generator=generator)
    positions = torch.randperm(lengths[0], generator=generator)
    shuffled = kd.graph_on_logits(student[:, positions][..., columns], teacher, **options)
    torch.testing.assert_close(shuffled, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kd.graph_on_logits(teacher, student, **options), loss)
    assert bool((kd.graph_on_logits(student, student.clone(), **options) == 0).all())


@FEW
@given(**SHAPES)
def test_masks_are_selection(seed, sequences, lengths, widths):
    """A masked call equals the call on the selected rows alone, value and gradient."""
    student, teacher, generator = draw(seed, 1, lengths, widths)
    mask = torch.rand(1, lengths[0], generator=generator) < 0.5
    mask[0, 0] = True
    marks = dict(mask=mask, teacher_mask=torch.ones(1, lengths[1], dtype=torch.bool))
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    k = min(5, *(w - 1 for w in widths))
    masked = kd.graph_on_logits(one, teacher, k=k, **marks)
    alone = kd.graph_on_logits(two[:, mask[0]], teacher, k=k)
    assert torch.equal(masked, alone)
    gradients = [torch.autograd.grad(x, y)[0] for x, y in ((masked, one), (alone, two))]
    assert torch.equal(*gradients)


@FEW
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 5), loss=st.sampled_from(("square", "absolute"))
)
def test_bounds_are_ordered(seed, n, loss):
    """first <= third <= sorted for symmetric costs; renumbering nodes changes no lower bound."""
    generator = torch.Generator().manual_seed(seed)
    c, d = (torch.randn(n, n, generator=generator, dtype=torch.float64) for _ in range(2))
    c, d = c + c.T, d + d.T
    first, third, upper = (
        kd.gromov_wasserstein(c, d, method=m, loss=loss)
        for m in ("first_lower_bound", "third_lower_bound", "sorted")
    )
    assert first <= third * (1 + 1e-9) + 1e-12 and third <= upper * (1 + 1e-9) + 1e-12
    order = torch.randperm(n, generator=generator)
    for method, value in (("first_lower_bound", first), ("third_lower_bound", third)):
        again = kd.gromov_wasserstein(c[order][:, order], d, method=method, loss=loss)
        torch.testing.assert_close(again, value, rtol=1e-9, atol=1e-12)
    value, lower, upper = kd.gromov_wasserstein(
        c, c[order][:, order], loss=loss, return_bounds=True
    )
    assert lower.item() <= 0.0 <= upper.item() and abs(value.item()) < 1e-12
