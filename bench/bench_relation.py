"""Relation cases: setup functions and byte counts, nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import kdkernels as kd

from . import peers, relation_peers
from .harness import Case, Settings, Step, Variant

OURS = "kdkernels"


def cases(settings: Settings) -> list[Case]:
    """All cases for the device; `quick` shrinks them to a smoke test."""
    if settings.quick:
        heads, tokens, wide, batch, vocabulary = 2, 128, 256, 128, 512
        hidden, corner = (256, 64), 24
    elif settings.device == "cuda":
        heads, tokens, wide, batch, vocabulary = 16, 8192, 16384, 32768, 128256
        hidden, corner = (65536, 4096), 512
    else:
        heads, tokens, wide, batch, vocabulary = 12, 2048, 4096, 4096, 128256
        hidden, corner = (8192, 1024), 256
    width = 128 if settings.device == "cuda" and not settings.quick else 64
    shape = (heads, tokens, width)
    video = (1, 3600 if not settings.quick else 150, 768 if not settings.quick else 32)

    def case(
        name: str,
        shape: tuple[int, ...],
        setup: Callable,
        maps: tuple[int, int],
        dtype: torch.dtype = torch.float32,
    ) -> Case:
        # No byte count: the work is bound by its products. Memory is counted in maps of one side.
        return Case(
            name,
            shape=shape,
            dtype=dtype,
            setup=functools.partial(setup, shape, settings),
            unit_bytes=4 * maps[0] * maps[1],
        )

    return [
        case("relation softmax_kl loss+gradient", shape, softmax_kl, (heads * tokens, tokens)),
        case(
            "relation softmax_kl bfloat16 loss+gradient",
            shape,
            softmax_kl_half,
            (heads * tokens, tokens),
            torch.bfloat16,
        ),
        case("relation margin_l1 loss+gradient", video, margin_l1, (video[1], video[1])),
        case("relation mse loss+gradient", (1, wide, 256), mse, (wide, wide)),
        case("relation gram_row_l2 loss+gradient", (1, wide, 256), gram_row_l2, (wide, wide)),
        case("relation gram_row_l1 loss+gradient", (1, wide, 256), gram_row_l1, (wide, wide)),
        case("relation distance loss+gradient", (1, wide, 256), distance, (wide, wide)),
        case("relation angle loss+gradient", (1, corner, 128), angle, (corner, corner**2)),
        case("contrastive loss+gradient", (batch, 128), info_nce, (batch, batch)),
        case("plackett_luce loss+gradient", (16, vocabulary), plackett_luce, (16, vocabulary)),
        case("feature cosine loss+gradient", hidden, feature_cosine, hidden),
        case("feature layer_norm smooth_l1 loss+gradient", hidden, feature_smooth_l1, hidden),
    ]


def make_tokens(shape: tuple[int, ...], device: str, width: int | None = None):
    """(student that requires grad, teacher of `width`), standard normal."""
    generator = torch.Generator(device=device).manual_seed(0)
    teacher_shape = (*shape[:-1], width or shape[-1])
    student = torch.empty(shape, device=device).normal_(generator=generator)
    teacher = torch.empty(teacher_shape, device=device).normal_(generator=generator)
    return student.requires_grad_(), teacher


def _variants(
    ours: Callable,
    eager: Callable,
    student: torch.Tensor,
    teacher: torch.Tensor,
    settings: Settings,
    peer: peers.Peer | None = None,
) -> list[Variant]:
    def step(loss: Callable) -> Step:
        return Step(lambda: torch.autograd.grad(loss(student, teacher), student))

    found = [Variant(OURS, lambda: step(ours)), Variant("eager", lambda: step(eager))]
    if not settings.quick:
        found.append(Variant("torch.compile(eager)", lambda: step(peers.compiled(eager))))
    if settings.peers and peer is not None:
        found.append(Variant(peer.name, lambda: step(peer.load()), note=peer.note))
    return found


def softmax_kl(
    shape: tuple[int, ...], settings: Settings, dtype: torch.dtype = torch.float32
) -> list[Variant]:
    """MiniLM: KL of softmax(X X^T / sqrt d)."""

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        maps = [x @ x.mT / x.shape[-1] ** 0.5 for x in (student, teacher)]
        log_q, log_p = (m.log_softmax(-1) for m in maps)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()

    student, teacher = (x.detach().to(dtype) for x in make_tokens(shape, settings.device))
    student.requires_grad_()
    return _variants(kd.relation, eager, student, teacher, settings)


def softmax_kl_half(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """The same of bfloat16 tokens."""
    return softmax_kl(shape, settings, torch.bfloat16)


def margin_l1(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """VideoREPA: cosine relations of all tokens of a clip."""

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.relation(student, teacher, "margin_l1", similarity="cosine", margin=0.1)

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        maps = [F.normalize(x, dim=-1) for x in (student, teacher)]
        maps = [x @ x.mT for x in maps]
        return ((maps[0] - maps[1]).abs() - 0.1).relu().mean()

    student, teacher = make_tokens(shape, settings.device)
    return _variants(ours, eager, student, teacher, settings)


def mse(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """Gram MSE of cosines: an exact d x d form."""

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.relation(student, teacher, "mse", similarity="cosine")

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        units = [F.normalize(x, dim=-1) for x in (student, teacher)]
        return F.mse_loss(*(x @ x.mT for x in units))

    student, teacher = make_tokens(shape, settings.device)
    return _variants(ours, eager, student, teacher, settings)


def gram_row_l2(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """Similarity preserving: row-normalised Grams, an exact d x d form."""

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.relation(student, teacher, "gram_row_l2")

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(*(F.normalize(x @ x.mT, dim=-1) for x in (student, teacher)))

    student, teacher = make_tokens(shape, settings.device)
    peer = relation_peers.similarity_preserving()
    return _variants(ours, eager, student, teacher, settings, peer)


def gram_row_l1(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """Probabilistic knowledge transfer (PKT)."""

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.relation(student, teacher, "gram_row_l1", similarity="cosine")

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        maps = [F.normalize(x, dim=-1) for x in (student, teacher)]
        maps = [(x @ x.mT + 1) / 2 for x in maps]
        q, p = (m / m.sum(-1, keepdim=True) for m in maps)
        return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()

    student, teacher = make_tokens(shape, settings.device)
    peer = relation_peers.probabilistic_transfer()
    return _variants(ours, eager, student, teacher, settings, peer)


def distance(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """Relational knowledge distillation, distances."""

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.relation(student, teacher, "distance")

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        maps = []
        for x in (student, teacher):
            square = (x * x).sum(-1)
            gaps = square[..., None] + square[..., None, :] - 2 * x @ x.mT
            gaps = gaps.clamp(min=1e-12).sqrt() * (1 - torch.eye(x.shape[-2], device=x.device))
            maps.append(gaps / (gaps.sum() / (gaps > 0).sum()))
        return F.smooth_l1_loss(*maps)

    student, teacher = make_tokens(shape, settings.device)
    peer = relation_peers.relational(1.0, 0.0)
    return _variants(ours, eager, student, teacher, settings, peer)


def angle(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """Relational knowledge distillation, angles: N^3 of them."""

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.relation(student, teacher, "angle")

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        units = [F.normalize(x[0][None] - x[0][:, None], dim=-1) for x in (student, teacher)]
        return F.smooth_l1_loss(*(x @ x.mT for x in units))

    student, teacher = make_tokens(shape, settings.device)
    peer = relation_peers.relational(0.0, 1.0)
    return _variants(ours, eager, student, teacher, settings, peer)


def info_nce(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """InfoNCE of unit rows at temperature 0.07."""

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        units = [F.normalize(x, dim=-1) for x in (student, teacher)]
        return kd.contrastive(*units, scale=1 / 0.07)

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        units = [F.normalize(x, dim=-1) for x in (student, teacher)]
        logits = units[0] @ units[1].T / 0.07
        return F.cross_entropy(logits, torch.arange(logits.shape[0], device=logits.device))

    student, teacher = make_tokens(shape, settings.device)
    return _variants(ours, eager, student, teacher, settings)


def plackett_luce(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """Plackett-Luce over the vocabulary; the order is given."""
    student, teacher = make_tokens(shape, settings.device)
    order = teacher.argsort(dim=-1, descending=True)
    weights = teacher.softmax(-1).gather(-1, order)

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.plackett_luce(student, order, weights)

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        ordered = student.gather(-1, order)
        suffix = ordered.flip(-1).logcumsumexp(-1).flip(-1)
        return ((suffix - ordered) * weights).sum(-1).mean()

    return _variants(ours, eager, student, teacher, settings)


def feature_cosine(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """1 - cos of hidden states; 4 reads and 1 write of a side."""

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.feature(student, teacher, "cosine")

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()

    student, teacher = make_tokens(shape, settings.device)
    return _variants(ours, eager, student, teacher, settings)


def feature_smooth_l1(shape: tuple[int, ...], settings: Settings) -> list[Variant]:
    """Smooth L1 of layer-normalised hidden states."""

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.feature(student, teacher, "smooth_l1", normalize="layer_norm")

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return F.smooth_l1_loss(*(F.layer_norm(x, x.shape[-1:]) for x in (student, teacher)))

    student, teacher = make_tokens(shape, settings.device)
    return _variants(ours, eager, student, teacher, settings)
