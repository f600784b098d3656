"""Pointwise feature losses by name: hidden states, layer selection, filters, poolings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.feature import Projector, feature, match_layers
from .needed import needed, projector
from .registry import register


class _FeatureLoss(nn.Module):
    """Mean over layers of kd.feature; the student is projected where widths are given."""

    kind = "mse"

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        index: Tensor | None = None,
        layers: str | None = None,
        **options: float,
    ):
        super().__init__()
        self.projector = projector(student_dim, teacher_dim)
        self.register_buffer("index", index)
        self.layers, self.options = layers, options

    def _one(self, student: Tensor, teacher: Tensor, **options) -> Tensor:
        return feature(student, teacher, self.kind, **self.options, **options)

    def forward(
        self,
        student: Tensor | list[Tensor],  # [..., d] or one a layer
        teacher: Tensor | list[Tensor],
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,  # [...]
    ) -> Tensor:
        s = list(student) if isinstance(student, (list, tuple)) else [student]
        t = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
        if self.projector is not None:
            s = [self.projector(x) for x in s]
        if self.index is not None:
            t = [x.index_select(-1, self.index) for x in t]
        if self.layers is None:
            if len(s) != len(t):
                raise ValueError(
                    f"layers: {len(s)} student and {len(t)} teacher layers need a rule of "
                    "kd.match_layers"
                )
            matches = [(i, i, 1.0) for i in range(len(s))]
        else:
            matches = match_layers(s, t, self.kind, self.layers, mask=mask)
        return sum(w * self._one(s[i], t[j], mask=mask) for i, j, w in matches) / len(s)


@register("hidden_mse", aliases=("mse",), family="feature", status="-")
class HiddenMSELoss(_FeatureLoss):
    """Mean squared difference of hidden states, mean over layers."""

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        index: Tensor | None = None,
        layers: str | None = None,
    ):
        super().__init__(student_dim, teacher_dim, index, layers)


def _named(name: str, cls_name: str, option: str | None, text: str, default: float) -> type:
    if option == "beta":

        def init(self, student_dim=None, teacher_dim=None, index=None, layers=None, beta=default):
            _FeatureLoss.__init__(self, student_dim, teacher_dim, index, layers, beta=beta)

    elif option == "margin":

        def init(self, student_dim=None, teacher_dim=None, index=None, layers=None, margin=default):
            _FeatureLoss.__init__(self, student_dim, teacher_dim, index, layers, margin=margin)

    else:

        def init(self, student_dim=None, teacher_dim=None, index=None, layers=None):
            _FeatureLoss.__init__(self, student_dim, teacher_dim, index, layers)

    body = {"kind": name, "__init__": init, "__doc__": text, "__module__": __name__}
    return register(name, family="feature", status="-")(type(cls_name, (_FeatureLoss,), body))


SmoothL1Loss = _named("smooth_l1", "SmoothL1Loss", "beta", "Smooth L1 of hidden states.", 1.0)
L1Loss = _named("l1", "L1Loss", None, "L1 of hidden states.", 0.0)
CosineLoss = _named("cosine", "CosineLoss", None, "1 - cos of hidden states.", 0.0)
MarginCosineLoss = _named(
    "margin_cosine", "MarginCosineLoss", "margin", "max(1 - margin - cos, 0).", 0.0
)
LogSigmoidCosineLoss = _named(
    "log_sigmoid_cosine", "LogSigmoidCosineLoss", None, "-log sigmoid(cos).", 0.0
)
NormalizedMSELoss = _named(
    "normalized_mse", "NormalizedMSELoss", None, "Squared distance of unit vectors.", 0.0
)


@register("masked_mse", family="feature", status="-")
class MaskedMSELoss(nn.Module):
    """Mean of weight (s - t)^2; the weight has the leading or the full shape and may be learned."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        return feature(student, teacher, "mse", weight=needed(weight, "weight", "masked_mse"))


