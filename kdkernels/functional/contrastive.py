"""Contrastive losses without the N x M map of logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.relation_spec import RelationSpec
from ..ops import relation as ops
from .checks import check_floats, check_number, same_device
from .relation_inputs import Graphs, half_code, selection_of

# Entries of a soft or boolean target that are converted at a time.
_ENTRIES = 1 << 20


class _Gather(torch.autograd.Function):
    """All ranks' rows, in rank order. Backward sums each row's gradients over the ranks."""

    @staticmethod
    def forward(ctx, rows: Tensor, group) -> Tensor:
        ctx.group = group
        size = dist.get_world_size(group)
        out = rows.new_empty((size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        own = gradient.shape[0] // dist.get_world_size(ctx.group)
        first = dist.get_rank(ctx.group) * own
        return gradient[first : first + own], None


def contrastive(
    query: Tensor,
    key: Tensor,
    *,
    positives: Tensor | None = None,
    queue: Tensor | None = None,
    scale: float | Tensor = 1.0,
    symmetric: bool = False,
    target: Tensor | tuple[Tensor, Tensor] | None = None,
    label_mix: float = 0.0,
    row_offset: int = 0,
    group=None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    exclude_diagonal: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of softmax(scale x query key^T) with the positives; no N x M map is held.

    Rows are used as they come: normalise them for cosines (InfoNCE, van den Oord et al., 2018;
    CLIP, Radford et al., 2021; supervised contrastive, Khosla et al., 2020).

    Args:
        query: [N, d]; float32, float16, bfloat16 or float64.
        key: [M, d]; gets a gradient where it requires one.
        positives: which columns are positive: None = column row + row_offset; int64 [N] or [N, P]
            (-1 = absent); bool [N, M]. With several the mean of their log-probabilities counts; a
            row without one is not selected.
        queue: [Q, d] further columns, always negative, without gradient.
        scale: a number > 0 or a 0-d tensor, with gradient.
        symmetric: average with the loss of key to query (CLIP); positives are the diagonal.
        target: soft target instead: rows [N, M] (constants), or (query, key) of a teacher whose
            softmax at the same scale, over the same columns, is the target. With a queue the pair's
            key may hold its own queue's rows behind the M keys.
        label_mix: share of the positives beside `target`: (1 - label_mix) target + label_mix
            positives.
        row_offset: the column of row 0's positive (rows sharded over devices).
        group: a process group: keys of all its ranks are columns (equal M on each), the positive of
            a row is its own rank's; gradients of keys are summed over ranks. Each rank returns the
            mean over its own rows; the mean over ranks (as DDP takes) is the whole loss.
        mask: bool [N] selects rows; bool [N, M + Q] selects pairs.
        labels: int64 [N], N = M, keys row by row: positives are the other rows of the same label.
        exclude_diagonal: leave the pairs (i, i + row_offset) out of the softmax.
        reduction: "mean" over selected rows, "sum" or "none" [N].

    Returns:
        float32 (float64 for float64 inputs).
    """
    half = half_code(query, key, queue, target if isinstance(target, (tuple, list)) else None)
    query, key, queue = _check(query, key, queue, reduction)
    rows = query.shape[0]
    if isinstance(row_offset, bool) or not isinstance(row_offset, int):
        raise TypeError(f"row_offset: expected an integer, got {row_offset!r}")
    label_mix = check_number(label_mix, "label_mix")
    if symmetric:
        if positives is not None or labels is not None or isinstance(target, Tensor):
            raise ValueError("symmetric: positives are the diagonal, a target is a pair of tensors")
        if queue is not None or mask is not None or rows != key.shape[0]:
            raise ValueError("symmetric: needs N = M, no queue and no mask")
        options = dict(
            scale=scale,
            label_mix=label_mix,
            group=group,
            row_offset=row_offset,
            exclude_diagonal=exclude_diagonal,
            reduction=reduction,
        )
        forward = contrastive(query, key, target=target, **options)
        turned = None if target is None else target[::-1]
        return (forward + contrastive(key, query, target=turned, **options)) / 2
    if group is not None:
        row_offset += dist.get_rank(group) * key.shape[0]
        key = _Gather.apply(key, group)
        if isinstance(target, tuple):
            target = (target[0], _Gather.apply(target[1], group))
    if isinstance(mask, Tensor) and mask.dim() == 1:
        # Whatever stands in a row that does not count must not reach the keys' gradient.
        query = torch.where(mask[:, None], query, torch.zeros_like(query))
    keys = key if queue is None else torch.cat([key, queue])
    scale = _scale(scale, query)
    row_mask, selection = _selection(mask, query, keys)
    spec = RelationSpec(
        exclude_diagonal=float(exclude_diagonal), diagonal=float(row_offset), half=half
    )

    selected = row_mask
    if target is None or label_mix:
        mean, has = _positive_mean(query, key, positives, labels, row_offset)
        selected = row_mask & has
    # A sum over rows is one walk: its gradient is made along with the values. Rows that are wanted
    # one by one, or weighted by a soft target's mass, wait for their upstream.
    by_rows = reduction == "none" or isinstance(target, Tensor)
    if not by_rows:
        own = selected[None]
        both = own if selection.row_mask is None else own & selection.row_mask
        selection = selection._replace(row_mask=both)

    def walk(kind: str, q_t: Tensor | None = None, k_t: Tensor | None = None) -> Tensor:
        """Row values (N,), or their sum over the selected rows; float64."""
        found = ops.relation(
            query[None],
            keys[None],
            None if q_t is None else q_t[None],
            None if k_t is None else k_t[None],
            scale,
            None if q_t is None else scale.detach(),
            kind,
            spec,
            selection,
            "rows" if by_rows else "graph",
        )
        return found.value[0]

    hard = value = None
    if target is None or label_mix:
        products = scale.double() * torch.where(selected, mean, torch.zeros_like(mean))
        hard = walk("log_sum_exp") - (products if by_rows else products.sum())
    if isinstance(target, Tensor):
        value = _soft_rows(query, keys, scale, target, walk)
    elif target is not None:
        value = walk("softmax_cross_entropy", *_teacher_pair(query, keys, target, queue))
    if value is None:
        value = hard
    elif label_mix:
        value = (1 - label_mix) * value + label_mix * hard
    if by_rows:
        value = torch.where(selected, value, torch.zeros_like(value))
        if reduction == "none":
            return value.to(query.dtype)
        value = value.sum()
    if reduction == "mean":
        value = value / selected.sum().clamp(min=1)
    return value.to(query.dtype)


