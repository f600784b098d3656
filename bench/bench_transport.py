"""Transport cases: setup functions and byte counts, nothing else."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable

import torch

import kdkernels as kd

from .bench_divergence import make_logits
from .harness import Case, MissingPeerError, Settings, Step, Variant

OURS = "kdkernels"
ITERATIONS = 20
EPSILON = 0.05
# Sinkhorn divergence: points in the unit cube, GeomLoss' own blur and scaling.
WIDTH = 3
DIAMETER = math.sqrt(WIDTH)
BLUR, SCALING = 0.05, 0.5
# Entries of all costs below which a call is timed many times over.
SMALL = 1 << 17


def cases(settings: Settings) -> list[Case]:
    """All cases for the device; `quick` shrinks them to a smoke test."""
    if settings.quick:
        problems, clouds, rows, vocabulary = [(2, 32)], [(2, 32)], 4, 4096
    elif settings.device == "cuda":
        problems, rows, vocabulary = [(64, 512), (512, 64), (1, 4096)], 4096, 151936
        clouds = [(16, 1024), (1, 10000)]
    else:
        problems, rows, vocabulary = (
            [(1, 64), (32, 64), (1, 256), (16, 256), (1, 1024)],
            256,
            128256,
        )
        clouds = [(16, 128), (1, 1024)]
    found = []
    for batch, size in problems:
        shape = (batch, size, size)
        cost = batch * size * size * 4
        bind = functools.partial(functools.partial, shape=shape, settings=settings)
        # one read of the cost an iteration, one for the value, one write of the plan
        forward = (ITERATIONS + 2) * cost
        # forward: T + 1 reads; backward: T + 1 reads, T reads and T + 1 writes of the gradient
        both = (4 * ITERATIONS + 3) * cost
        # What takes microseconds is a question of overhead: many calls a sample, no traffic.
        small = batch * size * size < SMALL
        calls = 20 if small else 1
        for name, setup, moved in (("plan", plan, forward), ("loss+gradient", gradient, both)):
            found.append(
                Case(
                    f"sinkhorn {name}",
                    shape=shape,
                    dtype=torch.float32,
                    setup=bind(setup),
                    bytes=None if small else moved,
                    unit_bytes=cost,
                    calls=calls,
                )
            )
    for batch, size in clouds:
        cost = batch * size * size * 4
        found.append(
            Case(
                "sinkhorn divergence loss+gradient",
                shape=(batch, size, WIDTH),
                dtype=torch.float32,
                setup=functools.partial(divergence, (batch, size, WIDTH), settings),
                bytes=None,  # no matrix needs to exist: a question of exponentials
                unit_bytes=cost,
            )
        )
    for dtype in (torch.float32, torch.bfloat16):
        shape = (rows, vocabulary)
        logits = rows * vocabulary * dtype.itemsize
        found.append(
            Case(
                "sorted_transport loss+gradient",
                shape=shape,
                dtype=dtype,
                setup=functools.partial(sorted_rows, shape, dtype, settings),
                # read student + read teacher + write gradient
                bytes=3 * logits,
                unit_bytes=logits,
            )
        )
    return found


def _problem(shape: tuple[int, int, int], settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Costs (B, N, N) in [0, 1] and uniform marginals (B, N)."""
    generator = torch.Generator(device=settings.device).manual_seed(0)
    cost = torch.rand(shape, generator=generator, device=settings.device)
    return cost, torch.full(shape[:2], 1.0 / shape[1], device=settings.device)


