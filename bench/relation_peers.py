"""Peers' losses of relations, as installed; no code of a peer stands here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .peers import Peer, import_peer

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # student, teacher (N, d) -> ()


def _torchdistill(name: str, note: str = "", **options) -> Peer:
    def load() -> Loss:
        criterion = getattr(import_peer("torchdistill.losses.mid_level"), name)(**options)

        def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            sides = ({"x": {"output": x.reshape(-1, x.shape[-1])}} for x in (student, teacher))
            return criterion(*sides)

        return loss

    return Peer(f"torchdistill {name}", load, note, value_is_comparable=not note)


def similarity_preserving() -> Peer:
    """torchdistill: SPKDLoss."""
    return _torchdistill(
        "SPKDLoss",
        "divides the rows by their sums of absolute values, the paper by their Euclidean norms",
        student_output_path="x",
        teacher_output_path="x",
        reduction="batchmean",
    )


def probabilistic_transfer() -> Peer:
    """torchdistill: PKTLoss."""
    io = {"student_module_io": "output", "teacher_module_io": "output"}
    return _torchdistill("PKTLoss", student_module_path="x", teacher_module_path="x", **io)


def relational(distance: float, angle: float) -> Peer:
    """torchdistill: RKDLoss, one of its two parts."""
    return _torchdistill(
        "RKDLoss",
        student_output_path="x",
        teacher_output_path="x",
        dist_factor=distance,
        angle_factor=angle,
        reduction="mean",
    )
