"""kd.contrastive against its open form, and over two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

import kdkernels as kd

FAMILY = "relation"


def unit(*shape, dtype=torch.float32, device="cpu"):
    return F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1).to(device, dtype)


def both(query, key, function, expected, **options):
    """Value and gradients of both against each other."""
    found = []
    for f, wide in ((function, False), (expected, True)):
        q, k = (x.detach().clone() for x in (query, key))
        q, k = (x.double() if wide else x for x in (q, k))
        q.requires_grad_(), k.requires_grad_()
        loss = f(q, k)
        found.append((loss.detach().double(), *torch.autograd.grad(loss.sum(), (q, k))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert float((a.double() - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_info_nce_is_the_open_form(backend):
    q, k = unit(40, 16, device=backend.device), unit(40, 16, device=backend.device)
    labels = torch.arange(40, device=backend.device)
    both(
        q,
        k,
        lambda q, k: kd.contrastive(q, k, scale=14.3),
        lambda q, k: F.cross_entropy(14.3 * q @ k.T, labels),
    )
    both(
        q,
        k,
        lambda q, k: kd.contrastive(q, k, scale=14.3, symmetric=True),
        lambda q, k: (
            (F.cross_entropy(14.3 * q @ k.T, labels) + F.cross_entropy(14.3 * k @ q.T, labels)) / 2
        ),
    )


def test_large_info_nce_without_its_map():
    from test_relation_autograd import Largest

    q, k = unit(4096, 32), unit(4096, 32)
    x = q.clone().requires_grad_()
    with kd.use_backend("cpu"), Largest() as largest:
        loss = kd.contrastive(x, k, scale=1 / 0.07)
        loss.backward()
    assert largest.entries < 4096 * 4096 // 8
    logits = (q.double() @ k.double().T) / 0.07
    expected = F.cross_entropy(logits, torch.arange(4096))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    p = logits[:64].softmax(-1) - torch.eye(64, 4096)
    gradient = (p @ k.double()) / 0.07 / 4096
    assert float((x.grad[:64] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max())


def test_positives_of_every_form(backend):
    q, k = unit(7, 8, device=backend.device), unit(9, 8, device=backend.device)
    index = torch.tensor([3, 1, 0, 8, 8, 2, 5], device=backend.device)
    both(
        q,
        k,
        lambda q, k: kd.contrastive(q, k, positives=index, scale=5.0),
        lambda q, k: F.cross_entropy(5 * q @ k.T, index),
    )
    some = torch.rand(7, 9, device=backend.device) < 0.4
    some[2], some[3, 4] = False, True
    count = some.sum(-1)

    def open_form(q, k):
        log_q = (5 * q @ k.T).log_softmax(-1)
        rows = -(torch.where(some, log_q, 0.0)).sum(-1) / count.clamp(min=1)
        return rows[count > 0].mean()

    both(q, k, lambda q, k: kd.contrastive(q, k, positives=some, scale=5.0), open_form)
    table = torch.full((7, 9), -1, dtype=torch.int64, device=backend.device)
    for i in range(7):
        ids = some[i].nonzero()[:, 0]
        table[i, : len(ids)] = ids
    both(q, k, lambda q, k: kd.contrastive(q, k, positives=table, scale=5.0), open_form)


def test_rows_that_do_not_count_are_never_read(backend):
    q, k = unit(6, 8, device=backend.device), unit(6, 8, device=backend.device)
    mask = torch.tensor([True, True, False, True, False, True], device=backend.device)
    index = torch.arange(6, device=backend.device)
    found = []
    for garbage in (0.0, float("nan")):
        x = torch.where(mask[:, None], q, garbage).requires_grad_()
        y = k.clone().requires_grad_()
        loss = kd.contrastive(x, y, mask=mask, scale=3.0)
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
    expected = F.cross_entropy((3 * q @ k.T)[mask], index[mask])
    torch.testing.assert_close(found[1][0], expected)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_labels_queue_offset_and_masks(backend):
    x = unit(8, 6, device=backend.device)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3, 2], device=backend.device)

    def supervised(q, k):
        z = 10 * q @ k.T
        eye = torch.eye(8, dtype=torch.bool, device=z.device)
        log_q = z.masked_fill(eye, -torch.inf).log_softmax(-1)
        same = (labels[:, None] == labels[None]) & ~eye
        rows = -torch.where(same, log_q, 0.0).sum(-1) / same.sum(-1).clamp(min=1)
        return rows[same.any(-1)].mean()

    both(
        x,
        x,
        lambda q, k: kd.contrastive(q, k, labels=labels, exclude_diagonal=True, scale=10.0),
        supervised,
    )
    queue, keys = unit(11, 6, device=backend.device), unit(12, 6, device=backend.device)
    on = torch.rand(8, 23, device=backend.device) < 0.7
    rows = torch.arange(8, device=backend.device)
    on[rows, rows + 3] = True
    wide = queue.double()
    both(
        x,
        keys,
        lambda q, k: kd.contrastive(q, k, queue=queue, row_offset=3, scale=4.0, mask=on),
        lambda q, k: F.cross_entropy(
            (4 * q @ torch.cat([k, wide]).T).masked_fill(~on, -torch.inf), rows + 3
        ),
    )


def test_targets(backend):
    q, k = unit(9, 8, device=backend.device), unit(9, 8, device=backend.device)
    tq, tk = unit(9, 4, device=backend.device), unit(9, 4, device=backend.device)
    soft = (6 * tq.double() @ tk.double().T).softmax(-1)
    eye = torch.eye(9, device=backend.device)

    def expected(q, k):
        return F.cross_entropy(6 * q @ k.T, 0.7 * soft + 0.3 * eye)

    for target in ((tq, tk), soft.float()):

        def found(q, k, target=target):
            return kd.contrastive(q, k, scale=6.0, target=target, label_mix=0.3)

        both(q, k, found, expected)


def test_scale_has_a_gradient(backend):
    q, k = unit(9, 8, device=backend.device), unit(9, 8, device=backend.device)
    found = []
    for wide in (False, True):
        scale = torch.tensor(5.0, device=backend.device, requires_grad=True)
        if wide:
            z = scale.double() * (q.double() @ k.double().T)
            loss = F.cross_entropy(z, torch.arange(9, device=z.device))
        else:
            loss = kd.contrastive(q, k, scale=scale)
        found.append(torch.autograd.grad(loss, scale)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def _rank(rank: int, path: str, q: torch.Tensor, k: torch.Tensor) -> list:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    own = slice(rank * 5, rank * 5 + 5)
    a, b = q[own].clone().requires_grad_(), k[own].clone().requires_grad_()
    found = []
    for symmetric in (False, True):
        loss = kd.contrastive(a, b, scale=4.0, symmetric=symmetric, group=dist.group.WORLD)
        found.append((loss.item(), *torch.autograd.grad(loss, (a, b))))
    return found


def test_two_ranks_equal_one_process(tmp_path):
    q, k = unit(10, 6), unit(10, 6)
    found = run_ranks(_rank, tmp_path, (str(tmp_path / "store"), q, k))
    for symmetric in (False, True):
        parts = [rank[symmetric] for rank in found]
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        loss = kd.contrastive(a, b, scale=4.0, symmetric=symmetric)
        gradients = torch.autograd.grad(loss, (a, b))
        assert abs(sum(p[0] for p in parts) / 2 - loss.item()) <= 1e-6
        for i, gradient in enumerate(gradients):
            # DDP averages over the ranks.
            whole = torch.cat([parts[0][1 + i], parts[1][1 + i]]) / 2
            torch.testing.assert_close(whole, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name, options",
    [
        ("key", {"key": torch.zeros(4, 3)}),
        ("query", {"query": torch.zeros(4)}),
        ("row_offset", {"row_offset": 2}),
        ("positives", {"positives": torch.tensor([0, 1, 2, 9])}),
        ("positives", {"positives": torch.zeros(4, 3, dtype=torch.bool)}),
        ("scale", {"scale": 0.0}),
        ("target", {"target": torch.zeros(4, 3)}),
        ("symmetric", {"symmetric": True, "queue": torch.zeros(2, 5)}),
        ("reduction", {"reduction": "batchmean"}),
        ("labels", {"labels": torch.zeros(3, dtype=torch.int64)}),
    ],
)
def test_bad_input(name, options):
    arguments = {"query": torch.zeros(4, 5), "key": torch.zeros(4, 5), **options}
    with pytest.raises((ValueError, TypeError), match=name):
        kd.contrastive(arguments.pop("query"), arguments.pop("key"), **arguments)
