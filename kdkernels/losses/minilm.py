"""MiniLM and MiniLMv2: relations of queries, keys and values."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional.relation import relation
from .needed import pair
from .registry import register

_QKV = "a triple (query, key, value)"


@register(
    "minilm",
    paper="Wang et al., MiniLM: Deep Self-Attention Distillation, NeurIPS 2020",
    family="relation",
    status="secondary",
)
class MiniLMLoss(nn.Module):
    """attention_weight KL of softmax(q k^T / sqrt d) + value_weight KL of softmax(v v^T / sqrt d),
    teacher to student, mean over heads and valid rows of each sequence, then over sequences."""

    def __init__(self, attention_weight: float = 0.5, value_weight: float = 0.5):
        super().__init__()
        self.attention_weight = attention_weight
        self.value_weight = value_weight

    def forward(
        self,
        student: tuple[Tensor, Tensor, Tensor],  # each (B, A, S, d)
        teacher: tuple[Tensor, Tensor, Tensor],  # each (B, A, S, d')
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,  # (B, S)
    ) -> Tensor:
        s, t = pair(student, "student", 3, _QKV), pair(teacher, "teacher", 3, _QKV)
        options = {"mask": mask, "normalization": "sequence"}
        attention = relation(s[:2], t[:2], **options)
        return self.attention_weight * attention + self.value_weight * relation(
            s[2], t[2], **options
        )


@register(
    "minilmv2",
    paper="Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, ACL 2021",
    family="relation",
    status="source",
)
class MiniLMv2Loss(nn.Module):
    """Weighted KL of softmax(X_m X_n^T / sqrt d_r), heads regrouped; 1 query, 2 key, 3 value."""

    def __init__(
        self,
        relation_heads: int | None = None,
        relations: dict[tuple[int, int], float] | None = None,
    ):
        super().__init__()
        self.relation_heads = relation_heads
        self.relations = relations or {(i, i): 1 / 3 for i in (1, 2, 3)}
        for m, n in self.relations:
            if m not in (1, 2, 3) or n not in (1, 2, 3):
                raise ValueError(f"relations: keys are pairs of 1, 2, 3, got {(m, n)}")

    def forward(
        self,
        student: tuple[Tensor, Tensor, Tensor],  # each (B, S, hidden)
        teacher: tuple[Tensor, Tensor, Tensor],  # each (B, S, hidden')
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,  # (B, S)
    ) -> Tensor:
        s, t = pair(student, "student", 3, _QKV), pair(teacher, "teacher", 3, _QKV)

        def of(side: tuple[Tensor, ...], m: int, n: int):
            return side[m - 1] if m == n else (side[m - 1], side[n - 1])

        return sum(
            weight
            * relation(
                of(s, m, n),
                of(t, m, n),
                relation_heads=self.relation_heads,
                mask=mask,
                normalization="sequence",
            )
            for (m, n), weight in self.relations.items()
        )
