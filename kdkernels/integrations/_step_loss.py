"""The loss of one micro-batch as trainers need it: any way to name it, one way to call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import kdkernels as kd

IGNORE_INDEX = -100

# What the trainer passes to kd.divergence itself, and what has no meaning for it. Named here so
# that a clash is an error at construction and not in the middle of a run.
_RESERVED_PARAMETERS = frozenset(
    [
        "labels",
        "ignore_index",
        "mask",
        "weight",
        "reduction",
        "normalize",
        "num_items",
        "vocab_size",
        "teacher_vocab_size",
        "class_dim",
        "teacher_weights",
        "inplace",
        "group",
        "vocab_start",
        "return_stats",
        "support",
    ]
)
# Elements of one chunk when the label cross entropy is measured: 16 MiB in float32.
_CHUNK_ELEMENTS = 1 << 22


class StepLoss:
    """A divergence kind, a catalogue name or a callable behind one call.

    `label_weight` is the factor of the label cross entropy inside the loss, None where it cannot
    be known; `module` is the nn.Module of a catalogue loss, otherwise None.

    Args:
        loss: kind of `kd.divergence` (str or tuple of weighted kinds), name of
            `kd.catalogue()`, or `loss(student, teacher, labels=..., num_items=...) -> 0-d`.
        parameters: keyword parameters of a named loss, or None.
        device: where the kind and its parameters are tried out.
        inplace: whether in-place gradients will be asked for; only divergences have them.

    Raises:
        TypeError, ValueError: naming `loss`, `loss_parameters` or `inplace_logits`.
    """

    def __init__(
        self,
        loss: str | tuple | Callable[..., torch.Tensor],
        parameters: dict[str, Any] | None,
        device: torch.device,
        inplace: bool = False,
    ) -> None:
        if parameters is not None and not isinstance(parameters, dict):
            raise TypeError(f"loss_parameters: got {type(parameters).__name__}, expected a dict")
        if not isinstance(loss, (str, tuple)) and not callable(loss):
            raise TypeError(
                f"loss: got {type(loss).__name__}, expected a name, a tuple of weighted kinds or "
                "a callable"
            )
        parameters = dict(parameters or {})
        reserved = sorted(_RESERVED_PARAMETERS.intersection(parameters))
        if reserved:
            raise ValueError(f"loss_parameters: got {reserved}, which the trainer itself sets")
        self.label_weight: float | None = None
        self.module: nn.Module | None = None
        self._divergence: tuple[Any, dict[str, Any]] | None = None
        self._scalar: Callable[..., torch.Tensor] | None = None
        self._name = repr(loss) if isinstance(loss, (str, tuple)) else "the callable"
        if callable(loss):
            if parameters:
                raise ValueError(
                    f"loss_parameters: got {sorted(parameters)} with a callable loss, expected "
                    "none; bind them with functools.partial"
                )
            self._scalar = loss
        else:
            self._resolve_name(loss, parameters, device)
        if inplace and self._divergence is None:
            raise ValueError(
                f"inplace_logits: got True with loss {self._name}, expected a kind of kd.divergence"
            )

    def _resolve_name(self, loss: str | tuple, parameters: dict, device: torch.device) -> None:
        unknown = _refusal(loss, {}, device)
        if unknown is None:
            refused = _refusal(loss, parameters, device)
            if refused is not None:
                raise _renamed(refused, f"loss_parameters: got {parameters!r}")
            self._divergence = (loss, parameters)
            self.label_weight = float(parameters.get("label_weight", 0.0))
        elif isinstance(loss, str) and loss != "entropy" and hasattr(kd, "loss"):
            self.module = _catalogue_module(loss, parameters).to(device)
            self._scalar = self.module
        else:
            raise _renamed(unknown, f"loss: got {loss!r}")

    def __call__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,
        num_items: torch.Tensor,
        valid: int,
        inplace: bool = False,
    ) -> torch.Tensor:
        """Sum over the selected rows / num_items, 0-d; logits (..., V), labels (...)."""
        if self._divergence is not None:
            kind, parameters = self._divergence
            return kd.divergence(
                student,
                teacher,
                kind,
                labels=labels,
                ignore_index=IGNORE_INDEX,
                num_items=num_items,
                vocab_size=valid if valid < student.shape[-1] else None,
                teacher_vocab_size=valid if valid < teacher.shape[-1] else None,
                inplace=inplace,
                **parameters,
            )
        # A full slice is not a copy, but it is a node in the graph for nothing.
        student = student if valid == student.shape[-1] else student[..., :valid]
        teacher = teacher if valid == teacher.shape[-1] else teacher[..., :valid]
        result = self._scalar(student, teacher, labels=labels, num_items=num_items)
        if not isinstance(result, torch.Tensor) or result.dim() != 0:
            shown = tuple(getattr(result, "shape", ())) or type(result).__name__
            raise ValueError(f"loss: {self._name} returned {shown}, expected a 0-d tensor")
        return result


def _refusal(kind: Any, parameters: dict[str, Any], device: torch.device) -> Exception | None:
    """What kd.divergence says to this kind and these parameters, found out on two rows."""
    if kind == "entropy":
        return ValueError("expected a kind that compares with a teacher")
    bias = parameters.get("teacher_bias")
    width = bias.shape[-1] if isinstance(bias, torch.Tensor) and bias.dim() else 4
    logits = torch.zeros(2, width, device=device)
    labels = torch.tensor([0, IGNORE_INDEX], device=device)
    try:
        kd.divergence(logits, logits.clone(), kind, labels=labels, **parameters)
    except (TypeError, ValueError) as error:
        return error
    return None


def _renamed(error: Exception, prefix: str) -> Exception:
    kind = ValueError if isinstance(error, ValueError) else TypeError
    renamed = kind(f"{prefix}; {error}")
    renamed.__cause__ = error
    return renamed


def _catalogue_module(name: str, parameters: dict[str, Any]) -> nn.Module:
    module = kd.loss(name, **parameters)
    if "num_items" not in inspect.signature(module.forward).parameters:
        raise ValueError(
            f"loss: got {name!r}, which takes no num_items, expected a loss that sums over rows; "
            "pass a callable that feeds it"
        )
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"loss: got {name!r} with trained parameters, which the student's optimiser does not "
            "hold; make it a part of the student and pass a callable"
        )
    return module


def label_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropy over rows, nats, float32, without gradient.

    Args:
        logits: (..., V), any float dtype.
        labels: (...), int64; -100 counts nothing.

    Computed in chunks, so that no tensor of the logits' size is added to the step.
    """
    width = logits.shape[-1]
    rows = logits.detach().flatten(0, -2)  # (N, V)
    labels = labels.flatten()  # (N,)
    size = max(64, _CHUNK_ELEMENTS // width)
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    for start in range(0, rows.shape[0], size):
        part = slice(start, start + size)
        total += F.cross_entropy(
            rows[part].float(), labels[part], ignore_index=IGNORE_INDEX, reduction="sum"
        )
    return total


def logits_of(outputs: Any, argument: str) -> torch.Tensor:
    """The logits (..., V) of a model's output; TypeError naming `argument` where there are none."""
    if isinstance(outputs, dict):
        logits = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)) and outputs:
        logits = outputs[0]
    else:
        logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, torch.Tensor) or logits.dim() < 2:
        raise TypeError(
            f"{argument}: got {type(outputs).__name__} without logits, expected a tensor, an "
            "output with .logits or a tuple that starts with them"
        )
    return logits
