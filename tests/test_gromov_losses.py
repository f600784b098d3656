"""The named loss graph_on_logits: its terms, selection, several teachers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.losses import GraphOnLogitsLoss, ULDLoss


def batch():
    student, teacher = torch.randn(2, 5, 40) * 3, torch.randn(2, 5, 33) * 3
    labels = torch.randint(0, 40, (2, 5))
    labels[0, :2], labels[1, 4] = -100, -100
    return student, teacher, labels


def test_catalogue():
    for name in ("graph_on_logits", "gld", "infigfusion"):
        made = kd.loss(name)
        assert isinstance(made, GraphOnLogitsLoss)
    entry = next(e for e in kd.catalogue() if e.name == "graph_on_logits")
    assert entry.family == "gromov" and entry.status == "secondary"
    assert entry.parameters == dict(
        k=10,
        standardize="vocab",
        aggregate="mean",
        p=1,
        temperature=1.0,
        scope="sequence",
        uld_weight=0.0,
        label_weight=0.0,
    )


def test_terms():
    student, teacher, labels = batch()
    student.requires_grad_()
    mask = labels != -100
    gld = kd.graph_on_logits(student, teacher, k=4, temperature=2.0, mask=mask)
    uld = ULDLoss(2.0, 2.0)(student, teacher, mask=mask, teacher_mask=mask)
    ce = F.cross_entropy(student[mask], labels[mask])
    for uld_weight, label_weight in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.3, 0.7)):
        loss = kd.loss(
            "gld", k=4, temperature=2.0, uld_weight=uld_weight, label_weight=label_weight
        )(student, teacher, labels)
        expected = gld + uld_weight * uld + label_weight * ce
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        gradients = [
            torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_selection():
    student, teacher, labels = batch()
    mask = torch.rand(2, 5) < 0.7
    mask[:, 2] = True
    teacher_labels = torch.where(torch.rand(2, 5) < 0.6, 1, -100)
    teacher_labels[:, 3] = 1
    loss = kd.loss("gld")(student, teacher, labels, mask=mask, teacher_labels=teacher_labels)
    expected = kd.graph_on_logits(
        student, teacher, mask=mask & (labels != -100), teacher_mask=teacher_labels != -100
    )
    torch.testing.assert_close(loss, expected)
    plain = kd.loss("gld")(student[0], teacher[0])
    torch.testing.assert_close(plain, kd.graph_on_logits(student[0], teacher[0]))


def test_several_teachers():
    student, first, labels = batch()
    second = torch.randn(2, 7, 60) * 3
    student.requires_grad_()
    rows = torch.ones(2, 7, dtype=torch.bool)
    weights = torch.tensor([0.25, 0.6], requires_grad=True)
    loss = kd.loss("gld", uld_weight=0.5)(
        student, [first, second], labels, teacher_mask=[None, rows], teacher_weights=weights
    )
    chosen = labels != -100
    parts = [
        kd.graph_on_logits(student, t, mask=chosen, teacher_mask=m)
        + 0.5 * ULDLoss()(student, t, mask=chosen, teacher_mask=m)
        for t, m in ((first, chosen), (second, rows))
    ]
    expected = 0.25 * parts[0] + 0.6 * parts[1]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    (to_weights,) = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(to_weights, torch.stack(parts).detach(), rtol=1e-5, atol=1e-6)
    mean = kd.loss("gld")(student, [first, first])
    torch.testing.assert_close(mean, kd.graph_on_logits(student, first))


def test_refusals():
    student, teacher, labels = batch()
    with pytest.raises(ValueError, match="labels: needed"):
        kd.loss("gld", label_weight=1.0)(student, teacher)
    with pytest.raises(ValueError, match="teacher: expected at least one"):
        kd.loss("gld")(student, [])
    with pytest.raises(ValueError, match=r"teacher_weights.*2 teachers"):
        kd.loss("gld")(student, [teacher, teacher], teacher_weights=[1.0])
    with pytest.raises(ValueError, match=r"teacher_mask.*2 teachers"):
        kd.loss("gld")(student, [teacher, teacher], teacher_mask=[None])
    with pytest.raises(ValueError, match=r"teacher\[1\]"):
        kd.loss("gld")(student, [teacher, teacher[0]])
    with pytest.raises(ValueError, match="teacher_mask: needed"):
        kd.loss("gld")(student, teacher[:, :3], labels)
