"""Contrastive losses by name, and DINO's cross entropy between views."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.contrastive import contrastive
from ..functional.divergence import divergence
from .needed import needed, pair
from .registry import register


@register(
    "contrastive",
    aliases=("info_nce",),
    paper="van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018",
    family="contrastive",
)
class ContrastiveLoss(nn.Module):
    """InfoNCE of student rows against teacher rows at 1 / temperature."""

    def __init__(self, temperature: float = 0.07, symmetric: bool = False, normalize: bool = True):
        super().__init__()
        self.temperature, self.symmetric, self.normalize = temperature, symmetric, normalize

    def forward(
        self,
        student: Tensor,  # (N, d)
        teacher: Tensor,  # (M, d)
        labels: Tensor | None = None,
        *,
        positives: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> Tensor:
        if self.normalize:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
            queue = None if queue is None else F.normalize(queue, dim=-1)
        return contrastive(
            student,
            teacher,
            positives=positives,
            queue=queue,
            symmetric=self.symmetric,
            scale=1.0 / self.temperature,
        )


@register(
    "supervised_contrastive",
    aliases=("supcon",),
    paper="Khosla et al., Supervised Contrastive Learning, NeurIPS 2020",
    family="contrastive",
)
class SupervisedContrastiveLoss(nn.Module):
    """Mean over anchors with a positive of minus the mean log-softmax over all others at the other
    rows of the same label; student [N, d] unit rows."""

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        self.temperature = temperature

    def forward(
        self, student: Tensor, teacher: None = None, labels: Tensor | None = None
    ) -> Tensor:
        return contrastive(
            student,
            student,
            labels=needed(labels, "labels", "supervised_contrastive"),
            exclude_diagonal=True,
            scale=1.0 / self.temperature,
        )


@register(
    "momentum_distillation",
    aliases=("albef",),
    paper="Li et al., Align before Fuse, NeurIPS 2021",
    family="contrastive",
)
class MomentumDistillationLoss(nn.Module):
    """Image rows: cross entropy of student_scale <I_s, [T_t, text queue]> with alpha x the momentum
    teacher's softmax over the same columns + (1 - alpha) x one-hot; text rows likewise; mean."""

    def __init__(self, alpha: float = 0.4):
        super().__init__()
        self.alpha = alpha

    def forward(
        self,
        student: tuple[Tensor, Tensor],  # unit image and text rows (N, d)
        teacher: tuple[Tensor, Tensor],
        labels: Tensor | None = None,
        *,
        student_scale: float | Tensor | None = None,
        queue: tuple[Tensor, Tensor] | None = None,  # (images, texts)
    ) -> Tensor:
        image, text = pair(student, "student", 2, "a pair (image, text)")
        image_t, text_t = (x.detach() for x in pair(teacher, "teacher", 2, "a pair (image, text)"))
        images, texts = (None, None) if queue is None else queue
        scale = needed(student_scale, "student_scale", "momentum_distillation")
        options = {"scale": scale, "label_mix": 1 - self.alpha}
        rows = contrastive(image, text_t, queue=texts, target=(image_t, text_t), **options)
        other = contrastive(text, image_t, queue=images, target=(text_t, image_t), **options)
        return (rows + other) / 2


@register(
    "pixel_contrastive",
    aliases=("pcd",),
    paper="Huang et al., Pixel-Wise Contrastive Distillation, ICCV 2023",
    family="contrastive",
)
class PixelContrastiveLoss(nn.Module):
    """InfoNCE of pixels [B, C, H, W]: the teacher's same pixel is positive, only the queue
    [M, C] is negative."""

    def __init__(self, temperature: float = 0.2):
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        queue: Tensor | None = None,
    ) -> Tensor:
        queue = F.normalize(needed(queue, "queue", "pixel_contrastive").detach(), dim=-1)
        s, t = (F.normalize(x.flatten(2).mT.flatten(0, 1), dim=-1) for x in (student, teacher))
        scale = 1.0 / self.temperature
        own = scale * (s * t.detach()).sum(-1)
        negative = _log_sum_exp(s, queue, scale)
        return (torch.logaddexp(own, negative) - own).mean()


