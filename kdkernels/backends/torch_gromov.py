"""The plain torch reference of graphs on logits: textbook formulas in float64.

It is the oracle of the tests, and serves where no kernel does. The gradient comes from autograd
through the explicit formula; only the choice of the k entries is fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEVIATION_FLOOR = 1e-6


def _scaled(
    x: Tensor, kept: Tensor, standardize: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    """z (N, k) of the entries `kept` (N, k), and mean, deviation, scale, count (N, 4)."""
    alive = x != -torch.inf
    safe = torch.where(alive, x, 0.0)
    one = x.new_ones(x.shape[0], 1)
    if standardize:
        count = alive.sum(-1, keepdim=True).to(x.dtype)
        divisor = count.clamp(min=1.0)
        mean = safe.sum(-1, keepdim=True) / divisor
        square = torch.where(alive, (safe - mean) ** 2, 0.0).sum(-1, keepdim=True) / divisor
        # The derivative of the root at 0 is taken as 0.
        flat = square == 0
        deviation = torch.where(flat, 0.0, torch.where(flat, 1.0, square).sqrt())
        scale = 1.0 / ((deviation + DEVIATION_FLOOR) * temperature)
    else:
        mean, deviation, scale, count = 0.0 * one, 0.0 * one, one / temperature, 0.0 * one
    z = torch.where(alive.gather(-1, kept), (safe.gather(-1, kept) - mean) * scale, 0.0)
    return z, torch.cat([mean, deviation, scale, count], -1)


def _features(z: Tensor, chosen: Tensor, graphs: int, average: bool) -> tuple[Tensor, Tensor]:
    """f (G, k) from the explicit graphs C (G, k, k), and the selected positions (G,)."""
    k, rows = z.shape[-1], z.shape[0] // max(graphs, 1)
    z = torch.where(chosen[:, None], z, 0.0).view(graphs, rows, k)
    count = chosen.view(graphs, rows).sum(-1).double()
    c = z.mT @ z / count.clamp(min=1.0)[:, None, None]
    return c.sum(-1) / (k if average else 1), count


def _chosen(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return mask
    return torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)


def graph_nodes_fwd(
    logits, mask, values, indices, stats, nodes, count, standardize, average, temperature
):
    """See csrc/gromov/gromov.h."""
    chosen = _chosen(logits, mask)
    x = torch.where(chosen[:, None], logits.detach().double(), 0.0)
    # A stable sort: equal logits by the lowest index. NaN comes first.
    kept = x.sort(dim=-1, descending=True, stable=True).indices[:, : values.shape[1]]
    z, numbers = _scaled(x, kept, standardize, temperature)
    z = torch.where(chosen[:, None], z, 0.0)
    features, selected = _features(z, chosen, count.shape[0], average)
    values.copy_(z)
    indices.copy_(torch.where(chosen[:, None], kept, -1))
    numbers = torch.cat([numbers, z.sum(-1, keepdim=True)], -1)
    stats.copy_(torch.where(chosen[:, None], numbers, 0.0))
    nodes.copy_(features)
    count.copy_(selected)


def graph_nodes_bwd(
    logits, mask, values, indices, stats, count, upstream, grad, standardize, average, temperature
):
    """See csrc/gromov/gromov.h."""
    chosen = _chosen(logits, mask)
    with torch.enable_grad():
        x = torch.where(chosen[:, None], logits.detach().double(), 0.0).requires_grad_()
        z, _ = _scaled(x, indices.long().clamp(min=0), standardize, temperature)
        features, _ = _features(z, chosen, count.shape[0], average)
        (gradient,) = torch.autograd.grad(features, x, upstream)
    grad.copy_(torch.where(chosen[:, None] & (logits != -torch.inf), gradient, 0.0))


def assignment(cost: Tensor, columns: Tensor) -> None:
    """Cheapest assignments: columns (B, n) for costs (B, n, n) float64. Shortest augmenting paths,
    one row at a time, each step over all columns at once."""
    batch, n = cost.shape[:2]
    for b in range(batch):
        columns[b] = torch.arange(n)
        table = cost[b].cpu()
        if not bool(torch.isfinite(table).all()):
            continue  # the value that is read off the identity is NaN then
        row_price, column_price = torch.zeros(n), torch.zeros(n)
        row_price, column_price = row_price.double(), column_price.double()
        row_of = [-1] * n
        for inserted in range(n):
            distance = torch.full((n,), torch.inf, dtype=torch.float64)
            previous = torch.full((n,), -1)
            done = torch.zeros(n, dtype=torch.bool)
            row, column, path = inserted, -1, [(inserted, -1)]
            while True:
                reduced = table[row] - row_price[row] - column_price
                closer = ~done & (reduced < distance)
                distance = torch.where(closer, reduced, distance)
                previous = torch.where(closer, column, previous)
                column = int(torch.where(done, torch.inf, distance).argmin())
                nearest = float(distance[column])
                for passed_row, passed_column in path:
                    row_price[passed_row] += nearest
                    if passed_column >= 0:
                        column_price[passed_column] -= nearest
                distance = torch.where(done, distance, distance - nearest)
                if row_of[column] < 0:
                    break
                done[column] = True
                row = row_of[column]
                path.append((row, column))
            while column >= 0:
                before = int(previous[column])
                row_of[column] = inserted if before < 0 else row_of[before]
                column = before
        for column, row in enumerate(row_of):
            columns[b, row] = column
