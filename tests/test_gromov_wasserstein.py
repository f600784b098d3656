"""kd.gromov_wasserstein and kd.sliced_gromov_wasserstein: closed forms, certificates."""

from __future__ import annotations

import itertools

import pytest
import torch

import kdkernels as kd
from kdkernels.ops import gromov as ops

FAMILY = "gromov"


def enumerate_all(c, d, p=2):
    """min over permutations of mean |C_ij - D_s(i)s(j)|^p, float64, in plain loops."""
    c, d = c.double(), d.double()
    n = len(c)
    best = float("inf")
    for s in itertools.permutations(range(n)):
        s = torch.tensor(s)
        best = min(best, (c - d[s][:, s]).abs().pow(p).mean().item())
    return best


def semidefinite(n, dtype=torch.float64):
    x = torch.randn(n, n + 1, dtype=dtype)
    return x @ x.T


def hexagon_and_triangles():
    """Adjacency of a 6-cycle and of two triangles, + 2 I so that both are semidefinite."""
    cycle, triangles = torch.zeros(6, 6), torch.zeros(6, 6)
    for i in range(6):
        cycle[i, (i + 1) % 6] = cycle[(i + 1) % 6, i] = 1
        for j in range(6):
            triangles[i, j] = i // 3 == j // 3 and i != j
    return cycle + 2 * torch.eye(6), triangles + 2 * torch.eye(6)


@pytest.mark.parametrize("loss", ("square", "absolute"))
def test_graphs_with_the_same_degrees(backend, loss):
    c, d = (x.to(backend.device) for x in hexagon_and_triangles())
    for method in ("first_lower_bound", "third_lower_bound"):
        assert kd.gromov_wasserstein(c, d, method=method, loss=loss).item() == 0
    if loss == "square":
        value, lower, upper = kd.gromov_wasserstein(c, d, method="exact", return_bounds=True)
        assert abs(value.item() - 8 / 36) < 1e-7
        assert lower <= value <= upper
    assert abs(enumerate_all(c, d, 2 if loss == "square" else 1) - 8 / 36) < 1e-12


def test_certified_interval():
    """On 200 random semidefinite pairs the interval contains the enumerated value."""
    generator = torch.Generator().manual_seed(3)
    for trial in range(200):
        n = int(torch.randint(2, 8 if trial % 10 == 0 else 6, (), generator=generator))
        c, d = semidefinite(n), semidefinite(n)
        if trial % 3 == 0:
            c, d = c.float(), d.float()
        expected = enumerate_all(c, d)
        exact = kd.gromov_wasserstein(c, d, method="exact")
        assert abs(exact.item() - expected) <= 1e-6 * expected
        for method in ("first_lower_bound", "third_lower_bound", "sorted", "exact"):
            value, lower, upper = kd.gromov_wasserstein(c, d, method=method, return_bounds=True)
            assert lower.item() <= expected <= upper.item(), (trial, method)
            if "lower" in method:
                assert value.item() <= expected * (1 + 1e-6)
            else:
                assert value.item() >= expected * (1 - 1e-6)
        first, third = (
            kd.gromov_wasserstein(c, d, method=f"{name}_lower_bound") for name in ("first", "third")
        )
        assert first <= third * (1 + 1e-6)
        absolute = [
            kd.gromov_wasserstein(c, d, method=m, loss="absolute", return_bounds=True)
            for m in ("first_lower_bound", "third_lower_bound", "sorted")
        ]
        expected = enumerate_all(c, d, 1)  # couplings may do better: only the upper end is above
        assert absolute[2][0].item() >= expected * (1 - 1e-6)
        assert absolute[0][0].item() <= absolute[1][0].item() * (1 + 1e-6) <= expected * (1 + 2e-6)


