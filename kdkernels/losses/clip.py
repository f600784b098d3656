"""TinyCLIP's affinity mimicking and the terms of CLIP-KD."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.contrastive import contrastive
from ..functional.relation import relation
from .needed import needed, pair, projector
from .registry import register

_PAIR = "a pair (image, text)"


@register(
    "tinyclip",
    paper="Wu et al., TinyCLIP: CLIP Distillation via Affinity Mimicking, ICCV 2023",
    family="relation",
    status="source",
)
class TinyCLIPLoss(nn.Module):
    """Cross entropy of the student's image-text map with the teacher's, averaged both ways."""

    def forward(
        self,
        student: tuple[Tensor, Tensor],  # image and text (N, d)
        teacher: tuple[Tensor, Tensor],
        labels: Tensor | None = None,
        *,
        student_scale: float | Tensor | None = None,
        teacher_scale: float | Tensor | None = None,
    ) -> Tensor:
        return relation(
            pair(student, "student", 2, _PAIR),
            pair(teacher, "teacher", 2, _PAIR),
            "softmax_cross_entropy",
            both_directions=True,
            student_scale=needed(student_scale, "student_scale", "tinyclip"),
            teacher_scale=needed(teacher_scale, "teacher_scale", "tinyclip"),
        )


@register(
    "clip_kd",
    paper="Yang et al., CLIP-KD: An Empirical Study of CLIP Model Distillation, CVPR 2024",
    family="relation",
    status="source",
)
class CLIPKDLoss(nn.Module):
    """Weighted sum of CLIP-KD's terms; each one alone is registered under its own name.

    ckd: KL of the image-text maps; icl: InfoNCE of student against teacher embeddings; fd: MSE of
    unit embeddings; gd: MSE of the gradients of the CLIP loss with respect to the embeddings (as
    released divided by the scale; holds N x N maps); cross_kd: KL of the student-teacher maps; afd:
    CLIP loss of fused embeddings, whose scale is used without exponential as released.
    """

    def __init__(
        self,
        ckd: float = 1.0,
        icl: float = 1.0,
        fd: float = 2000.0,
        gd: float = 0.0,
        cross_kd: float = 0.0,
        afd: float = 0.0,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ):
        super().__init__()
        self.weights = {
            "ckd": ckd,
            "icl": icl,
            "fd": fd,
            "gd": gd,
            "cross_kd": cross_kd,
            "afd": afd,
        }
        self.image_projector = projector(student_dim, teacher_dim)
        self.text_projector = projector(student_dim, teacher_dim)
        if afd:
            if student_dim is None:
                raise ValueError("student_dim, teacher_dim: afd needs both for its fusion")
            # Both sides' embeddings have the teacher's width by then.
            self.image_fusion = nn.Linear(2 * teacher_dim, teacher_dim)
            self.text_fusion = nn.Linear(2 * teacher_dim, teacher_dim)
            self.fusion_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        student: tuple[Tensor, Tensor],  # image and text (N, d_s)
        teacher: tuple[Tensor, Tensor],  # image and text (N, d_t)
        labels: Tensor | None = None,
        *,
        student_scale: float | Tensor | None = None,
        teacher_scale: float | Tensor | None = None,
        cross_scale: float | Tensor | None = None,
    ) -> Tensor:
        image, text = pair(student, "student", 2, _PAIR)
        other = tuple(F.normalize(x, dim=-1) for x in pair(teacher, "teacher", 2, _PAIR))
        own = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        if self.image_projector is not None:
            mapped = (
                F.normalize(self.image_projector(image), dim=-1),
                F.normalize(self.text_projector(text), dim=-1),
            )
        else:
            mapped = own
        terms = {
            "ckd": lambda: self._ckd(own, other, student_scale, teacher_scale),
            "icl": lambda: self._icl(mapped, other, cross_scale),
            "fd": lambda: F.mse_loss(mapped[0], other[0]) + F.mse_loss(mapped[1], other[1]),
            "gd": lambda: self._gd(mapped, other, student_scale, teacher_scale),
            "cross_kd": lambda: self._cross_kd(mapped, other, teacher_scale, cross_scale),
            "afd": lambda: self._afd(mapped, other),
        }
        return sum(weight * terms[name]() for name, weight in self.weights.items() if weight)

    @staticmethod
    def _ckd(own, other, student_scale, teacher_scale):
        return relation(
            own,
            other,
            both_directions=True,
            student_scale=needed(student_scale, "student_scale", "ckd"),
            teacher_scale=needed(teacher_scale, "teacher_scale", "ckd"),
        )

    @staticmethod
    def _icl(own, other, scale):
        scale = needed(scale, "cross_scale", "icl")
        rows = contrastive(own[0], other[1], scale=scale)
        return (rows + contrastive(own[1], other[0], scale=scale)) / 2

    @staticmethod
    def _cross_kd(own, other, teacher_scale, cross_scale):
        scales = {
            "student_scale": needed(cross_scale, "cross_scale", "cross_kd"),
            "teacher_scale": needed(teacher_scale, "teacher_scale", "cross_kd"),
        }
        rows = relation((own[0], other[1]), other, **scales)
        return (rows + relation((own[1], other[0]), other[::-1], **scales)) / 2

    @staticmethod
    def _gd(own, other, student_scale, teacher_scale):
        def gradients(side, scale):
            out = []
            for p, k in (side, side[::-1]):
                excess = (scale * p @ k.T).softmax(-1) - torch.eye(len(p), device=p.device)
                out += [excess @ k / scale / len(p), excess.T @ p / scale / len(p)]
            return out

        student = gradients(own, needed(student_scale, "student_scale", "gd"))
        teacher = gradients(other, needed(teacher_scale, "teacher_scale", "gd"))
        return sum(F.mse_loss(a, b.detach()) for a, b in zip(student, teacher))

    def _afd(self, own, other):
        image = F.normalize(self.image_fusion(torch.cat([own[0], other[0]], -1)), dim=-1)
        text = F.normalize(self.text_fusion(torch.cat([own[1], other[1]], -1)), dim=-1)
        return contrastive(image, text, scale=self.fusion_scale, symmetric=True)


def _term(name: str) -> None:
    """Registers one term of CLIP-KD alone, with weight 1."""

    class Term(CLIPKDLoss):
        __doc__ = f"CLIP-KD's term {name} alone, with weight 1."

        def __init__(self, student_dim: int | None = None, teacher_dim: int | None = None):
            none = dict.fromkeys(("ckd", "icl", "fd", "gd", "cross_kd", "afd"), 0.0)
            none[name] = 1.0
            super().__init__(**none, student_dim=student_dim, teacher_dim=teacher_dim)

    Term.__name__ = Term.__qualname__ = f"CLIPKD_{name}Loss"
    register(name, paper="Yang et al., CLIP-KD, CVPR 2024", family="relation")(Term)


for _name in ("ckd", "icl", "fd", "gd", "cross_kd", "afd"):
    _term(_name)
