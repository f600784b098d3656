"""kd.transport between points, kd.sinkhorn_assign."""

from __future__ import annotations

import math
import threading

import pytest
import torch

import kdkernels as kd

FAMILY = "transport"


def brute(x, y, cost):
    difference = x[:, None] - y[None]
    if cost == "sqeuclidean":
        return difference.square().sum(-1)
    if cost == "euclidean":
        return difference.norm(dim=-1)
    if cost == "l1":
        return difference.abs().sum(-1)
    if cost == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    return 1 - (x @ y.T / math.sqrt(x.shape[1])).softmax(-1)


@pytest.mark.parametrize("cost", ("sqeuclidean", "euclidean", "cosine", "l1", "dot_softmax"))
def test_ground_costs_and_gradients_to_points(cost):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    value = kd.transport(x, y, cost=cost, epsilon=0.3, iterations=4)
    expected = kd.sinkhorn(brute(x, y, cost), epsilon=0.3, iterations=4)
    called = kd.transport(x, y, cost=lambda u, w: brute(u, w, cost), epsilon=0.3, iterations=4)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(called, expected)
    for got, want in zip(
        torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_gemm_distances_equal_differences():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator) + 5.0
    y = torch.randn(150, 64, generator=generator) + 5.0
    from kdkernels.functional.ground_cost import square_distance

    torch.testing.assert_close(
        square_distance(x, y).double(), brute(x.double(), y.double(), "sqeuclidean"),
        rtol=1e-5, atol=1e-4,
    )  # fmt: skip


def test_ragged_dot_softmax_is_a_softmax_over_valid_teachers():
    x, y = torch.randn(1, 3, 4), torch.randn(1, 6, 4)
    cut = kd.transport(x, y[:, :4], cost="dot_softmax", epsilon=1.0, iterations=3)
    ragged = kd.transport(
        x, y, cost="dot_softmax", epsilon=1.0, iterations=3, teacher_lengths=torch.tensor([4])
    )
    torch.testing.assert_close(cut, ragged)


def test_assignment():
    scores = torch.randn(12, 5, dtype=torch.float64) * 3
    q = kd.sinkhorn_assign(scores, 0.05, 3)
    literal = (scores / 0.05 - (scores / 0.05).max()).exp().T
    literal /= literal.sum()
    for _ in range(3):
        literal /= literal.sum(1, keepdim=True) * 5
        literal /= literal.sum(0, keepdim=True) * 12
    torch.testing.assert_close(q, (literal * 12).T)
    assert not kd.sinkhorn_assign(scores.requires_grad_(), 0.05, 1).requires_grad


def test_assignment_over_a_group(monkeypatch):
    """Two ranks as two threads, whose all-reduce meets at a barrier."""
    scores = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    barrier, shares, results = threading.Barrier(2), {}, {}
    rank = threading.local()

    def all_reduce(tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        shares[rank.index] = tensor.clone()
        barrier.wait(timeout=20)
        both = torch.stack([shares[0], shares[1]])
        tensor.copy_(both.amax(0) if op == torch.distributed.ReduceOp.MAX else both.sum(0))
        barrier.wait(timeout=20)

    def run(index):
        rank.index = index
        part = scores[:3] if index == 0 else scores[3:]
        results[index] = kd.sinkhorn_assign(part, 0.1, 3, group="a group")

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    whole = kd.sinkhorn_assign(scores, 0.1, 3)
    torch.testing.assert_close(torch.cat([results[0], results[1]]), whole)
