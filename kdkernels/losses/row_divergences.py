"""Losses of papers that are one call of `kd.divergence`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.divergence import divergence
from .needed import needed
from .registry import register
from .rows import RowLoss, label_cross_entropy


@register(
    "kd",
    aliases=("hinton",),
    paper="Hinton et al., Distilling the Knowledge in a Neural Network, 2015",
    family="divergence",
)
class KDLoss(nn.Module):
    """alpha tau^2 KL(p, q) + (1 - alpha) cross entropy with the labels at tau 1, one pass.

    class_weight [V] weighs the cross entropy by label as torch does (then a second pass); alpha = 1
    needs no labels.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        temperature: float = 1.0,
        class_weight: Tensor | None = None,
    ):
        super().__init__()
        self.alpha, self.temperature = alpha, temperature
        self.register_buffer("class_weight", class_weight)

    def forward(
        self,
        student: Tensor,  # [..., V]
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        rest = 1 - self.alpha
        if rest:
            labels = needed(labels, "labels", "kd")
        apart = rest != 0 and (self.class_weight is not None or self.alpha == 0)
        loss = 0.0
        if self.alpha:
            loss = divergence(
                student,
                teacher,
                (("forward_kl", self.alpha),),
                temperature=self.temperature,
                temperature_squared=True,
                labels=labels,
                mask=mask,
                num_items=num_items,
                label_weight=0.0 if apart else rest,
            )
        if apart:
            hard = label_cross_entropy(student, labels, mask, num_items, self.class_weight)
            loss = loss + rest * hard
        return loss


@register(
    "soft_cross_entropy",
    aliases=("born_again",),
    paper="Furlanello et al., Born-Again Neural Networks, ICML 2018",
    family="divergence",
    status="secondary",
)
class SoftCrossEntropyLoss(RowLoss):
    """- sum p log q, both at the temperature."""

    kind = "cross_entropy"

    def __init__(self, temperature: float = 1.0):
        super().__init__(temperature=temperature)


@register("entropy", family="divergence", status="-")
class EntropyLoss(RowLoss):
    """- sum q log q of the student; teacher None."""

    kind = "entropy"

    def __init__(self, temperature: float = 1.0):
        super().__init__(temperature=temperature)

    def forward(self, student: Tensor, teacher: None = None, labels: Tensor | None = None, **extra):
        return super().forward(student, teacher, labels, **extra)


@register(
    "gkd",
    aliases=("distillspec",),
    paper="Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024",
    family="divergence",
)
class GKDLoss(RowLoss):
    """Generalised Jensen-Shannon divergence, no tau^2; DistillSpec (Zhou et al., ICLR 2024) also
    takes the kinds forward_kl, reverse_kl and total_variation, which have no beta."""

    def __init__(self, kind: str = "jensen_shannon", beta: float = 0.5, temperature: float = 1.0):
        options = {"beta": beta} if kind == "jensen_shannon" else {}
        super().__init__(temperature=temperature, **options)
        self.kind = kind


@register(
    "context_distillation",
    aliases=("cartridges",),
    paper="Eyuboglu et al., Cartridges, 2025",
    family="divergence",
)
class ContextDistillationLoss(SoftCrossEntropyLoss):
    """Cross entropy with the teacher that sees the context."""


@register(
    "kv_distill",
    paper="Chari et al., KV-Distill, 2025",
    family="divergence",
    status="paper",
)
class KVDistillLoss(RowLoss):
    """w KL(p, q) + (1 - w) KL(q, p) in one pass."""

    def __init__(self, forward_weight: float = 0.6):
        super().__init__()
        self.kind = (("forward_kl", forward_weight), ("reverse_kl", 1 - forward_weight))


@register(
    "llava_mod",
    paper="Shu et al., LLaVA-MoD, ICLR 2025",
    family="divergence",
)
class LLaVAMoDLoss(nn.Module):
    """Cross entropy on the columns that both heads have (at most vocab_size); its preference stage
    is `dpo`."""

    def __init__(self, vocab_size: int | None = None):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        columns = min(student.shape[-1], teacher.shape[-1])
        if self.vocab_size is not None:
            columns = min(columns, self.vocab_size)
        return divergence(
            student,
            teacher,
            "cross_entropy",
            labels=labels,
            mask=mask,
            num_items=num_items,
            vocab_size=columns,
            teacher_vocab_size=columns,
        )


@register(
    "distillm",
    paper="Ko et al., DistiLLM, ICML 2024",
    family="divergence",
)
class DistiLLMLoss(RowLoss):
    """Skew KL; the kind is skew_forward_kl or skew_reverse_kl."""

    def __init__(self, kind: str = "skew_forward_kl", alpha: float = 0.1):
        super().__init__(alpha=alpha)
        self.kind = kind


@register("abkd", paper="Wang et al., ABKD, ICML 2025", family="divergence")
class ABKDLoss(nn.Module):
    """The alpha-beta divergence. compat: the branches of the release on the axes, which lack one
    factor 1 / beta (alpha = 0), 1 / alpha (beta = 0 and alpha + beta = 0) of the limits."""

    def __init__(self, alpha: float = 0.5, beta: float = 0.5, compat: bool = False):
        super().__init__()
        self.alpha, self.beta, self.compat = alpha, beta, compat

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        alpha, beta = self.alpha, self.beta
        value = divergence(
            student, teacher, "alpha_beta", alpha=alpha, beta=beta,
            labels=labels, mask=mask, num_items=num_items,
        )  # fmt: skip
        if not self.compat or (alpha == 0 and beta == 0):
            return value
        if alpha == 0:
            return value * beta
        return value * alpha if beta == 0 or alpha + beta == 0 else value


@register(
    "minillm",
    paper="Gu et al., MiniLLM, ICLR 2024",
    family="divergence",
)
class MiniLLMLoss(RowLoss):
    """KL(q, p): the exact single-step term; returns and clipping are the trainer's."""

    kind = "reverse_kl"

    def __init__(self, temperature: float = 1.0):
        super().__init__(temperature=temperature)


@register(
    "pi_distill",
    paper="pi-Distill (Emilianopp/Privileged-Information-Distillation)",
    family="divergence",
)
class PiDistillLoss(nn.Module):
    """kind "reverse_kl": KL(q, sg p) + (1 - entropy_weight) H(q). kind "joint", the teacher with
    gradient too: alpha KL(p, sg q) + (1 - alpha) KL(sg p, q)."""

    def __init__(self, kind: str = "reverse_kl", entropy_weight: float = 1.0, alpha: float = 0.5):
        super().__init__()
        if kind not in ("reverse_kl", "joint"):
            raise ValueError(f"kind: expected reverse_kl or joint, got {kind!r}")
        self.kind, self.entropy_weight, self.alpha = kind, entropy_weight, alpha

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        rows = {"labels": labels, "mask": mask, "num_items": num_items}
        fixed = teacher.detach()
        if self.kind == "reverse_kl":
            kind = (("reverse_kl", 1.0), ("entropy", 1 - self.entropy_weight))
            return divergence(student, fixed, kind, **rows)
        # Where the roles are swapped, "student" is p and KL(student, teacher) the reverse kind.
        to_student = divergence(teacher, student.detach(), "reverse_kl", **rows)
        to_teacher = divergence(student, fixed, "forward_kl", **rows)
        return self.alpha * to_student + (1 - self.alpha) * to_teacher


@register(
    "hard_label",
    aliases=("deit",),
    paper="Touvron et al., DeiT, ICML 2021; Rangwani et al., DeiT-LT, CVPR 2024",
    family="divergence",
)
class HardLabelLoss(nn.Module):
    """(1 - alpha) CE(class logits, labels) + alpha CE(distillation logits, argmax of the teacher).

    The student is one tensor of logits or a pair (class logits, distillation logits); class_weight
    [V] weighs the second term by the teacher's class.
    """

    def __init__(self, alpha: float = 0.5, class_weight: Tensor | None = None):
        super().__init__()
        self.alpha = alpha
        self.register_buffer("class_weight", class_weight)

    def forward(
        self,
        student: Tensor | tuple[Tensor, Tensor],
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        first, second = student if isinstance(student, (tuple, list)) else (student, student)
        loss = 0.0
        if self.alpha != 1:
            given = needed(labels, "labels", "hard_label")
            loss = (1 - self.alpha) * label_cross_entropy(first, given, mask, num_items)
        target = teacher.argmax(-1)
        if labels is not None:
            target = torch.where(labels == -100, labels, target)
        hard = label_cross_entropy(second, target, mask, num_items, self.class_weight)
        return loss + self.alpha * hard
