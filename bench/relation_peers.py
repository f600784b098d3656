"""Peers' losses of relations, as installed; no code of a peer stands here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .peers import Peer, import_peer

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # student, teacher (N, d) -> ()


def _torchdistill(name: str, scale: float = 1.0, **options) -> Peer:
    def load() -> Loss:
        criterion = getattr(import_peer("torchdistill.losses.mid_level"), name)(**options)

        def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            sides = ({"x": {"output": x.reshape(-1, x.shape[-1])}} for x in (student, teacher))
            return scale * criterion(*sides)

        return loss

    return Peer(f"torchdistill {name}", load)


def similarity_preserving() -> Peer:
    """torchdistill: SPKDLoss, divided by N^2 as kd.relation(kind="gram_row_l2")."""
    return _torchdistill(
        "SPKDLoss", student_output_path="x", teacher_output_path="x", reduction="batchmean"
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
