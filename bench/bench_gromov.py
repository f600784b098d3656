"""Graph-on-logits and Gromov-Wasserstein cases: setup functions and byte counts, nothing else."""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

import kdkernels as kd

from .bench_divergence import OURS, gradient_step, logits_bytes
from .harness import Case, MissingPeerError, Settings, Step, Variant

K = 10


def cases(settings: Settings) -> list[Case]:
    """All cases for the device; `quick` shrinks them to a smoke test."""
    if settings.quick:
        shape, nodes, points = (2, 8, 4096), (8, 12), 200
    elif settings.device == "cuda":
        shape, nodes, points = (8, 512, 151936), (32, 128), 10000
    else:
        shape, nodes, points = (2, 64, 151936), (32, 128), 2000
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        tensor = logits_bytes((shape[0] * shape[1], shape[2]), dtype)
        bind = functools.partial(functools.partial, shape=shape, dtype=dtype, settings=settings)
        make = functools.partial(Case, shape=shape, dtype=dtype, unit_bytes=tensor)
        found += [
            # read student + read teacher
            make("graph_on_logits loss", setup=bind(graph_value), bytes=2 * tensor),
            # read student + read teacher; read student + write gradient
            make("graph_on_logits loss+gradient", setup=bind(graph_gradient), bytes=4 * tensor),
        ]
    for n in nodes:
        found.append(
            Case(
                "gromov_wasserstein",
                shape=(n, n),
                dtype=torch.float64,
                setup=functools.partial(couplings, n, settings),
                # sorts and an assignment: not bound by traffic
                bytes=None,
            )
        )
    found.append(
        Case(
            "sliced_gromov_wasserstein",
            shape=(points, 16),
            dtype=torch.float32,
            setup=functools.partial(sliced, points, settings),
            bytes=None,  # 50 sorts
        )
    )
    return found


def make_sequences(shape, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher), each (B, T, V), std 3."""
    generator = torch.Generator(device=device).manual_seed(0)
    return tuple(
        torch.empty(shape, dtype=dtype, device=device).normal_(0, 3, generator=generator)
        for _ in range(2)
    )


def plain(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The formula as one writes it: z-scores of the whole vocabulary, topk, the k x k graph."""

    def features(logits: torch.Tensor) -> torch.Tensor:
        x = logits.float()
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-6)
        z = x.topk(K, dim=-1).values
        graph = z.mT @ z / z.shape[-2]
        return graph.mean(-1).sort(dim=-1, descending=True).values

    return (features(student) - features(teacher)).abs().sum(-1).mean()


def graph_value(shape, dtype: torch.dtype, settings: Settings) -> list[Variant]:
    """The loss alone, beside the parts that any way of computing it contains."""
    student, teacher = make_sequences(shape, dtype, settings.device)
    both = (student, teacher)
    return [
        Variant(OURS, lambda: Step(lambda: kd.graph_on_logits(student, teacher, k=K))),
        Variant("PyTorch formula", lambda: Step(lambda: plain(student, teacher))),
        Variant("torch.topk alone", lambda: Step(lambda: [x.topk(K, dim=-1) for x in both])),
        Variant("one read (sum)", lambda: Step(lambda: [x.sum() for x in both])),
    ]


def graph_gradient(shape, dtype: torch.dtype, settings: Settings) -> list[Variant]:
    """Loss and gradient to the student's logits."""
    student, teacher = make_sequences(shape, dtype, settings.device)
    student.requires_grad_()
    ours = functools.partial(kd.graph_on_logits, k=K)
    return [
        Variant(OURS, lambda: gradient_step(ours, (student, teacher))),
        Variant("PyTorch formula", lambda: gradient_step(plain, (student, teacher))),
    ]


def couplings(n: int, settings: Settings) -> list[Variant]:
    """Certified bounds of GW_2^2 between two semidefinite matrices; POT's solvers find a coupling
    (an upper bound), which is another question: they stand beside ours, not against them."""
    generator = torch.Generator().manual_seed(0)
    c, d = (
        x @ x.mT for x in torch.randn(2, n, n, generator=generator, dtype=torch.float64) / n**0.5
    )
    c, d = c.to(settings.device), d.to(settings.device)

    def ours(method: str) -> Variant:
        call = functools.partial(kd.gromov_wasserstein, c, d, method=method)
        return Variant(f"{OURS}, {method}", lambda: Step(call))

    def interval() -> Step:
        return Step(lambda: kd.gromov_wasserstein(c, d, return_bounds=True))

    found = [ours(m) for m in ("first_lower_bound", "third_lower_bound", "sorted")]
    found.append(Variant(f"{OURS}, interval", interval))
    if settings.peers:
        found.append(Variant("POT, gw2", lambda: pot(c, d), note="a local optimum, on CPU"))
    return found


def pot(c: torch.Tensor, d: torch.Tensor) -> Step:
    """POT's conditional gradient from its default start."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gromov = importlib.import_module("ot.gromov")
    except ImportError as error:
        raise MissingPeerError(f"POT is not installed ({error})") from error
    one, other = c.cpu().numpy(), d.cpu().numpy()
    return Step(lambda: gromov.gromov_wasserstein2(one, other))


def sliced(points: int, settings: Settings) -> list[Variant]:
    """50 lines, points far from the origin; the peer is the published raw-moment formula, which is
    as fast to write and wrong at this offset in float32."""
    generator = torch.Generator(device=settings.device).manual_seed(0)
    x, y = (
        torch.randn(points, 16, device=settings.device, generator=generator) + 100 for _ in range(2)
    )
    directions = torch.randn(50, 16, device=settings.device, generator=generator)
    directions /= directions.norm(dim=-1, keepdim=True)
    ours = functools.partial(kd.sliced_gromov_wasserstein, projections=directions)

    def raw(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        u = (x @ directions.mT).sort(dim=0).values
        v = (y @ directions.mT).sort(dim=0).values
        return torch.minimum(moments(u, v), moments(u, v.flip(0))).mean()

    return [
        Variant(OURS, lambda: Step(lambda: ours(x, y))),
        Variant("raw moments", lambda: Step(lambda: raw(x, y)), note="wrong far from the origin"),
    ]


def moments(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """mean over i, j of ((x_i - x_j)^2 - (y_i - y_j)^2)^2 from raw moments (n, L)."""
    n = x.shape[0]
    sums = {(i, j): (x**i * y**j).sum(0) for i in range(5) for j in range(5) if i + j <= 4}

    def own(a, b, c, d):
        return 2 * n * d - 8 * c * a + 6 * b * b

    cross = 2 * sums[2, 0] * sums[0, 2] + 2 * (
        n * sums[2, 2]
        - 2 * sums[0, 1] * sums[2, 1]
        - 2 * sums[1, 0] * sums[1, 2]
        + 2 * sums[1, 1] ** 2
    )
    same_x = own(sums[1, 0], sums[2, 0], sums[3, 0], sums[4, 0])
    same_y = own(sums[0, 1], sums[0, 2], sums[0, 3], sums[0, 4])
    return (same_x + same_y - 2 * cross) / n**2