def test_against_pot():
    """POT's conditional gradient finds some coupling: never below our lower end."""
    ot = pytest.importorskip("ot")
    for n, m in ((5, 5), (6, 9), (12, 12), (20, 7)):
        for _ in range(5):
            c, d = semidefinite(n), semidefinite(m)
            a, b = torch.rand(n).double() + 0.1, torch.rand(m).double() + 0.1
            a, b = a / a.sum(), b / b.sum()
            found = ot.gromov.gromov_wasserstein2(c.numpy(), d.numpy(), a.numpy(), b.numpy())
            _, lower, upper = kd.gromov_wasserstein(c, d, a, b, return_bounds=True)
            assert lower.item() <= found * (1 + 1e-9)
            assert lower <= upper


def test_entropic_is_that_of_pot():
    ot = pytest.importorskip("ot")
    for n, m, epsilon in ((6, 6, 2.0), (5, 8, 5.0)):
        c, d = semidefinite(n), semidefinite(m)
        a, b = torch.rand(n).double() + 0.5, torch.rand(m).double() + 0.5
        a, b = a / a.sum(), b / b.sum()
        found = ot.gromov.entropic_gromov_wasserstein2(
            c.numpy(), d.numpy(), a.numpy(), b.numpy(), epsilon=epsilon, max_iter=1000, tol=1e-9
        )
        value, lower, _ = kd.gromov_wasserstein(
            c, d, a, b, method="entropic", epsilon=epsilon, return_bounds=True
        )
        assert abs(value.item() - found) <= 1e-6 * found
        assert lower <= value


def test_entropic_gradient_includes_the_plan():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def value(x, y):
        return kd.gromov_wasserstein(x @ x.mT, y @ y.mT, method="entropic", epsilon=60.0)

    torch.autograd.gradcheck(value, (x, y), eps=1e-5, atol=1e-4, rtol=1e-4)
    one = kd.gromov_wasserstein(semidefinite(5), semidefinite(5), method="entropic", epsilon=1e4)
    assert one.item() > 0
    for options, words in (
        (dict(), "epsilon: needed"),
        (dict(epsilon=-1.0), "epsilon"),
        (dict(epsilon=1.0, loss="absolute"), "sorted"),
    ):
        with pytest.raises(ValueError, match=words):
            kd.gromov_wasserstein(semidefinite(3), semidefinite(3), method="entropic", **options)
    with pytest.raises(ValueError, match="symmetric"):
        kd.gromov_wasserstein(torch.randn(3, 3), torch.randn(3, 3), method="entropic", epsilon=1.0)
    with pytest.raises(ValueError, match="epsilon: goes with"):
        kd.gromov_wasserstein(semidefinite(3), semidefinite(3), epsilon=1.0)


def brute_line(u, v, a, b, p):
    """Transport between weighted numbers: splits the sorted masses one by one."""
    left = sorted(zip(u.tolist(), a.tolist()))
    right = sorted(zip(v.tolist(), b.tolist()))
    total, i, j = 0.0, 0, 0
    left, right = [list(x) for x in left], [list(x) for x in right]
    while i < len(left) and j < len(right):
        mass = min(left[i][1], right[j][1])
        total += mass * abs(left[i][0] - right[j][0]) ** p
        left[i][1] -= mass
        right[j][1] -= mass
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return total


def test_first_lower_bound_formula(backend):
    c, d = torch.randn(2, 5, 5, dtype=torch.float64), torch.randn(2, 7, 7, dtype=torch.float64)
    a, b = torch.rand(2, 5).double() + 0.1, torch.rand(7).double() + 0.1
    a, b = a / a.sum(-1, keepdim=True), b / b.sum()
    arguments = [x.to(backend.device, torch.float32) for x in (c, d, a, b)]
    for loss, p in (("square", 2), ("absolute", 1)):
        out = kd.gromov_wasserstein(*arguments, loss=loss)
        assert out.dtype == torch.float32 and out.shape == (2,)
        for i in range(2):
            means = brute_line(c[i] @ a[i], d[i] @ b, a[i], b, p)
            roots = brute_line((c[i] ** 2 @ a[i]).sqrt(), (d[i] ** 2 @ b).sqrt(), a[i], b, p)
            expected = means if p == 1 else max(means, roots)
            assert abs(out[i].item() - expected) <= 1e-5 * expected


