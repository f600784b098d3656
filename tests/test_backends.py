"""The registry, the bindings, the extension modules."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import kdkernels as kd
from kdkernels.backends import registry, spec
from kdkernels.backends.native import extension


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        timeout=120,
    )


def native():
    module = extension("_C")
    if isinstance(module, str):
        pytest.skip(module)
    return module


def test_spec_is_the_struct_of_the_contract():
    module = native()
    assert spec.DivergenceSpec._fields == module.DIVERGENCE_SPEC_FIELDS
    assert module.DIVERGENCE_STATS == spec.STATS
    with pytest.raises(ValueError, match="spec"):
        module.divergence_fwd(*([torch.zeros(1, 1)] * 2), *([None] * 13), (1.0,))


def test_cpu_is_the_default_and_the_reference_always_there():
    native()
    assert registry.pick("divergence", "cpu").__name__.endswith(".cpu")
    found = {(r.family, r.backend): r for r in kd.backends()}
    assert found["divergence", "torch"].available
    for report in found.values():
        assert report.available or report.why_not


def test_use_backend_nests_and_ends():
    with kd.use_backend("torch"):
        assert registry.settings().backend == "torch"
        with kd.use_backend(None):
            assert registry.settings().backend is None
        assert registry.settings().backend == "torch"
    assert registry.settings().backend == registry._initial().backend


def test_unknown_and_unavailable_backends_are_errors():
    with pytest.raises(ValueError, match="numpy"), kd.use_backend("numpy"):
        pass
    # A backend that serves one family and not another is there.
    served = {r.backend for r in kd.backends() if r.available}
    missing = {r.backend for r in kd.backends()} - served
    for name in missing:
        with pytest.raises(RuntimeError, match=name), kd.use_backend(name):
            pass
    wrong = run_python("import kdkernels", KDK_BACKEND="numpy")
    assert wrong.returncode != 0 and "KDK_BACKEND" in wrong.stderr


def test_environment_chooses_the_backend():
    code = (
        "from kdkernels.backends import registry as r; print(r.pick('divergence', 'cpu').__name__)"
    )
    done = run_python(code, KDK_BACKEND="torch")
    assert done.stdout.strip().endswith("backends.torch"), done.stderr


def test_debug_is_a_context():
    assert registry.settings().debug is False
    with kd.debug():
        assert registry.settings().debug is True
    assert (
        run_python(
            "from kdkernels.backends import registry as r; assert r.settings().debug", KDK_DEBUG="1"
        ).returncode
        == 0
    )


BOTH = """
import torch, kdkernels as kd
torch.manual_seed(1)
values = []
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    z = torch.randn(3, 4, 50).to(dtype)[:, :, 3:].requires_grad_()
    a = torch.randn(3, 4, 47).to(dtype)
    labels = torch.tensor([[1, 2, -100, 3]] * 3)
    loss = kd.divergence(z, a, labels=labels, mask=labels != 2, label_weight=0.5)
    loss.backward()
    values += [loss.item(), z.grad.double().norm().item() if z.is_leaf else 0.0]
print(values)
from kdkernels.backends.native import extension
print(extension('_C').binding())
"""


def test_both_ways_to_read_a_tensor_give_the_same():
    native()
    table = run_python(BOTH)
    integers = run_python(BOTH, KDK_BINDING="integers")
    assert table.returncode == 0, table.stderr
    assert integers.returncode == 0, integers.stderr
    assert integers.stdout.splitlines()[0] == table.stdout.splitlines()[0]
    assert integers.stdout.splitlines()[1] == "integers"
    assert table.stdout.splitlines()[1] != "integers"


def test_bits_do_not_depend_on_the_number_of_threads():
    native()
    code = """
import torch, kdkernels as kd
torch.manual_seed(3)
z, a = torch.randn(2, 37, 1003).unbind()
z.requires_grad_()
loss = kd.divergence(z, a, 'jeffreys', temperature=1.7)
loss.backward()
import hashlib
print(loss.item().hex(), hashlib.sha256(z.grad.numpy().tobytes()).hexdigest())
"""
    outputs = {run_python(code, OMP_NUM_THREADS=n).stdout for n in ("1", "2", "3", "8")}
    outputs.add(run_python(code, KDK_THREADS="1").stdout)
    assert len(outputs) == 1 and outputs != {""}


def test_torch_pool_serves_the_loops():
    native()
    code = """
import torch
from kdkernels.backends.native import extension
c = extension('_C')
torch.set_num_threads(2)
assert c.num_threads() == 2, c.num_threads()
torch.set_num_threads(1)
assert c.num_threads() == 1, c.num_threads()
"""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        pytest.skip("torch_parallel_for is there since torch 2.10")
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_gives_the_reference(isa):
    module = native()
    if isa not in module.compiled_isas():
        pytest.skip(f"{isa} is not compiled here")
    code = f"""
import torch, kdkernels as kd
from kdkernels.backends.native import extension
assert extension('_C').isa() == {isa!r}
from kdkernels.functional.kinds import KINDS
torch.manual_seed(2)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for kind in KINDS:
        z = (torch.randn(5, 333) * 2).to(dtype)
        a = None if kind == 'entropy' else (z.float() + torch.randn(5, 333)).to(dtype)
        x, y = z.clone().requires_grad_(), z.double().requires_grad_()
        loss = kd.divergence(x, a, kind, temperature=1.5)
        loss.backward()
        with kd.use_backend('torch'):
            exact = kd.divergence(y, None if a is None else a.double(), kind, temperature=1.5)
        exact.backward()
        assert abs(loss.item() - exact.item()) <= 1e-5 * exact.item(), (kind, dtype, loss, exact)
        error = (x.grad.double() - y.grad).norm() / y.grad.norm()
        assert error < {{torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 2e-3}}[dtype], (
            kind, dtype, error)
"""
    done = run_python(code, KDK_CPU_ISA=isa)
    if "not supported" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr


def test_unknown_instruction_set_is_an_error():
    native()
    done = run_python(
        "import torch, kdkernels as kd; kd.divergence(torch.zeros(1, 2), torch.zeros(1, 2))",
        KDK_CPU_ISA="sse9",
    )
    assert done.returncode != 0 and "KDK_CPU_ISA" in done.stderr


def test_info_prints_every_backend():
    done = subprocess.run(
        [sys.executable, "-m", "kdkernels", "info"], text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for word in ("torch", "divergence", "cpu", "triton"):
        assert word in done.stdout
