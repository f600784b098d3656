"""Named losses: `register` puts a class into the catalogue, `loss` builds one by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

STATUSES = ("source", "paper", "secondary", "unseen", "-")


class CatalogueEntry(NamedTuple):
    name: str
    aliases: tuple[str, ...]
    paper: str
    family: str
    status: str  # how the formula is known: code read, paper, another's text, unseen
    parameters: dict[str, Any]  # name -> default; inspect.Parameter.empty where it must be given
    loss: type[nn.Module]


_entries: dict[str, CatalogueEntry] = {}
_names: dict[str, str] = {}  # name or alias -> name


def register(
    name: str,
    *,
    aliases: tuple[str, ...] = (),
    paper: str = "",
    family: str = "",
    status: str = "source",
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator; parameters are read from `__init__`."""
    if status not in STATUSES:
        raise ValueError(f"status: expected one of {', '.join(STATUSES)}, got {status!r}")

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        for known in (name, *aliases):
            if known in _names:
                raise ValueError(f"name: {known!r} is registered twice")
            _names[known] = name
        parameters = {
            p.name: p.default for p in list(inspect.signature(cls.__init__).parameters.values())[1:]
        }
        _entries[name] = CatalogueEntry(name, aliases, paper, family, status, parameters, cls)
        return cls

    return add


def catalogue() -> list[CatalogueEntry]:
    """Every named loss, by name."""
    return [_entries[name] for name in sorted(_entries)]


def loss(name: str, **parameters: Any) -> nn.Module:
    """The loss of that name or alias, built with `parameters`.

    Raises:
        ValueError: Unknown name; the message offers the nearest ones.
        TypeError: A parameter the loss does not have.
    """
    key = _names.get(name)
    if key is None:
        near = difflib.get_close_matches(str(name), _names, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"name: {name!r} is no loss of kd.catalogue(){hint}")
    entry = _entries[key]
    unknown = [p for p in parameters if p not in entry.parameters]
    if unknown:
        raise TypeError(
            f"{name}: has no parameter {', '.join(unknown)}; it has {', '.join(entry.parameters)}"
        )
    return entry.loss(**parameters)
