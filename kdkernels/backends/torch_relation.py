"""Torch reference of the relation losses: dense maps, float64, gradients by autograd.

The oracle of the tests, and the path of the backend "torch". It holds N x M maps; the kernels of
the other backends never do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .relation_spec import NORM_FLOOR, PKT_EPSILON, SQUARED_FLOOR


def selected_pairs(
    shape: tuple[int, int, int],
    device: torch.device,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    pair_mask: Tensor | None,
    pair_index: Tensor | None,
    row_block: Tensor | None,
    column_block: Tensor | None,
    causal: bool,
    exclude_diagonal: bool,
    block: int,
    diagonal: int,
) -> Tensor:
    """(H, N, M) bool: the conjunction of all that was given."""
    _, rows, columns = shape
    on = torch.ones(shape, dtype=torch.bool, device=device)
    if row_mask is not None:
        on = on & row_mask[:, :, None]
    if column_mask is not None:
        on = on & column_mask[:, None, :]
    if pair_mask is not None:
        on = on & (pair_mask if pair_index is None else pair_mask[pair_index])
    own = torch.arange(rows, device=device)[:, None] + diagonal
    column = torch.arange(columns, device=device)[None, :]
    if causal:
        on = on & (column <= own)
    if exclude_diagonal:
        on = on & (column != own)
    if block:
        same = row_block[:, :, None] == column_block[:, None, :]
        on = on & (same if block == 1 else ~same)
    return on


def _log_softmax(scores: Tensor, on: Tensor) -> Tensor:
    """log-softmax over the selected columns; 0 elsewhere, and in rows that have none."""
    some = on.any(-1, keepdim=True)
    filled = torch.where(on, scores, -torch.inf)
    filled = torch.where(some, filled, torch.zeros_like(filled))
    return torch.where(on, F.log_softmax(filled, -1), torch.zeros_like(filled))


def _unit_rows(scores: Tensor, on: Tensor) -> Tensor:
    return F.normalize(torch.where(on, scores, torch.zeros_like(scores)), dim=-1, eps=NORM_FLOOR)


def _distances(x: Tensor, y: Tensor, own: Tensor) -> Tensor:
    """Euclidean distances; duplicates count as 1e-6 without gradient, the diagonal as 0."""
    squared = (x[:, :, None, :] - y[:, None, :, :]).square().sum(-1)
    near = squared <= SQUARED_FLOOR
    squared = torch.where(near, torch.full_like(squared, SQUARED_FLOOR), squared)
    return torch.where(own, torch.zeros_like(squared), squared.sqrt())


def _per_mean(distance: Tensor, on: Tensor) -> Tensor:
    """Distances over the mean of the positive ones of their graph."""
    positive = (distance > 0) & on
    count = positive.sum((-2, -1), keepdim=True)
    total = torch.where(positive, distance, torch.zeros_like(distance)).sum((-2, -1), keepdim=True)
    mean = total / count.clamp(min=1)
    one = torch.ones_like(mean)
    return torch.where(count > 0, distance / torch.where(count > 0, mean, one), 0.0)


def _element(kind: str, x: Tensor, beta: float, margin: float) -> Tensor:
    if kind == "mse":
        return x.square()
    if kind == "l1":
        return x.abs()
    if kind in ("smooth_l1", "distance", "angle"):
        return F.smooth_l1_loss(x, torch.zeros_like(x), beta=beta, reduction="none")
    if kind == "huber":
        return F.huber_loss(x, torch.zeros_like(x), delta=beta, reduction="none")
    return (x.abs() - margin).clamp(min=0)


def relation_dense(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    scale_s: Tensor,
    scale_t: Tensor | None,
    kind: str,
    on: Tensor,
    *,
    beta: float = 1.0,
    margin: float = 0.0,
    clamp: float | None = None,
    label_mix: float = 0.0,
    diagonal: int = 0,
) -> Tensor:
    """Entries (H, N, M) float64 whose sum over a row is the row value; unselected entries are 0.

    q, k: (H, N, d) and (H, M, d), ready to be multiplied. on: (H, N, M) bool.
    """
    q_s, k_s, scale_s = q_s.double(), k_s.double(), scale_s.double()
    own = torch.arange(on.shape[1], device=on.device)[:, None] + diagonal
    own = own == torch.arange(on.shape[2], device=on.device)[None, :]
    zero = torch.zeros((), dtype=torch.float64, device=on.device)
    if kind == "distance":
        s = _per_mean(_distances(q_s, k_s, own), on)
        t = _per_mean(_distances(q_t.double(), k_t.double(), own), on)
        return torch.where(on, _element(kind, s - t, beta, margin), zero)
    scores_s = scale_s * (q_s @ k_s.mT)
    if clamp is not None:
        scores_s = scores_s.clamp(min=clamp)
    if kind == "log_sum_exp":
        filled = torch.where(on, scores_s, -torch.inf)
        some = on.any(-1, keepdim=True)
        lse = torch.where(some, filled, torch.zeros_like(filled)).logsumexp(-1, keepdim=True)
        first = on & (on.cumsum(-1) == 1)
        return torch.where(first, lse, zero)
    scores_t = scale_t.double() * (q_t.double() @ k_t.double().mT)
    if clamp is not None:
        scores_t = scores_t.clamp(min=clamp)
    if kind.startswith("softmax"):
        log_q, log_p = _log_softmax(scores_s, on), _log_softmax(scores_t, on)
        p, q = log_p.exp(), log_q.exp()
        entries = {
            "softmax_kl": lambda: p * (log_p - log_q),
            "softmax_cross_entropy": lambda: -p * log_q,
            "softmax_reverse_kl": lambda: q * (log_q - log_p),
            "softmax_mse": lambda: (p - q).square(),
        }[kind]()
        if label_mix:
            has_own = (own & on).any(-1, keepdim=True)
            mixed = (1 - label_mix) * entries + torch.where(own, -label_mix * log_q, zero)
            entries = torch.where(has_own, mixed, entries)
        return torch.where(on, entries, zero)
    if kind == "gram_row_l2":
        return (_unit_rows(scores_s, on) - _unit_rows(scores_t, on)).square()
    if kind == "gram_row_l1":
        half_s = torch.where(on, (scores_s + 1) / 2, zero)
        half_t = torch.where(on, (scores_t + 1) / 2, zero)
        one = torch.ones((), dtype=torch.float64, device=on.device)
        some = on.any(-1, keepdim=True)
        p_s = half_s / torch.where(some, half_s.sum(-1, keepdim=True), one)
        p_t = half_t / torch.where(some, half_t.sum(-1, keepdim=True), one)
        entries = p_t * ((p_t + PKT_EPSILON) / (p_s + PKT_EPSILON)).log()
        return torch.where(on, entries, zero)
    return torch.where(on, _element(kind, scores_s - scores_t, beta, margin), zero)


def angle_dense(x: Tensor, y: Tensor, on: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """RKD's angles: per vertex j, sum over (i, k) of smooth-L1 and the number of triples: (H, N).

    x, y: (H, N, d). on: (H, N) bool or None.
    """

    def angles(z: Tensor) -> Tensor:
        difference = z.double()[:, None, :, :] - z.double()[:, :, None, :]  # (H, j, i, d)
        norm = difference.square().sum(-1, keepdim=True)
        far = norm > NORM_FLOOR**2
        unit = torch.where(far, difference / torch.where(far, norm, 1.0).sqrt(), 0.0)
        return unit @ unit.mT

    entries = _element("angle", angles(x) - angles(y), beta, 0.0)
    if on is None:
        on = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    triples = on[:, :, None, None] & on[:, None, :, None] & on[:, None, None, :]
    entries = torch.where(triples, entries, torch.zeros_like(entries))
    return entries.sum((-2, -1)), triples.sum((-2, -1))


def cka_dense(x: Tensor, y: Tensor, on: Tensor | None) -> Tensor:
    """1 - biased CKA of each graph (H,), through the N x N Grams."""

    def centred(z: Tensor) -> Tensor:
        gram = z.double() @ z.double().mT
        if on is not None:
            gram = torch.where(on[:, :, None] & on[:, None, :], gram, 0.0)
            weight = on.double()
        else:
            weight = torch.ones(z.shape[:2], dtype=torch.float64, device=z.device)
        share = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        centre = torch.diag_embed(weight) - weight[:, :, None] * share[:, None, :]
        return centre @ gram @ centre.mT

    k, m = centred(x), centred(y)
    cross = (k * m).sum((-2, -1))
    return 1 - cross / ((k * k).sum((-2, -1)) * (m * m).sum((-2, -1))).sqrt()