def _log_sum_exp(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """log sum_j exp(scale <q_i, k_j>) of each row: InfoNCE with column 0, plus its logit."""
    first = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
    rows = contrastive(query, key, positives=first, scale=scale, reduction="none")
    return rows + scale * (query * key[0]).sum(-1)


@register(
    "crd",
    paper="Tian et al., Contrastive Representation Distillation, ICLR 2020",
    family="contrastive",
)
class CRDLoss(nn.Module):
    """Noise-contrastive estimation against memory banks of both sides' embeddings.

    `index` [B] are the samples' numbers; the banks follow the embeddings with `momentum` when
    step() is called after the optimiser's step. The normalisers are frozen at the first call's.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        samples: int,
        feature_dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.student_embed = nn.Linear(student_dim, feature_dim)
        self.teacher_embed = nn.Linear(teacher_dim, feature_dim)
        bound = 1.0 / math.sqrt(feature_dim / 3)
        for side in ("student", "teacher"):
            bank = torch.empty(samples, feature_dim)
            bank.uniform_(-bound, bound, generator=generator)
            self.register_buffer(f"{side}_bank", bank)
            self.register_buffer(f"{side}_normaliser", torch.full((), -1.0, dtype=torch.float64))
        self.samples, self.negatives = samples, negatives
        self.temperature, self.momentum, self.generator = temperature, momentum, generator
        self._recorded = None

    def forward(
        self,
        student: Tensor,  # (B, d_s)
        teacher: Tensor,  # (B, d_t)
        labels: Tensor | None = None,
        *,
        index: Tensor | None = None,  # (B,) int64
    ) -> Tensor:
        index = needed(index, "index", "crd")
        v_s = F.normalize(self.student_embed(student.flatten(1)), dim=-1)
        v_t = F.normalize(self.teacher_embed(teacher.flatten(1)), dim=-1)
        drawn = torch.randint(
            self.samples,
            (len(index), self.negatives),
            generator=self.generator,
            device=index.device,
        )
        columns = torch.cat([index[:, None], drawn], 1)
        normalisers, total = [], 0.0
        # Each side's embedding meets the other side's bank.
        for v, bank, known in (
            (v_s, self.teacher_bank, self.student_normaliser),
            (v_t, self.student_bank, self.teacher_normaliser),
        ):
            rows = bank[columns].detach().clone()  # (B, 1 + negatives, feature)
            scores = (torch.einsum("bkf,bf->bk", rows, v) / self.temperature).exp()
            fresh = (scores.detach().mean() * self.samples).double()
            normaliser = torch.where(known > 0, known, fresh)
            normalisers.append(normaliser)
            total = total + self._nce(scores / normaliser.to(scores.dtype))
        self._recorded = (index, v_s.detach(), v_t.detach(), *normalisers)
        return total

    def _nce(self, p: Tensor) -> Tensor:
        noise = self.negatives / self.samples
        positive = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log().sum()
        negative = (noise / (p[:, 1:] + noise + 1e-7)).log().sum()
        return -(positive + negative) / p.shape[0]

    @torch.no_grad()
    def step(self) -> None:
        """Moves the banks to the last call's embeddings and keeps the first normalisers."""
        if self._recorded is None:
            return
        index, v_s, v_t, n_s, n_t = self._recorded
        for bank, v in ((self.student_bank, v_s), (self.teacher_bank, v_t)):
            mixed = self.momentum * bank[index] + (1 - self.momentum) * v.to(bank.dtype)
            bank[index] = F.normalize(mixed, dim=-1)
        self.student_normaliser.copy_(n_s)
        self.teacher_normaliser.copy_(n_t)
        self._recorded = None


@register(
    "dino",
    paper="Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021",
    family="contrastive",
)
class DINOLoss(nn.Module):
    """Mean over pairs of different views of the cross entropy of the student's softmax with the
    teacher's centred, sharpened one. step() moves the centre to the mean of the last call's teacher
    rows; the state is the buffer `center`. centering="sinkhorn": Sinkhorn-Knopp assignments (three
    iterations) are the targets."""

    def __init__(
        self,
        out_dim: int,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
        centering: str = "mean",
    ):
        super().__init__()
        if centering not in ("mean", "sinkhorn"):
            raise ValueError(f"centering: expected mean or sinkhorn, got {centering!r}")
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.center_momentum, self.centering = center_momentum, centering
        self.register_buffer("center", torch.zeros(out_dim))
        self._recorded = None

    def forward(
        self,
        student: list[Tensor],  # views, each (B, out_dim)
        teacher: list[Tensor],  # the first of these views
        labels: Tensor | None = None,
    ) -> Tensor:
        total, pairs = 0.0, 0
        targets = []
        for a in teacher:
            a = a.detach()
            if self.centering == "sinkhorn":
                from ..functional import sinkhorn_assign

                assigned = sinkhorn_assign(a, self.teacher_temperature, 3)
                targets.append(assigned.clamp(min=1e-30).log() * self.teacher_temperature)
            else:
                targets.append(a - self.center.to(a.dtype))
        for u, a in enumerate(targets):
            for v, z in enumerate(student):
                if u == v:
                    continue
                total = total + divergence(
                    z,
                    a,
                    "cross_entropy",
                    temperature=self.student_temperature,
                    teacher_temperature=self.teacher_temperature,
                )
                pairs += 1
        if not pairs:
            raise ValueError("student, teacher: no pair of different views")
        self._recorded = torch.cat([a.detach() for a in teacher]).mean(0)
        return total / pairs

    @torch.no_grad()
    def step(self) -> None:
        if self._recorded is not None and self.centering == "mean":
            self.center.lerp_(self._recorded.to(self.center.dtype), 1 - self.center_momentum)
        self._recorded = None