def _check(query, key, queue, reduction):
    for tensor, argument in ((query, "query"), (key, "key"), (queue, "queue")):
        if tensor is None:
            continue
        check_floats(tensor, argument)
        if tensor.dim() != 2 or tensor.shape[1] < 1:
            raise ValueError(f"{argument}: expected shape [N, d], got {tuple(tensor.shape)}")
        if tensor.shape[1] != query.shape[1]:
            raise ValueError(
                f"{argument}: expected width {query.shape[1]} like the query, got {tensor.shape[1]}"
            )
        same_device(tensor, argument, query)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    queue = None if queue is None else queue.detach().to(dtype)
    return query.to(dtype), key.to(dtype), queue


def _scale(scale, query: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        check_floats(scale, "scale")
        if scale.numel() != 1:
            raise ValueError(f"scale: expected one number, got shape {tuple(scale.shape)}")
        return scale.reshape(()).to(query)
    return torch.full_like(
        query[0, 0] if query.numel() else query.new_zeros(()),
        check_number(scale, "scale", positive=True),
    ).detach()


def _selection(mask, query: Tensor, keys: Tensor):
    """(rows that count (N,), selection of the map)."""
    graph = Graphs(query[None], keys[None], torch.Size(()), query.dtype)
    if mask is None:
        return torch.ones(query.shape[0], dtype=torch.bool, device=query.device), selection_of(
            None, graph, None
        )[0]
    if isinstance(mask, Tensor) and mask.dim() == 1:
        columns = torch.ones(keys.shape[0], dtype=torch.bool, device=keys.device)
        return mask, selection_of((mask, columns), graph, None)[0]
    selection = selection_of(mask, graph, None)[0]
    return mask.any(-1), selection


def _positive_mean(query, key, positives, labels, row_offset: int) -> tuple[Tensor, Tensor]:
    """Mean of <q_i, k_p> over the positives p of each row, float64 (N,), and which rows have any.

    The sum over positives of the keys is a linear map, so no logits are made.
    """
    rows = query.shape[0]
    if labels is not None:
        if positives is not None:
            raise ValueError("labels: positives are given already")
        if labels.shape != (rows,) or key.shape[0] != rows:
            raise ValueError(f"labels: expected shape ({rows},) and as many keys")
        # Classes are numbered by the order of their labels; as many as rows at most, so that nobody
        # has to wait for their count.
        ordered, order = labels.sort()
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        group = torch.empty_like(order).scatter(0, order, first.cumsum(0) - 1)
        counts = torch.zeros_like(order).scatter_add(0, group, torch.ones_like(order))[group]
        sums = torch.zeros_like(key).index_add(0, group, key)
        mean = (sums[group] - key) / (counts - 1).clamp(min=1)[:, None]
        return (query.double() * mean.double()).sum(-1), counts > 1
    every = torch.ones(rows, dtype=torch.bool, device=query.device)
    if positives is None:
        if row_offset < 0 or row_offset + rows > key.shape[0]:
            raise ValueError(
                f"row_offset: rows {row_offset} to {row_offset + rows - 1} are not all among the "
                f"{key.shape[0]} keys"
            )
        own = key[row_offset : row_offset + rows]
        return (query.double() * own.double()).sum(-1), every
    if not isinstance(positives, Tensor) or positives.shape[:1] != (rows,):
        raise ValueError(f"positives: expected a tensor of {rows} rows")
    same_device(positives, "positives", query)
    if positives.dtype == torch.bool:
        if tuple(positives.shape) != (rows, key.shape[0]):
            raise ValueError(
                f"positives: expected shape ({rows}, {key.shape[0]}), got {tuple(positives.shape)}"
            )
        count = positives.sum(-1)
        mean = _rows_times(positives, key) / count.clamp(min=1)[:, None]
        return (query.double() * mean.double()).sum(-1), count > 0
    if positives.dtype != torch.int64 or positives.dim() > 2:
        raise TypeError(f"positives: expected int64 [N] or [N, P], or bool, got {positives.dtype}")
    index = positives.reshape(rows, -1)
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= key.shape[0]:
            raise ValueError(
                f"positives: expected ids in [0, {key.shape[0]}) or -1, got {low} to {high}"
            )
    here = index >= 0
    total = torch.zeros((rows,), dtype=torch.float64, device=query.device)
    # One positive of every row at a time: [N, d], whatever P is.
    for own, valid in zip(index.clamp(min=0).unbind(1), here.unbind(1), strict=True):
        dots = (query.double() * key.index_select(0, own).double()).sum(-1)
        total = total + torch.where(valid, dots, torch.zeros_like(dots))
    return total / here.sum(-1).clamp(min=1), here.any(-1)


def _rows_times(target: Tensor, key: Tensor) -> Tensor:
    """target @ key for a bool or half target, converted in pieces."""
    step = max(1, _ENTRIES // max(target.shape[1], 1))
    return torch.cat([part.to(key.dtype) @ key for part in target.split(step)])


def _soft_rows(query, keys, scale, target: Tensor, walk) -> Tensor:
    """- sum_j t_ij log q_ij = (sum_j t_ij) lse_i - scale <q_i, sum_j t_ij k_j>."""
    rows, columns = query.shape[0], keys.shape[0]
    check_floats(target, "target")
    if target.requires_grad:
        raise ValueError("target: rows are constants; they must not require grad")
    if tuple(target.shape) != (rows, columns):
        raise ValueError(f"target: expected shape ({rows}, {columns}), got {tuple(target.shape)}")
    mass = target.double().sum(-1)
    mean = _rows_times(target, keys)
    return mass * walk("log_sum_exp") - scale.double() * (query.double() * mean.double()).sum(-1)


def _teacher_pair(query, keys, target, queue) -> tuple[Tensor, Tensor]:
    """The teacher's queries and keys in the student's dtype, as many as the student's."""
    if len(target) != 2:
        raise ValueError("target: expected rows [N, M] or a pair (query, key)")
    q, k = target
    check_floats(q, "target's query")
    check_floats(k, "target's key")
    q, k = q.to(query.dtype), k.to(query.dtype)
    if queue is not None and k.shape[0] + queue.shape[0] == keys.shape[0]:
        k = torch.cat([k, queue])
    if q.shape[0] != query.shape[0] or k.shape[0] != keys.shape[0]:
        raise ValueError(
            f"target: expected {query.shape[0]} queries and {keys.shape[0]} keys, got {q.shape[0]} "
            f"and {k.shape[0]}"
        )
    return q, k
