"""The Triton backend: its cases run in a process of their own, because triton reads
TRITON_INTERPRET when it is first imported, which another test may already have done."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python on `arguments` from the root, with TRITON_INTERPRET only if it is given."""
    variables = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), variables.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**variables, **environment},
        capture_output=True, text=True, timeout=550,
    )  # fmt: skip


def assert_cases_pass(**environment: str) -> None:
    done = run("-m", "pytest", "-x", "tests/triton_cases.py", **environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_cases_under_the_interpreter():
    assert_cases_pass(TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cases_on_a_gpu():
    assert_cases_pass()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the reason is there without a CUDA device")
def test_reason_without_a_device():
    code = "from kdkernels.backends import triton as t; print(t.READS); print(t.why_not())"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "('cuda',)" in done.stdout and "TRITON_INTERPRET=1" in done.stdout


def test_reason_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from kdkernels.backends import triton as t; print(t.why_not())"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout
