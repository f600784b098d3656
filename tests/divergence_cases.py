"""What the tests of kd.divergence's options share: inputs, and the comparison with float64."""

from __future__ import annotations

import torch
from numerics.divergence_goldens import STUDENT, TEACHER, TEMPERATURE

from kdkernels.testing import tolerances

TAU = TEMPERATURE


def logits(*shape, std=2.0, dtype=torch.float64):
    teacher = torch.randn(*shape, dtype=torch.float64) * std
    student = teacher + torch.randn(*shape, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def dtype_of(backend):
    return torch.float64 if torch.float64 in backend.dtypes else torch.float32


def golden_rows(backend):
    dtype = dtype_of(backend)
    z = torch.tensor([STUDENT], dtype=dtype, device=backend.device, requires_grad=True)
    return z, torch.tensor([TEACHER], dtype=dtype, device=backend.device)


def check(loss, inputs, expected, plain_inputs, scale=1.0):
    """A loss and its gradients against a plain float64 loss and its autograd."""
    dtype = inputs[0].dtype
    tolerances.assert_values(loss.detach().cpu(), expected.detach(), dtype)
    ours = torch.autograd.grad(loss.sum(), inputs)
    theirs = torch.autograd.grad(expected.sum(), plain_inputs)
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(
            a.double().cpu(), b.double().cpu(), rtol=bound, atol=bound * scale
        )


def leaves(*tensors):
    return tuple(t.detach().double().cpu().requires_grad_() for t in tensors)


def on(backend, *tensors, dtype=None):
    dtype = dtype or dtype_of(backend)
    moved = tuple(t.to(backend.device, dtype) for t in tensors)
    return tuple(t.requires_grad_() for t in moved)


def kl(lp, lq):
    """sum p (log p - log q), 0 where p = 0."""
    p = lp.exp()
    return torch.where(p > 0, p * (lp.nan_to_num(neginf=0.0) - lq), 0.0).sum(-1)
