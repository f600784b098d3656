"""Which backend serves which family on which device, and how a caller overrides it.

A backend is a module of this package that offers functions named `<family>_<fwd|bwd>`. It is
imported when first asked for. Asking for a backend that is not there is an error; only the
automatic choice may pass over one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

# "softmax_relation": the softmax kinds of "relation", streamed tile by tile. A backend may serve it
# beside "relation" or alone.
FAMILIES = ("divergence", "transport", "relation", "softmax_relation", "gromov")
NAMES = ("cuda", "cpu", "triton", "simt", "torch")
# Automatic choice, best first. simt is a development backend: never chosen by itself.
ORDER = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
# Devices whose memory a backend can read.
READS = {
    "cuda": ("cuda",),
    "cpu": ("cpu",),
    "triton": ("cuda",),
    "simt": ("cpu",),
    "torch": ("cuda", "cpu"),
}


class Settings(NamedTuple):
    """The only mutable state of the library."""

    backend: str | None
    debug: bool


class BackendReport(NamedTuple):
    family: str
    backend: str
    available: bool
    why_not: str


def _initial() -> Settings:
    backend = os.environ.get("KDK_BACKEND") or None
    if backend is not None and backend not in NAMES:
        raise ValueError(f"KDK_BACKEND: expected one of {', '.join(NAMES)}, got {backend!r}")
    return Settings(backend, os.environ.get("KDK_DEBUG", "0") not in ("", "0"))


_settings: ContextVar[Settings] = ContextVar("kdkernels_settings", default=_initial())  # noqa: B039
_modules: dict[str, ModuleType | str] = {}
_picked: dict[tuple, ModuleType] = {}


def settings() -> Settings:
    return _settings.get()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Use one backend inside the block: "cuda", "cpu", "triton", "simt", "torch"; None: automatic.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: the backend is not available here; the message says what to install or build.
    """
    if name is not None:
        if name not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
        load(name)
    token = _settings.set(_settings.get()._replace(backend=name))
    try:
        yield
    finally:
        _settings.reset(token)


@contextlib.contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Turn on the checks that cost a synchronisation (label range, NaN, parameters in tensors)."""
    token = _settings.set(_settings.get()._replace(debug=bool(enabled)))
    try:
        yield
    finally:
        _settings.reset(token)


def _try(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it is not available."""
    known = _modules.get(name)
    if known is None:
        module = importlib.import_module(f"kdkernels.backends.{name}")
        known = module.why_not() or module
        _modules[name] = known
    return known


def load(name: str) -> ModuleType:
    """The module of backend `name`, or RuntimeError with the reason."""
    module = _try(name)
    if isinstance(module, str):
        raise RuntimeError(f"backend {name!r} is not available: {module}")
    return module


def pick(family: str, device: str) -> ModuleType:
    """The backend that serves `family` for tensors on `device` ("cpu", "cuda").

    Raises:
        RuntimeError: the backend that was asked for is not available or does not serve the family.
        ValueError: it cannot read that device.
    """
    asked = _settings.get().backend
    found = _picked.get((asked, family, device))
    if found is None:
        found = _picked[asked, family, device] = _pick(asked, family, device)
    return found


def _pick(asked: str | None, family: str, device: str) -> ModuleType:
    if asked is not None:
        module = load(asked)
        reads = getattr(module, "READS", READS[asked])
        if device not in reads:
            raise ValueError(f"backend {asked!r} reads {' and '.join(reads)} tensors, got {device}")
        if family not in module.FAMILIES:
            raise RuntimeError(f"backend {asked!r} does not serve the family {family!r}")
        return module
    for name in ORDER.get(device, ()):
        module = _try(name)
        if not isinstance(module, str) and family in module.FAMILIES:
            return module
    raise ValueError(f"device: expected a tensor on cpu or cuda, got {device}")


def pick_any(families: tuple[str, ...], device: str) -> ModuleType:
    """The first backend that serves one of the families; one that was asked for may serve any."""
    asked = _settings.get().backend
    if asked is None:
        for name in ORDER.get(device, ()):
            module = _try(name)
            if not isinstance(module, str) and any(f in module.FAMILIES for f in families):
                return module
        return pick(families[0], device)
    served = [f for f in families if f in load(asked).FAMILIES]
    return pick(served[0] if served else families[0], device)


def backends() -> list[BackendReport]:
    """Every (family, backend) with whether it is available here, and if not, why not."""
    report = []
    for family in FAMILIES:
        for name in NAMES:
            module = _try(name)
            if isinstance(module, str):
                report.append(BackendReport(family, name, False, module))
            elif family not in module.FAMILIES:
                report.append(BackendReport(family, name, False, "does not serve this family"))
            else:
                report.append(BackendReport(family, name, True, ""))
    return report