@register("layer_selection", aliases=("mlkd_ood",), family="feature")
class LayerSelectionLoss(nn.Module):
    """Per token and student layer the `keep` smallest distances over the teacher's layers, times a
    learned weight of the student layer (1 at first), summed, mean over tokens."""

    def __init__(
        self,
        student_layers: int,
        keep: int = 2,
        kind: str = "mse",
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ):
        super().__init__()
        if kind not in ("mse", "l1", "smooth_l1", "cosine"):
            raise ValueError(f"kind: expected mse, l1, smooth_l1 or cosine, got {kind!r}")
        self.keep, self.kind = keep, kind
        self.layer_weight = nn.Parameter(torch.ones(student_layers))
        self.projector = projector(student_dim, teacher_dim)

    def forward(
        self,
        student: list[Tensor],  # each [..., d]
        teacher: list[Tensor],
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        if len(student) != self.layer_weight.numel():
            raise ValueError(
                f"student: expected {self.layer_weight.numel()} layers, got {len(student)}"
            )
        if not 1 <= self.keep <= len(teacher):
            raise ValueError(f"keep: expected 1 to {len(teacher)}, got {self.keep}")
        total = 0.0
        for weight, s in zip(self.layer_weight, student):
            if self.projector is not None:
                s = self.projector(s)
            distances = []
            for t in teacher:
                value = feature(s, t, self.kind, reduction="none")
                distances.append(value.mean(-1) if value.dim() == s.dim() else value)
            nearest = torch.stack(distances, -1).topk(self.keep, largest=False).values
            total = total + weight * nearest.sum(-1)
        if mask is None:
            return total.mean()
        return torch.where(mask, total, 0.0).sum() / mask.sum().clamp(min=1)


@register(
    "ted",
    paper="Liang et al., Less is More: Task-aware Layer-wise Distillation, ICML 2023",
    family="feature",
)
class TEDLoss(nn.Module):
    """Mean over layers of MSE(filter_s(h_s), sg filter_t(h_t)); filters are linear maps."""

    def __init__(self, student_dim: int, teacher_dim: int, filter_dim: int, layers: int = 1):
        super().__init__()
        self.student_filters = nn.ModuleList(
            nn.Linear(student_dim, filter_dim) for _ in range(layers)
        )
        self.teacher_filters = nn.ModuleList(
            nn.Linear(teacher_dim, filter_dim) for _ in range(layers)
        )

    def forward(
        self,
        student: Tensor | None = None,
        teacher: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_hidden: list[Tensor] | None = None,
        teacher_hidden: list[Tensor] | None = None,
    ) -> Tensor:
        s = needed(student_hidden, "student_hidden", "ted")
        t = needed(teacher_hidden, "teacher_hidden", "ted")
        if len(s) != len(self.student_filters) or len(t) != len(s):
            raise ValueError(f"student_hidden: expected {len(self.student_filters)} layers a side")
        parts = zip(self.student_filters, s, self.teacher_filters, t)
        return sum(feature(f(a), g(b).detach()) for f, a, g, b in parts) / len(s)


@register(
    "unic",
    paper="Sariyildiz et al., UNIC: Universal Classification Models via Multi-teacher "
    "Distillation, ECCV 2024",
    family="feature",
)
class UNICLoss(nn.Module):
    """Per teacher and image cosine_weight (1 - cos) + smooth_l1_weight smooth-L1, mean over tokens,
    mean of class token and patches; each teacher but the one with the largest loss is dropped per
    image with `drop_probability` in training; the coefficients are divided by their sum."""

    def __init__(
        self,
        drop_probability: float = 0.5,
        cosine_weight: float = 0.5,
        smooth_l1_weight: float = 0.5,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.drop_probability = drop_probability
        self.cosine_weight, self.smooth_l1_weight = cosine_weight, smooth_l1_weight
        self.generator = generator

    def _per_image(self, s: Tensor, t: Tensor) -> Tensor:
        cosine = feature(s, t, "cosine", reduction="none")
        smooth = feature(s, t, "smooth_l1", reduction="none").mean(-1)
        value = self.cosine_weight * cosine + self.smooth_l1_weight * smooth
        return value.flatten(1).mean(1) if value.dim() > 1 else value

    def forward(
        self,
        student: list[tuple[Tensor, Tensor]],  # per teacher (class [B, d], patches [B, N, d])
        teacher: list[tuple[Tensor, Tensor]],
        labels: Tensor | None = None,
    ) -> Tensor:
        if len(student) != len(teacher) or not student:
            raise ValueError("student: expected one (class, patches) pair a teacher")
        losses = torch.stack(
            [
                (self._per_image(s[0], t[0]) + self._per_image(s[1], t[1])) / 2
                for s, t in zip(student, teacher)
            ]
        )  # (teachers, B)
        kept = torch.ones_like(losses)
        if self.training and self.drop_probability:
            drawn = (
                torch.rand(losses.shape, generator=self.generator, device=losses.device)
                < self.drop_probability
            )
            largest = losses.detach().argmax(0, keepdim=True)
            kept = (~drawn).to(losses.dtype).scatter(0, largest, 1.0)
        return (losses * kept).sum() / kept.sum()


@register(
    "vkd",
    paper="Miles et al., VkD: Improving Knowledge Distillation using Orthogonal "
    "Projections, CVPR 2024",
    family="feature",
)
class VkDLoss(nn.Module):
    """alpha smooth-L1 of the orthogonally projected student and the layer-normalised teacher."""

    def __init__(self, student_dim: int, teacher_dim: int, alpha: float = 1.0):
        super().__init__()
        self.alpha = alpha
        self.projector = Projector(student_dim, teacher_dim, "orthogonal")

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        target = F.layer_norm(teacher.float(), teacher.shape[-1:], eps=1e-5)
        return self.alpha * feature(self.projector(student), target, "smooth_l1")


@register(
    "cat_kd",
    paper="Guo et al., Class Attention Transfer Based Knowledge Distillation, CVPR 2023",
    family="feature",
)
class CATKDLoss(nn.Module):
    """MSE of class activation maps [B, C, H, W] pooled to pool x pool, unit per class."""

    def __init__(self, pool: int = 2, normalize: bool = True):
        super().__init__()
        self.pool, self.normalize = pool, normalize

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        s, t = (F.adaptive_avg_pool2d(x, self.pool).flatten(2) for x in (student, teacher))
        return feature(s, t, "mse", normalize="l2" if self.normalize else None)


@register(
    "repa", paper="Yu et al., Representation Alignment for Generation, ICLR 2025", family="feature"
)
class REPALoss(nn.Module):
    """Minus the mean cosine of tokens [..., d]."""

    def __init__(self, student_dim: int | None = None, teacher_dim: int | None = None):
        super().__init__()
        self.projector = projector(student_dim, teacher_dim)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.projector is not None:
            student = self.projector(student)
        return feature(student, teacher, "cosine") - 1


@register("mmd", family="feature", status="-")
class MMDLoss(nn.Module):
    """Squared maximum mean discrepancy of two samples [N, d], [M, d], diagonals included.

    Kernels: gaussian exp(-|x - y|^2 / (2 bandwidth^2)), laplacian exp(-|x - y| / bandwidth), energy
    -|x - y|, polynomial <x, y>^2 of unit vectors (NST, Huang and Wang, 2017; by |X^T Y|^2, without
    the N x M map). The others take N x M memory.
    """

    def __init__(self, kernel: str = "gaussian", bandwidth: float = 1.0):
        super().__init__()
        if kernel not in ("gaussian", "laplacian", "energy", "polynomial"):
            raise ValueError(
                f"kernel: expected gaussian, laplacian, energy or polynomial, got {kernel!r}"
            )
        self.kernel, self.bandwidth = kernel, bandwidth

    def _mean(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kernel == "polynomial":
            # sum_ij <x_i, y_j>^2 = <X^T X, Y^T Y>
            total = ((x.mT @ x) * (y.mT @ y)).sum((-2, -1))
            return (total / (x.shape[-2] * y.shape[-2])).mean()
        squared = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
        if self.kernel == "gaussian":
            return (-squared / (2 * self.bandwidth**2)).exp().mean()
        near = squared <= 1e-24
        distance = torch.where(near, 0.0, torch.where(near, 1.0, squared).sqrt())
        if self.kernel == "laplacian":
            return (-distance / self.bandwidth).exp().mean()
        return -distance.mean()

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        s, t = student.to(dtype), teacher.to(dtype)
        if self.kernel == "polynomial":
            s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
        return self._mean(s, s) + self._mean(t, t) - 2 * self._mean(s, t)