def _module(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPeerError(f"{name} is not installed: {error}") from error


def log_loop(
    cost: torch.Tensor, a: torch.Tensor, iterations: int = ITERATIONS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, plan) in the log domain, as one writes it in torch."""
    kernel, log_a = -cost / EPSILON, a.log()
    v = torch.zeros_like(a)
    for _ in range(iterations):
        u = log_a - torch.logsumexp(kernel + v[:, None, :], 2)
        v = log_a - torch.logsumexp(kernel + u[:, :, None], 1)
    full = (kernel + u[:, :, None] + v[:, None, :]).exp()
    return (full * cost).sum((1, 2)), full


def division_loop(cost: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, plan) by dividing the matrix by its sums, as SinKD does."""
    full = (-cost / EPSILON).exp()
    for _ in range(ITERATIONS):
        full = full / full.sum(2, keepdim=True) * a[:, :, None]
        full = full / full.sum(1, keepdim=True) * a[:, None, :]
    return (full * cost).sum((1, 2)), full


def plan(shape: tuple[int, int, int], settings: Settings) -> list[Variant]:
    """The plan after 20 iterations; nothing requires grad."""
    cost, a = _problem(shape, settings)

    def ours():
        return kd.sinkhorn(cost, a, a, epsilon=EPSILON, iterations=ITERATIONS, return_plan=True)[1]

    def pot_batch() -> Step:
        solve = _module("ot.batch").solve_batch
        return Step(
            lambda: (
                solve(cost, EPSILON, a, a, max_iter=ITERATIONS, tol=0, method="log_sinkhorn").plan
            )
        )

    def pot_loop() -> Step:
        one = _module("ot").sinkhorn

        def run():
            return [
                one(a[k], a[k], cost[k], EPSILON, method="sinkhorn_log", stopThr=0,
                    numItermax=ITERATIONS, warn=False)
                for k in range(shape[0])
            ]  # fmt: skip

        return Step(run)

    def geomloss() -> Step:
        solve = _module("geomloss.ot").solve_batch
        return Step(lambda: solve(cost, reg=EPSILON, a=a, b=a, max_iter=ITERATIONS).plan)

    found = [
        Variant(OURS, lambda: Step(ours)),
        Variant("torch logsumexp loop", lambda: Step(lambda: log_loop(cost, a)[1])),
        Variant("torch division loop", lambda: Step(lambda: division_loop(cost, a)[1])),
    ]
    if settings.peers:
        found += [
            Variant("POT ot.batch.solve_batch", pot_batch),
            Variant("POT ot.sinkhorn, loop", pot_loop),
            Variant("GeomLoss ot.solve_batch", geomloss, note="annealed iterations: another plan"),
        ]
    return found


def gradient(shape: tuple[int, int, int], settings: Settings) -> list[Variant]:
    """The sharp cost and its gradient through all iterations."""
    cost, a = _problem(shape, settings)
    cost.requires_grad_()

    def step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
        return Step(lambda: torch.autograd.grad(loss(cost, a).sum(), cost))

    def ours(cost: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return kd.sinkhorn(cost, a, a, epsilon=EPSILON, iterations=ITERATIONS)

    def pot(cost: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        solve = _module("ot.batch").solve_batch
        return solve(
            cost, EPSILON, a, a, max_iter=ITERATIONS, tol=0, method="log_sinkhorn", grad="autodiff"
        ).value_linear

    found = [
        Variant(OURS, lambda: step(ours)),
        Variant("autograd, logsumexp loop", lambda: step(lambda c, m: log_loop(c, m)[0])),
        Variant("autograd, division loop", lambda: step(lambda c, m: division_loop(c, m)[0])),
    ]
    if settings.peers:
        found.append(Variant("POT ot.batch.solve_batch, autodiff", lambda: step(pot)))
    return found


def divergence(shape: tuple[int, int, int], settings: Settings) -> list[Variant]:
    """Debiased Sinkhorn divergence of two clouds, and its gradient by the points."""
    generator = torch.Generator(device=settings.device).manual_seed(0)
    x = torch.rand(shape, generator=generator, device=settings.device).requires_grad_()
    y = torch.rand(shape, generator=generator, device=settings.device)
    options = {"p": 2, "blur": BLUR, "scaling": SCALING, "diameter": DIAMETER}

    def step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
        return Step(lambda: torch.autograd.grad(loss(x, y).sum(), x))

    def ours(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return kd.sinkhorn_divergence(x, y, **options)

    def geomloss(backend: str) -> Step:
        if backend == "online":
            _module("pykeops")
        return step(_module("geomloss").SamplesLoss("sinkhorn", backend=backend, **options))

    def flash() -> Step:
        if settings.device != "cuda":
            raise MissingPeerError("flash-sinkhorn runs on CUDA tensors only")
        # Its own cost is |x - y|^2 without the half, and it is biased by default.
        return step(
            _module("flash_sinkhorn").SamplesLoss(
                "sinkhorn", debias=True, half_cost=True, **options
            )
        )

    found = [Variant(OURS, lambda: step(ours))]
    if settings.peers:
        found += [
            Variant("GeomLoss, tensorized", functools.partial(geomloss, "tensorized")),
            Variant("GeomLoss, online (KeOps)", functools.partial(geomloss, "online")),
            Variant("flash-sinkhorn", flash),
        ]
    return found


def by_sort(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The published universal logit distillation: sort both rows of probabilities."""
    p = student.softmax(-1).sort(-1, descending=True).values
    q = teacher.softmax(-1).sort(-1, descending=True).values
    return (p - q).abs().sum(-1).mean()


def sorted_rows(shape: tuple[int, int], dtype: torch.dtype, settings: Settings) -> list[Variant]:
    """Loss and gradient between sorted rows of one vocabulary size."""
    student, teacher = make_logits(shape, dtype, settings.device)

    def step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
        return Step(lambda: torch.autograd.grad(loss(student, teacher), student))

    return [
        Variant(OURS, lambda: step(kd.sorted_transport)),
        Variant("torch.sort", lambda: step(by_sort)),
    ]
