"""Calls each public function once on tiny shapes: what compute-sanitizer watches (`bench/gpu.sh`).

    python tests/gpu_smoke.py [--device cuda] [FAMILY ...]

Sanitizers slow kernels down a hundredfold, so shapes are tiny: one with a tail that fills no
vector, one that fills several blocks. A family registers with `@family("name")`; its function runs
forward and backward and returns the number of calls. Values are the tests' business; this script
only looks for results that are not finite.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable

import torch

import kdkernels as kd
from kdkernels.backends.relation_spec import KINDS as RELATION_KINDS
from kdkernels.backends.torch_feature import KINDS as FEATURE_KINDS
from kdkernels.backends.torch_feature import NORMALIZES as FEATURE_NORMALIZES

Smoke = Callable[[str], int]
FAMILIES: dict[str, Smoke] = {}

DIVERGENCE_KINDS = (
    *("forward_kl", "cross_entropy", "reverse_kl", "jeffreys", "jensen_shannon"),
    *("skew_forward_kl", "skew_reverse_kl", "total_variation", "hellinger"),
    *("squared_hellinger", "bhattacharyya", "alpha", "renyi", "alpha_beta"),
    *("triangular", "chi_squared", "entropy"),
)
SHAPES = ((3, 37), (2, 2500))  # (N, V)


def family(name: str) -> Callable[[Smoke], Smoke]:
    """Registers a family's smoke function."""

    def register(function: Smoke) -> Smoke:
        FAMILIES[name] = function
        return function

    return register


def check(what: str, *tensors: torch.Tensor) -> None:
    """RuntimeError when a result holds something that is not finite."""
    for tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"{what}: a result that is not finite: {tensor}")


@family("divergence")
def divergence(device: str) -> int:
    """Every kind in every dtype, then each option once."""
    calls = 0
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for kind, dtype, shape in itertools.product(DIVERGENCE_KINDS, dtypes, SHAPES):
        _divergence_call(device, shape, dtype, kind)
        calls += 1
    rows = 3
    labels = torch.tensor([1, -100, 5], device=device)
    weight = torch.rand(rows, device=device)
    options = (
        {"temperature": 2.0, "temperature_squared": True},
        {"labels": labels, "label_weight": 0.5},
        {"mask": labels >= 0, "weight": weight, "normalize": "weights"},
        {"num_items": 7},
        {"reduction": "sum"},
        {"standardize": True},
        {"clip": 0.5},
    )
    for extra in options:
        _divergence_call(device, SHAPES[0], torch.float32, "forward_kl", **extra)
        calls += 1
    student, teacher = _logits(device, SHAPES[0], torch.float32)
    each = kd.divergence(student, teacher, reduction="none")
    (gradient,) = torch.autograd.grad(each, student, torch.rand_like(each))
    check("reduction none", each, gradient)
    copy = student.clone()  # not a leaf: may be overwritten
    loss = kd.divergence(copy, teacher, inplace=True)
    (gradient,) = torch.autograd.grad(loss, copy)
    check("inplace", loss, gradient)
    return calls + 2


def _logits(
    device: str, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    return student.to(device, dtype).requires_grad_(), teacher.to(device, dtype)


def _divergence_call(
    device: str, shape: tuple[int, int], dtype: torch.dtype, kind: str, **options: object
) -> None:
    student, teacher = _logits(device, shape, dtype)
    other = None if kind == "entropy" else teacher
    loss = kd.divergence(student, other, kind, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    check(f"{kind} {dtype} {shape} {sorted(options)}", loss, gradient)


@family("relation")
def relation(device: str) -> int:
    """Every kind of relation, of features and of ranking once, with gradients."""
    calls = 0

    def run(what: str, function, *sides: torch.Tensor) -> None:
        nonlocal calls
        leaves = [x.clone().requires_grad_() for x in sides]
        loss = function(*leaves)
        check(what, loss, *torch.autograd.grad(loss, leaves))
        calls += 1

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        student, teacher = (torch.randn((2, 70, 40), generator=generator) for _ in range(2))
        student, teacher = student.to(device, dtype), teacher.to(device, dtype)
        for kind in RELATION_KINDS:
            run(f"{kind} {dtype}", lambda s, t, k=kind: kd.relation(s, t, k), student, teacher)
        for kind, how in itertools.product(FEATURE_KINDS, (None, *FEATURE_NORMALIZES[1:])):
            run(
                f"{kind} {how} {dtype}",
                lambda s, t, k=kind, n=how: kd.feature(s, t, k, normalize=n),
                student,
                teacher,
            )
        run(f"contrastive {dtype}", lambda q, k: kd.contrastive(q, k), student[0], teacher[0])
        order = torch.randperm(40, generator=generator).to(device).expand(70, 40)
        run(f"plackett_luce {dtype}", lambda s, o=order: kd.plackett_luce(s, o), student[0])
    return calls


@family("transport")
def transport(device: str) -> int:
    """Sinkhorn of each size class and gradient mode, the Sinkhorn divergence, sorted rows."""
    calls = 0
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(device).requires_grad_()

    # A warp, a block, and a group of blocks a problem (more than 2^18 entries on CUDA).
    for shape, gradient in (
        ((3, 20, 30), "unrolled"),
        ((2, 150, 70), "implicit"),
        ((2, 150, 70), "envelope"),
        ((1, 520, 510), "unrolled"),
    ):
        cost = random(*shape)
        value = "sharp" if gradient == "unrolled" else "dual"
        loss = kd.sinkhorn(
            cost, epsilon=0.1, iterations=3, value=value, gradient=gradient, tolerance=1e-3
        )
        (found,) = torch.autograd.grad(loss.sum(), cost)
        check(f"sinkhorn {shape} {gradient}", loss, found)
        calls += 1
    for width in (3, 20):
        x, y = random(2, 30, width), random(2, 25, width)
        loss = kd.sinkhorn_divergence(x, y, diameter=5.0)
        check(f"sinkhorn_divergence {width}", loss, *torch.autograd.grad(loss.sum(), (x, y)))
        calls += 1
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        student, teacher = _logits(device, (3, 2500), dtype)
        loss = kd.sorted_transport(student, teacher[:, :2400])
        check(f"sorted_transport {dtype}", loss, *torch.autograd.grad(loss, student))
        calls += 1
    return calls


@family("gromov")
def gromov(device: str) -> int:
    """Graphs on logits in each dtype, and the bounds of small costs."""
    calls = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        student, teacher = (x.unsqueeze(0) for x in _logits(device, (5, 2500), dtype))
        student = student.detach().requires_grad_()
        loss = kd.graph_on_logits(student, teacher, k=7)
        check(f"graph_on_logits {dtype}", loss, *torch.autograd.grad(loss, student))
        calls += 1
    points = torch.randn((9, 3), generator=torch.Generator().manual_seed(0)).to(device)
    cost = torch.cdist(points, points).requires_grad_()
    for method in ("first_lower_bound", "sorted"):
        loss = kd.gromov_wasserstein(cost, 2 * cost.detach(), method=method)
        check(f"gromov_wasserstein {method}", loss, *torch.autograd.grad(loss, cost))
        calls += 1
    return calls


def main() -> int:
    """Runs the families asked for (default: all); 0 when all of them ran."""
    parser = argparse.ArgumentParser(description="Tiny calls of every public function.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    for name in options.families or FAMILIES:
        if name not in FAMILIES:
            parser.error(f"FAMILY: expected one of {', '.join(FAMILIES)}, got {name}")
        calls = FAMILIES[name](options.device)
        print(f"{name}: {calls} calls")
    if options.device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