def test_number_of_infigfusion():
    """graph_on_logits is k x the first lower bound of the explicit graphs."""
    student, teacher = torch.randn(4, 40) * 3, torch.randn(6, 50) * 3
    graphs = []
    for x in (student, teacher):
        x = x.double()
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-6)
        z = x.topk(10).values
        graphs.append(z.T @ z / len(z))
    bound = kd.gromov_wasserstein(*graphs, method="first_lower_bound", loss="absolute")
    loss = kd.graph_on_logits(student, teacher)
    torch.testing.assert_close(loss.double(), 10 * bound, rtol=1e-5, atol=0)


def test_rank_one_graphs_are_solved_by_sorting():
    z, w = (
        torch.randn(6, dtype=torch.float64).sort().values,
        torch.randn(6, dtype=torch.float64).sort().values,
    )
    exact = kd.gromov_wasserstein(torch.outer(z, z), torch.outer(w, w), method="exact")
    product = max(abs(z @ w), abs(z @ w.flip(0)))
    expected = ((z @ z) ** 2 + (w @ w) ** 2 - 2 * product**2) / 36
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-12)


def test_sorting_is_not_exact_on_a_line():
    """Seven points where neither the ascending nor the descending match is best."""
    x = torch.tensor([-100.0, -2, -1, 0, 1, 2, 100], dtype=torch.float64)
    y = torch.tensor([-100.0, -99, -2, -1, 0, 1, 2], dtype=torch.float64)
    c, d = ((v[:, None] - v[None]) ** 2 for v in (x, y))
    exact = kd.gromov_wasserstein(c, d, method="exact")
    assert abs(exact.item() - 65375480) < 1.0
    line = kd.sliced_gromov_wasserstein(
        x[:, None], y[:, None], projections=torch.ones(1, 1, dtype=torch.float64)
    )
    assert abs(line.item() - 70870578.04) < 0.01


def test_gradients():
    for method, loss in (
        ("first_lower_bound", "square"),
        ("first_lower_bound", "absolute"),
        ("third_lower_bound", "square"),
        ("third_lower_bound", "absolute"),
        ("sorted", "square"),
        ("sorted", "absolute"),
        ("exact", "square"),
    ):
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        y = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

        def value(x, y, method=method, loss=loss):
            return kd.gromov_wasserstein(x @ x.mT, y @ y.mT, method=method, loss=loss)

        torch.autograd.gradcheck(value, (x, y), atol=1e-6)
    c, d = semidefinite(4), semidefinite(3)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def weighted(logits):
        a, b = logits[:4].softmax(-1), logits[4:].softmax(-1)
        return sum(
            kd.gromov_wasserstein(c, d, a, b, method=m) for m in ("first_lower_bound", "sorted")
        )

    torch.autograd.gradcheck(weighted, (logits,), atol=1e-6)


def test_exact_of_distances_and_symmetries():
    points = torch.randn(6, 3, dtype=torch.float64)
    turned = points[torch.randperm(6)] @ torch.linalg.qr(torch.randn(3, 3).double())[0] + 5
    c, d = (torch.cdist(v, v) ** 2 for v in (points, turned))
    assert kd.gromov_wasserstein(c, d, method="exact").item() < 1e-20
    one = kd.gromov_wasserstein(torch.ones(1, 1), torch.full((1, 1), 3.0), method="exact")
    assert one.item() == 4.0
    none = kd.gromov_wasserstein(torch.ones(0, 3, 3), torch.ones(0, 3, 3), method="exact")
    assert none.shape == (0,)


@pytest.mark.parametrize("n", (1, 2, 7, 60))
def test_assignment(backend, n):
    scipy = pytest.importorskip("scipy.optimize")
    cost = torch.randn(3, n, n, dtype=torch.float64)
    cost[1] = torch.randint(0, 3, (n, n)).double()  # many equal optima
    columns = ops.assignment(cost.to(backend.device)).cpu()
    for table, found in zip(cost, columns):
        assert sorted(found.tolist()) == list(range(n))
        rows, best = scipy.linear_sum_assignment(table.numpy())
        total = table[torch.arange(n), found].sum()
        torch.testing.assert_close(total, table[rows, best].sum(), rtol=1e-12, atol=1e-12)
    cost[0, 0, 0] = torch.nan
    assert ops.assignment(cost.to(backend.device))[0].tolist() == list(range(n))


