"""Queries, keys, values and hidden states of a transformer's layers, by forward hooks.

Relations need the projections, not the attention maps, so the model keeps the attention it runs
(SDPA, Flash); nothing is patched. Works on BERT, ViT, Llama, Qwen and models that name their
projections alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Names that a layer's projections have in transformers' models.
_PROJECTIONS = {
    "query": ("query", "q_proj"),
    "key": ("key", "k_proj"),
    "value": ("value", "v_proj"),
}
WHAT = (*_PROJECTIONS, "hidden")


def _projection(layer: nn.Module, what: str) -> nn.Module | None:
    """The layer's one submodule of that kind; of self-attention where there is cross-attention."""
    found = [
        module
        for name, module in layer.named_modules()
        if name.rsplit(".", 1)[-1] in _PROJECTIONS[what] and "cross" not in name.lower()
    ]
    return found[0] if len(found) == 1 else None


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The model's longest list of layers that project queries, keys and values."""
    best: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best):
            if all(_projection(layer, what) for layer in module for what in _PROJECTIONS):
                best = list(module)
    return best


class Capture:
    """What the chosen layers made in the model's last forward.

    `capture[layer][what]` is a tensor [B, S, width] (heads not split); `capture.triple(layer)` is
    (query, key, value). Use as a context manager, or call `remove()` in the end.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int], what: Iterable[str]):
        every = transformer_layers(model)
        if not every:
            raise ValueError(
                "model: found no list of layers whose modules are named query, key, value or "
                "q_proj, k_proj, v_proj"
            )
        self.what = (what,) if isinstance(what, str) else tuple(what)
        for name in self.what:
            if name not in WHAT:
                raise ValueError(f"what: expected some of {', '.join(WHAT)}, got {name!r}")
        self._count = len(every)
        self._captured: dict[int, dict[str, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for layer in layers:
            index = self._index(layer)
            self._captured[index] = {}
            for name in self.what:
                module = every[index] if name == "hidden" else _projection(every[index], name)
                self._handles.append(module.register_forward_hook(self._hook(index, name)))

    def _index(self, layer: int) -> int:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers: expected integers, got {layer!r}")
        if not -self._count <= layer < self._count:
            raise ValueError(f"layers: the model has {self._count} layers, got {layer}")
        return layer % self._count

    def _hook(self, index: int, name: str):
        def keep(module: nn.Module, inputs: tuple, output) -> None:
            self._captured[index][name] = output[0] if isinstance(output, tuple) else output

        return keep

    def __getitem__(self, layer: int) -> dict[str, Tensor]:
        index = self._index(layer)
        found = self._captured.get(index)
        if not found:
            known = ", ".join(str(i) for i in self._captured)
            raise KeyError(f"layer {layer}: captured are {known}, after a forward of the model")
        return found

    def triple(self, layer: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """(query, key, value) of a layer, each [B, S, width]."""
        found = self[layer]
        return tuple(found[name] for name in _PROJECTIONS)

    def clear(self) -> None:
        """Drops the tensors; the hooks stay."""
        for found in self._captured.values():
            found.clear()

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def capture(
    model: nn.Module,
    layers: Iterable[int] = (-1,),
    what: Iterable[str] = ("query", "key", "value"),
) -> Capture:
    """Captures what layers of a transformer make, by forward hooks.

    Args:
        model: a transformers model (BERT, ViT, Llama, Qwen) or one whose layers name their
            projections query, key, value or q_proj, k_proj, v_proj.
        layers: numbers of layers, negative ones from the end.
        what: some of "query", "key", "value" (projections [B, S, width], before heads are split and
            positions rotated) and "hidden" (the layer's output).

    Raises:
        ValueError: the model has no such layers, or a name or number that does not exist.
    """
    return Capture(model, layers, what)


def split_heads(projection: Tensor, heads: int) -> Tensor:
    """[B, S, heads x d] -> [B, heads, S, d]."""
    if heads < 1 or projection.shape[-1] % heads:
        raise ValueError(f"heads: {heads} do not divide the width {projection.shape[-1]}")
    return projection.unflatten(-1, (heads, -1)).transpose(-2, -3)
