"""Fixtures: every family test runs on every backend that is here.

KDK_TEST_BACKENDS=cuda,cpu limits the backends. Outputs are filled with NaN before each launch.
"""

from __future__ import annotations

import os

os.environ.setdefault("KDK_POISON", "1")

import pytest
import torch

try:
    import hypothesis
except ImportError:  # the property tests say so themselves
    pass
else:
    # The same examples in every run: a landing must not hang on chance. KDK_FUZZ=1 draws new ones.
    fixed = os.environ.get("KDK_FUZZ", "0") in ("", "0")
    hypothesis.settings.register_profile("kdkernels", derandomize=fixed, database=None)
    hypothesis.settings.load_profile("kdkernels")

if not torch.cuda.is_available():
    # The Triton kernels run in Triton's interpreter; it must be asked for before the import.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import kdkernels as kd
from kdkernels.backends import registry

_WANTED = [n for n in os.environ.get("KDK_TEST_BACKENDS", "").split(",") if n]
BACKENDS = ("torch", "cpu", "simt", "triton", "cuda")


class Backend:
    """A backend under test: its name, its device, and the dtypes that it takes."""

    def __init__(self, name: str):
        self.name = name
        module = registry.load(name)
        reads = getattr(module, "READS", registry.READS[name])
        self.device = "cpu" if "cpu" in reads else "cuda"
        halves = [torch.float32, torch.float16, torch.bfloat16]
        self.dtypes = halves + ([torch.float64] if name in ("torch", "cpu", "simt") else [])

    def __repr__(self) -> str:
        return self.name


def _make(name: str, request) -> Backend:
    """The backend, or a skip; a test module of another family than divergence says FAMILY = ..."""
    family = getattr(request.module, "FAMILY", "divergence")
    if _WANTED and name not in _WANTED:
        pytest.skip(f"KDK_TEST_BACKENDS is {','.join(_WANTED)}")
    reason = next(r for r in kd.backends() if r.backend == name and r.family == family)
    if not reason.available:
        pytest.skip(f"{name}: {reason.why_not}")
    return Backend(name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The backend under test, in force for the whole test."""
    made = _make(request.param, request)
    with kd.use_backend(made.name):
        yield made


@pytest.fixture(params=("cpu", "simt", "cuda"))
def kernel_backend(request):
    """Backends whose kernels are ours in C++ or CUDA."""
    made = _make(request.param, request)
    with kd.use_backend(made.name):
        yield made


@pytest.fixture(params=("cpu", "simt"))
def double_backend(request):
    """Kernels that compute in float64 too (for gradcheck)."""
    made = _make(request.param, request)
    with kd.use_backend(made.name):
        yield made


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20261122)