def test_bad_costs():
    square, indefinite = semidefinite(4), torch.diag(torch.tensor([1.0, -1.0, 2.0, -3.0])).double()
    call = kd.gromov_wasserstein
    for arguments, options, words in (
        ((torch.ones(3, 4), square), {}, "student_cost: expected a square matrix"),
        ((square, torch.ones(4).double()), {}, "teacher_cost: expected a square matrix"),
        ((square, indefinite), dict(method="exact"), "both positive semidefinite.*sorted"),
        ((square, square + torch.triu(square)), dict(method="exact"), "symmetric.*sorted"),
        ((semidefinite(9), semidefinite(9)), dict(method="exact"), "n <= 8.*first_lower_bound"),
        ((square, square), dict(method="exact", loss="absolute"), "square.*sorted"),
        ((square, semidefinite(5)), dict(method="third_lower_bound"), "equal sizes"),
        ((square, square, torch.ones(4) / 4), dict(method="third_lower_bound"), "uniform"),
        ((square, square, torch.ones(4)), {}, "a: expected weights"),
        ((square, square, torch.ones(3) / 3), {}, "a: expected shape"),
        ((square, square), dict(method="second"), "method: expected one of"),
        ((square, square), dict(loss="kl"), "loss: expected"),
    ):
        with pytest.raises(ValueError, match=words):
            call(*arguments, **options)
    with pytest.raises(TypeError, match="float64 goes with float64"):
        call(square, square.float())
    with pytest.raises(ValueError, match="n <= 512"):
        call(torch.eye(513), torch.eye(513), method="third_lower_bound")


# Sliced. ----------------------------------------------------------------------------------------


def brute_sliced(x, y, directions):
    x, y = x.double(), y.double()
    total = 0.0
    for direction in directions.double():
        u = (x @ direction[: x.shape[1]]).sort().values
        v = (y @ direction[: y.shape[1]]).sort().values
        costs = []
        for w in (v, v.flip(0)):
            gap = (u[:, None] - u[None]) ** 2 - (w[:, None] - w[None]) ** 2
            costs.append((gap**2).mean())
        total += min(costs).item()
    return total / len(directions)


@pytest.mark.parametrize("offset", (0.0, 100.0))
def test_sliced_against_all_pairs(offset):
    """Also far from the origin, where raw float32 moments are wrong by any amount."""
    x = torch.randn(20, 3) + offset
    y = 1.5 * torch.randn(20, 2) - offset
    directions = torch.nn.functional.normalize(torch.randn(7, 3), dim=-1)
    out = kd.sliced_gromov_wasserstein(x, y, projections=directions)
    assert out.dtype == torch.float32
    expected = brute_sliced(x, y, directions)
    assert abs(out.item() - expected) <= 1e-5 * expected
    batch = kd.sliced_gromov_wasserstein(
        torch.stack([x, x]), torch.stack([y, -y]), projections=directions
    )
    torch.testing.assert_close(batch[0], out)


def test_sliced_draws_and_gradients():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    draw = [
        kd.sliced_gromov_wasserstein(x, y, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]
    directions = torch.randn(3, 4, dtype=torch.float64)

    def value(x, y):
        return kd.sliced_gromov_wasserstein(x, y, projections=directions)

    torch.autograd.gradcheck(value, (x, y), atol=1e-6)
    turned = x.detach()[torch.randperm(6)] + 3
    assert kd.sliced_gromov_wasserstein(x.detach(), turned).abs() < 1e-12
    for bad, words in ((0, "at least 1"), (torch.randn(3, 3), r"\(L, 4\)")):
        with pytest.raises(ValueError, match=words):
            kd.sliced_gromov_wasserstein(x, y, projections=bad)
    with pytest.raises(ValueError, match="as many points"):
        kd.sliced_gromov_wasserstein(x, y[:5])
