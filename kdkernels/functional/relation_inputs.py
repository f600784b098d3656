"""What stands where a relation's tokens and masks stand: shapes, heads, masks, normalised rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import relation_spec as R
from ..ops.relation_stream import Selection
from .checks import check_floats


class Graphs(NamedTuple):
    """Tokens of one side, leading dimensions flattened into H graphs."""

    q: Tensor  # (H, N, d) compute dtype
    k: Tensor | None  # (H, M, d), or None: q with itself
    leading: torch.Size
    dtype: torch.dtype  # float32 or float64

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M)."""
        return self.q.shape[1], self.q.shape[1] if self.k is None else self.k.shape[1]

    def turned(self) -> Graphs:
        """The relation (K, Q)."""
        return self if self.k is None else self._replace(q=self.k, k=self.q)


def _tokens(x: Tensor, argument: str, heads: int | None) -> tuple[Tensor, torch.Size]:
    check_floats(x, argument)
    if x.dim() < 2 or x.shape[-1] < 1:
        raise ValueError(f"{argument}: expected shape [..., N, d], d >= 1, got {tuple(x.shape)}")
    if heads is not None:
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ValueError(f"relation_heads: expected an integer >= 1, got {heads!r}")
        if x.shape[-1] % heads:
            raise ValueError(
                f"relation_heads: {heads} heads do not divide the {argument}'s width {x.shape[-1]}"
            )
        x = x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(-2, -3)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    leading = x.shape[:-2]
    graphs = 1
    for size in leading:
        graphs *= size
    return x.to(dtype).reshape(graphs, *x.shape[-2:]), leading


def graphs_of(side: Tensor | tuple[Tensor, Tensor], argument: str, heads: int | None) -> Graphs:
    if not isinstance(side, (tuple, list)):
        x, leading = _tokens(side, argument, heads)
        return Graphs(x, None, leading, x.dtype)
    if len(side) != 2:
        raise ValueError(f"{argument}: expected X or a pair (Q, K), got {len(side)} tensors")
    q, leading = _tokens(side[0], f"{argument}'s Q", heads)
    k, other = _tokens(side[1], f"{argument}'s K", heads)
    if leading != other or q.shape[-1] != k.shape[-1] or q.dtype != k.dtype:
        raise ValueError(
            f"{argument}: Q and K need equal leading dimensions, widths and dtypes, got "
            f"{tuple(side[0].shape)} and {tuple(side[1].shape)}"
        )
    if q.device != k.device:
        raise ValueError(f"{argument}: Q is on {q.device}, K on {k.device}")
    return Graphs(q, k, leading, q.dtype)


def half_code(*sides: Tensor | tuple[Tensor, Tensor] | None) -> float:
    """RelationSpec.half of tokens that are multiplied as they are: the half type that all share."""
    tensors = [x for side in sides for x in (side if isinstance(side, (tuple, list)) else (side,))]
    dtypes = {x.dtype for x in tensors if x is not None}
    shared = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return float(R.HALVES.index(shared)) if shared in R.HALVES else 0.0


def _fits(leading: tuple[int, ...], graphs: Graphs) -> bool:
    """Whether these dimensions are the first of the tokens' leading ones, or 1."""
    if len(leading) > len(graphs.leading):
        return False
    return all(a in (1, b) for a, b in zip(leading, graphs.leading))


def _expand(tensor: Tensor, graphs: Graphs, own: int) -> Tensor:
    """[lead..., own dims] -> (H, own dims): a copy of N entries a graph at most."""
    missing = len(graphs.leading) - (tensor.dim() - own)
    shape = tensor.shape[: tensor.dim() - own] + (1,) * missing + tensor.shape[tensor.dim() - own :]
    tensor = tensor.reshape(shape).expand((*graphs.leading, *shape[len(graphs.leading) :]))
    return tensor.reshape((graphs.q.shape[0], *shape[len(graphs.leading) :]))


def _check_mask(mask: object, argument: str, graphs: Graphs) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{argument}: expected a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{argument}: expected a bool tensor, got {mask.dtype}")
    if mask.device != graphs.q.device:
        raise ValueError(
            f"{argument}: expected a tensor on {graphs.q.device} like the student, "
            f"got {mask.device}"
        )


def _token_mask(mask: Tensor, argument: str, graphs: Graphs, tokens: int) -> Tensor:
    _check_mask(mask, argument, graphs)
    if mask.dim() < 1 or mask.shape[-1] != tokens or not _fits(mask.shape[:-1], graphs):
        raise ValueError(
            f"{argument}: expected shape [..., {tokens}] with leading dimensions "
            f"{tuple(graphs.leading)} or the first of them, got {tuple(mask.shape)}"
        )
    return _expand(mask, graphs, 1)


