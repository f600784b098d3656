"""Graph-on-logits distillation: validate, flatten, match the features of two graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.registry import settings
from ..inputs import TopK
from ..ops import gromov as ops
from .checks import check_floats, check_number, same_device

MAX_K = 4096  # kMaxTopK of csrc/common/topk.h
REDUCTIONS = ("none", "sum", "mean")


def graph_on_logits(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    k: int = 10,
    standardize: str | None = "vocab",
    aggregate: str = "mean",
    p: int = 1,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    scope: str = "sequence",
    reduction: str = "mean",
) -> Tensor:
    """Graph-on-logits distillation (GLD): match two co-activation graphs of top-k logits.

    Every position keeps its k largest logits, z-scored over its vocabulary and divided by the
    temperature: z_t (k), by rank, so vocabularies and lengths may differ. The positions of a
    sequence make the graph C = 1/T sum_t z_t z_t^T (T selected positions), its nodes the features
    f(i) = mean_j C_ij, and the loss matches the sorted features of student and teacher:

        loss = sum_i | sort(f_student)_i - sort(f_teacher)_i |^p

    With aggregate="mean" and p=1 that is k times the first lower bound of the Gromov-Wasserstein
    distance between the two graphs (`gromov_wasserstein(..., "first_lower_bound",
    loss="absolute")`): a lower bound, not an approximation from both sides. It is 0 for any two
    graphs with the same node degrees. The k x k graph is never formed: f(i) = mean over t and j of
    z_ti S_t with S_t = sum_j z_tj; the logits are read once.

    Args:
        student: logits [..., T, V]; float32, float16, bfloat16 or float64.
        teacher: logits [..., T', V'], the student's leading shape (scope "batch": any); dtypes are
            independent, float64 goes with float64. Gets a gradient only where it requires one.
            Or `TopK` with at least k entries a row, whose logits are kept or follow from lse; only
            with standardize=None, for K entries do not tell their vocabulary's mean and deviation.
        k: logits kept at each position, 1 to min(V, V', 4096). Default 10, the best of InfiFusion's
            sweep.
        standardize: "vocab": z-score each position with the mean and the population deviation
            (+ 1e-6) of its vocabulary, whose gradient then reaches every logit; None: raw logits
            (then the loss is not invariant to a shift of the logits).
        aggregate: "mean" or "sum" over the k columns of C in f.
        p: 1, or 2: squared differences, no root.
        temperature: tau > 0 of the student, applied after the z-score.
        teacher_temperature: the teacher's; defaults to `temperature`.
        mask: bool [..., T]: True positions are selected. What the others hold is never used.
        teacher_mask: bool [..., T']. Defaults to `mask` where the two have the same positions.
        scope: "sequence": one graph for each entry of the leading shape; "batch": one graph of all
            positions.
        reduction: "none": a value for each graph ([...]; 0-d for scope "batch"); "sum"; "mean" over
            the graphs that have a selected position on both sides (the others are 0).

    Returns:
        float32 (float64 for float64 logits). Equal logits are kept by the lowest index; where
        features are equal to each other or to their partner, the gradient is one of the
        directional ones. -inf logits are no part of the vocabulary. NaN stays in its graph.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Among them: k beyond
            a vocabulary, no position at all, and the two standardizations that make the loss 0 for
            all inputs: over the kept k, and over the vocabulary with k = V (z-scores add up to 0).

    InfiGFusion (Wang et al., 2025); the bound: Memoli, Found. Comput. Math. 11 (2011).
    """
    return match_graphs(
        student,
        [teacher],
        [teacher_mask],
        ["teacher"],
        None,
        k=k,
        standardize=standardize,
        aggregate=aggregate,
        p=p,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        scope=scope,
        reduction=reduction,
    )


def match_graphs(
    student: Tensor,
    teachers: Sequence[Tensor | TopK],
    teacher_masks: Sequence[Tensor | None],
    names: Sequence[str],
    weights: Sequence[float] | Tensor | None,
    *,
    k: int,
    standardize: str | None,
    aggregate: str,
    p: int,
    temperature: float,
    teacher_temperature: float | None,
    mask: Tensor | None,
    scope: str,
    reduction: str,
) -> Tensor:
    """`graph_on_logits` against several teachers, the student read once: the sum of the reduced
    losses, each times its weight. `names` are what errors call the teachers."""
    average = _check_choices(k, standardize, aggregate, p, scope, reduction)
    tau = check_number(temperature, "temperature", positive=True)
    teacher_tau = tau
    if teacher_temperature is not None:
        teacher_tau = check_number(teacher_temperature, "teacher_temperature", positive=True)
    _check_logits(student, "student", k, standardize)
    given = teachers
    teachers = [_dense(t, name, k, standardize) for t, name in zip(given, names)]
    for teacher, name in zip(teachers, names):
        _check_logits(teacher, name, k, standardize)
        same_device(teacher, name, student)
        if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
            raise TypeError(
                f"{name}: float64 goes with float64 only, got student {student.dtype} and {name} "
                f"{teacher.dtype}"
            )
        if scope == "sequence" and teacher.shape[:-2] != student.shape[:-2]:
            raise ValueError(
                f"{name}: expected leading shape {tuple(student.shape[:-2])} like the student (of "
                f"[..., T, V]), got shape {tuple(teacher.shape)}"
            )
    mask = _check_mask(mask, "mask", student)
    options = (k, standardize is not None, average)
    f_student, has_student = _features(student, mask, scope, tau, options)
    total = None
    for i, (teacher, teacher_mask) in enumerate(zip(teachers, teacher_masks)):
        if teacher_mask is None and mask is not None:
            if teacher.shape[:-1] != mask.shape:
                raise ValueError(
                    "teacher_mask: needed beside mask where student and teacher differ in "
                    f"positions, got {tuple(mask.shape)} and {tuple(teacher.shape[:-1])}"
                )
            teacher_mask = mask
        teacher_mask = _check_mask(teacher_mask, "teacher_mask", teacher)
        if isinstance(given[i], TopK):
            _check_present(given[i], teacher_mask, names[i], k)
        f_teacher, has_teacher = _features(teacher, teacher_mask, scope, teacher_tau, options)
        loss = _match(f_student, f_teacher, p, _both(has_student, has_teacher), reduction)
        loss = loss if weights is None else weights[i] * loss
        total = loss if total is None else total + loss
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    leading = student.shape[:-2] if scope == "sequence" else ()
    return total.to(dtype).view(leading if reduction == "none" else ())


def _features(
    logits: Tensor, mask: Tensor | None, scope: str, tau: float, options: tuple[int, bool, bool]
) -> tuple[Tensor, Tensor | None]:
    """f (G, k) float64, and whether a graph has a position (G,), None: all have."""
    graphs = math.prod(logits.shape[:-2]) if scope == "sequence" else 1
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    if not torch.compiler.is_compiling() and settings().debug:
        _debug(rows, mask)
    flat = None if mask is None else mask.reshape(-1)
    k, standardize, average = options
    f = ops.graph_nodes(rows, flat, ops.NodeOptions(k, graphs, standardize, average, tau))
    return f, None if flat is None else flat.view(graphs, rows.shape[0] // max(graphs, 1)).any(-1)


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _match(
    f_student: Tensor, f_teacher: Tensor, p: int, has: Tensor | None, reduction: str
) -> Tensor:
    """Distance of the sorted features (G, k), float64."""
    ranked = [f.sort(dim=-1, descending=True, stable=True).values for f in (f_student, f_teacher)]
    difference = ranked[0] - ranked[1]
    values = (difference.abs() if p == 1 else difference * difference).sum(-1)
    if has is not None:
        values = torch.where(has, values, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum" or values.numel() == 0:
        return values.sum()
    return values.sum() / (values.numel() if has is None else has.sum().clamp(min=1))


# Checks. ----------------------------------------------------------------------------------------


def _check_choices(k, standardize, aggregate, p, scope, reduction) -> bool:
    """Refuses what is none of the choices; whether features are means."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k: expected 1 to {MAX_K}, got {k}")
    if standardize == "topk":
        raise ValueError(
            "standardize: z-scores over the kept k add up to 0 at every position, so the loss is 0 "
            "for all inputs; use 'vocab' (z-scores over the vocabulary) or None"
        )
    if standardize not in ("vocab", None):
        raise ValueError(f"standardize: expected 'vocab' or None, got {standardize!r}")
    if aggregate not in ("mean", "sum"):
        raise ValueError(f"aggregate: expected 'mean' or 'sum', got {aggregate!r}")
    if isinstance(p, bool) or p not in (1, 2):
        raise ValueError(f"p: expected 1 or 2, got {p!r}")
    if scope not in ("sequence", "batch"):
        raise ValueError(f"scope: expected 'sequence' or 'batch', got {scope!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    return aggregate == "mean"


def _dense(teacher: Tensor | TopK, name: str, k: int, standardize: str | None) -> Tensor:
    """A TopK as rows of K logits."""
    if not isinstance(teacher, TopK):
        return teacher
    if standardize is not None:
        raise ValueError(
            f"standardize: z-scores need the whole vocabulary and {name} is a TopK; use "
            "standardize=None, or dense logits"
        )
    entries = teacher.values.shape[-1]
    if k > entries:
        raise ValueError(f"k: {k} is more than the {entries} entries of the {name}")
    return teacher.logits(name)


def _check_present(given: TopK, mask: Tensor | None, name: str, k: int) -> None:
    """Every selected row has k entries (on CPU in eager mode; elsewhere its graph is NaN)."""
    if given.indices.device.type != "cpu" or torch.compiler.is_compiling():
        return
    present = (given.indices >= 0).sum(-1)
    if mask is not None:
        present = present[mask]
    if present.numel() and int(present.min()) < k:
        raise ValueError(
            f"{name}: expected at least k = {k} entries in every selected row, got one with "
            f"{int(present.min())}"
        )


def _check_logits(logits: Tensor, name: str, k: int, standardize: str | None) -> None:
    check_floats(logits, name)
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape [..., T, V], V >= 1, got {tuple(logits.shape)}")
    if logits.shape[-2] < 1:
        raise ValueError(
            f"{name}: expected at least one position, got shape {tuple(logits.shape)} ([..., T, V])"
        )
    if k > logits.shape[-1]:
        raise ValueError(f"k: {k} is more than the {logits.shape[-1]} logits of the {name}")
    if k == logits.shape[-1] and standardize is not None:
        raise ValueError(
            f"k: z-scores over the vocabulary add up to 0 with k = V = {k} ({name}), so its "
            "features are 0 for all inputs; use a smaller k, or standardize=None"
        )


def _check_mask(mask: Tensor | None, argument: str, logits: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{argument}: expected a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{argument}: expected a bool tensor, got {mask.dtype}")
    same_device(mask, argument, logits)
    if mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"{argument}: expected shape {tuple(logits.shape[:-1])} (positions), got "
            f"{tuple(mask.shape)}"
        )
    return mask


def _debug(rows: Tensor, mask: Tensor | None) -> None:
    """kd.debug(): look at the data whatever it costs."""
    bad = torch.isnan(rows).any(-1)
    if mask is not None:
        bad = bad & mask.reshape(-1)
    if bool(bad.any()):
        raise ValueError("logits: NaN in a selected position")