def selection_of(
    mask: Tensor | tuple[Tensor, Tensor] | None, graphs: Graphs, blocks: Tensor | None
) -> tuple[Selection, bool]:
    """The selection, and whether it is one of tokens (rows x columns)."""
    ids = {"row_block": blocks, "column_block": blocks}
    if mask is None:
        return Selection(**ids), True
    rows, columns = graphs.shape
    if isinstance(mask, (tuple, list)):
        if len(mask) != 2:
            raise ValueError(f"mask: expected a tensor or (rows, columns), got {len(mask)} tensors")
        row = _token_mask(mask[0], "mask's rows", graphs, rows)
        return Selection(row, _token_mask(mask[1], "mask's columns", graphs, columns), **ids), True
    _check_mask(mask, "mask", graphs)
    as_tokens = mask.dim() >= 1 and mask.shape[-1] == rows and _fits(mask.shape[:-1], graphs)
    if as_tokens and rows == columns:
        row = _expand(mask, graphs, 1)
        return Selection(row, row, **ids), True
    if (
        mask.dim() < 2
        or tuple(mask.shape[-2:]) != (rows, columns)
        or not _fits(mask.shape[:-2], graphs)
    ):
        raise ValueError(
            f"mask: expected shape [..., {rows}] (tokens, where rows and columns are as many) or "
            f"[..., {rows}, {columns}] (pairs) with leading dimensions {tuple(graphs.leading)}, "
            f"got {tuple(mask.shape)}"
        )
    # Graphs that share a mask share its memory: an index says which one serves whom.
    lead = mask.shape[:-2]
    count = 1
    for size in lead:
        count *= size
    index = torch.arange(count, device=mask.device).reshape(lead)
    pairs = mask.reshape(count, rows, columns)
    return Selection(pair_mask=pairs, pair_index=_expand(index, graphs, 0), **ids), False


def block_ids(block: Tensor | None, graphs: Graphs) -> Tensor | None:
    """(H, N) int64."""
    if block is None:
        return None
    if not isinstance(block, Tensor):
        raise TypeError(f"block: expected an integer tensor, got {type(block).__name__}")
    if block.is_floating_point() or block.is_complex() or block.dtype == torch.bool:
        raise TypeError(f"block: expected an integer tensor, got {block.dtype}")
    if block.device != graphs.q.device:
        raise ValueError(f"block: expected a tensor on {graphs.q.device}, got {block.device}")
    tokens = graphs.shape[0]
    if block.dim() < 1 or block.shape[-1] != tokens or not _fits(block.shape[:-1], graphs):
        raise ValueError(f"block: expected shape [..., {tokens}], got {tuple(block.shape)}")
    return _expand(block.long(), graphs, 1)


def without_masked(s: Graphs, t: Graphs, selection: Selection) -> tuple[Graphs, Graphs]:
    """Zeros for tokens that are not selected: whatever stood there must not reach a product."""
    if selection.row_mask is None:
        return s, t

    def clean(x: Tensor | None, mask: Tensor) -> Tensor | None:
        return None if x is None else torch.where(mask[:, :, None], x, torch.zeros_like(x))

    return tuple(
        g._replace(q=clean(g.q, selection.row_mask), k=clean(g.k, selection.column_mask))
        for g in (s, t)
    )


def normalised(
    graphs: Graphs, kind: str, similarity: str, detach_norm: bool, selection: Selection
) -> Graphs:
    """Unit rows for cosine; centred tokens for distances, which loses fewer digits."""

    def unit(x: Tensor) -> Tensor:
        if kind == "gram_row_l1":
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return x / ((norm.detach() if detach_norm else norm) + R.PKT_EPSILON)
        if detach_norm:
            norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
            return x / norm.clamp(min=R.NORM_FLOOR)
        return F.normalize(x, dim=-1, eps=R.NORM_FLOOR)

    if similarity == "cosine":
        graphs = graphs._replace(q=unit(graphs.q), k=None if graphs.k is None else unit(graphs.k))
    if kind in ("distance", "angle"):
        # The same shift on both sides of a difference changes nothing, so it carries no gradient.
        x = graphs.q.detach() if graphs.k is None else graphs.k.detach()
        weight = selection.column_mask
        if weight is None:
            centre = x.mean(1, keepdim=True)
        else:
            count = weight.sum(1)[:, None, None].clamp(min=1)
            centre = (x * weight[:, :, None]).sum(1, keepdim=True) / count
        graphs = graphs._replace(
            q=graphs.q - centre, k=None if graphs.k is None else graphs.k - centre
        )
    return graphs
