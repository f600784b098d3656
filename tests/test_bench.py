"""The benchmarks' own arithmetic and files. No test asserts a wall time: clocks are made up."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels import bench as entry


def load(name: str):
    """A module of the benchmarks, wherever they are installed."""
    return importlib.import_module(f"{entry.load_benchmarks().__name__}.{name}")


harness = load("harness")
numerics = load("numerics")
peers = load("peers")
plot = load("plot")
records = load("records")


def make_row(**changes) -> records.Row:
    row = records.Row(
        family="divergence",
        case="forward_kl loss+gradient",
        device="A processor",
        isa="avx2",
        threads=2,
        date="2026-01-01T00:00Z",
        commit="0123456789",
        versions="torch=2.13.0",
        regime="default",
        run=1,
        rounds=9,
        shape="512x128256",
        dtype="float32",
        variant="kdkernels",
        median_ms=20.0,
        q1_ms=19.0,
        q3_ms=22.0,
        bytes=788004864,
        gb_s=39.4002,
        stream_gb_s=40.0,
        stream_share=0.985006,
        extra_memory=1.0,
        note="",
    )
    return dataclasses.replace(row, **changes)


# Statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 8, 9])
def test_quartiles_are_those_of_linear_interpolation(count):
    samples = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    expected = torch.quantile(samples, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert records.quartiles(samples.tolist()) == pytest.approx(expected.tolist(), rel=1e-12)


def test_quartiles_of_one_and_of_none():
    assert records.quartiles([3.0]) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="samples"):
        records.quartiles([])


def test_second_best():
    assert records.second_best([5.0, 1.0, 4.0, 2.0]) == 2.0
    assert records.second_best([5.0, 1.0, 4.0, 2.0], largest=True) == 4.0
    assert records.second_best([1.0, 9.0]) == 9.0
    assert records.second_best([7.0]) == 7.0
    with pytest.raises(ValueError, match="values"):
        records.second_best([])


# Files --------------------------------------------------------------------------------------------


def test_csv_round_trip(tmp_path):
    path = tmp_path / "folder" / "x.csv"
    missing = make_row(
        run=0,
        variant="TRL, quoted",
        note='missing: "trl", not here',
        **dict.fromkeys(["median_ms", "q1_ms", "q3_ms", "gb_s", "stream_gb_s"]),
        stream_share=None,
        extra_memory=None,
        bytes=None,
    )
    records.append_rows(path, [make_row()])
    records.append_rows(path, [missing])
    assert records.read_rows(path) == [make_row(), missing]
    with path.open() as file:
        assert next(csv.reader(file)) == [field.name for field in dataclasses.fields(records.Row)]


def test_csv_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    for use in (records.read_rows, lambda p: records.append_rows(p, [make_row()])):
        with pytest.raises(ValueError, match="expected the columns"):
            use(path)
    assert path.read_text() == "a,b\n1,2\n"


# Measuring ----------------------------------------------------------------------------------------


def make_case(variants, traffic=None):
    return harness.Case(
        "case", shape=(4, 8), dtype=torch.float32, setup=lambda: variants, bytes=traffic
    )


def fast_settings(**changes):
    return harness.Settings(**{"rounds": 3, "runs": 2, "warmup": 1, "quick": True, **changes})


def test_variants_are_interleaved_and_rotate():
    order = []
    variants = [
        harness.Variant(name, lambda name=name: harness.Step(lambda: order.append(name)))
        for name in "abc"
    ]
    settings = fast_settings(runs=1)
    harness.measure_case("family", make_case(variants), settings)
    assert order[:3] == ["a", "b", "c"]  # warm-up
    assert order[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_rows_hold_the_statistics_of_the_samples():
    clock = iter([100.0, 3.0, 1.0, 2.0, 6.0, 5.0, 4.0])  # one warm-up, two runs of three rounds
    variants = [harness.Variant("a", lambda: harness.Step(lambda: None), note="note")]
    rows = harness.measure_case(
        "family", make_case(variants), fast_settings(), timer=lambda step, calls: next(clock)
    )
    assert [(row.run, row.q1_ms, row.median_ms, row.q3_ms) for row in rows] == [
        (1, 1.5, 2.0, 2.5),
        (2, 4.5, 5.0, 5.5),
    ]
    assert {row.note for row in rows} == {"note"}
    assert all(row.gb_s is None and row.stream_gb_s is None for row in rows)


def test_rates_and_shares(monkeypatch):
    stream = harness.Step(lambda: "stream")
    monkeypatch.setattr(harness, "stream_step", lambda *a: (stream, 12_000_000, "how"))
    times = {"stream": 3.0, "ours": 2.0}
    variants = [harness.Variant("ours", lambda: harness.Step(lambda: "ours"))]
    rows = harness.measure_case(
        "family",
        make_case(variants, traffic=6_000_000),
        fast_settings(runs=1),
        timer=lambda step, calls: times[step.run()],
    )
    found = {row.variant: row for row in rows}
    ours, limit = found["ours"], found[harness.STREAM]
    # 6 MB in 2 ms; the stream moves 12 MB in 3 ms, so 6 MB would take it 1.5 ms
    assert ours.gb_s == pytest.approx(3.0)
    assert ours.stream_gb_s == pytest.approx(4.0)
    assert ours.stream_share == pytest.approx(0.75)
    assert limit.median_ms == pytest.approx(1.5)
    assert limit.stream_share == pytest.approx(1.0)


def test_a_missing_peer_is_a_row_that_says_why():
    def absent():
        raise harness.MissingPeerError("xyz is not installed")

    def broken():
        raise ZeroDivisionError("a message\nof two lines")

    variants = [
        harness.Variant("absent", absent),
        harness.Variant("broken", lambda: harness.Step(broken)),
        harness.Variant("here", lambda: harness.Step(lambda: None)),
    ]
    rows = harness.measure_case("family", make_case(variants), fast_settings(runs=1))
    found = {row.variant: row for row in rows}
    assert found["absent"].median_ms is None
    assert found["absent"].note == "missing: xyz is not installed"
    assert found["broken"].note == "cannot run: ZeroDivisionError: a message of two lines"
    assert found["here"].median_ms is not None


def test_a_variant_that_fails_later_does_not_stop_the_others():
    calls = iter(range(100))

    def fails_in_the_second_round():
        if next(calls) == 2:  # after one warm-up and one round
            raise RuntimeError("late")

    variants = [
        harness.Variant("late", lambda: harness.Step(fails_in_the_second_round)),
        harness.Variant("here", lambda: harness.Step(lambda: None)),
    ]
    rows = harness.measure_case("family", make_case(variants), fast_settings())
    assert [(row.run, row.note) for row in rows if row.variant == "late"] == [
        (1, "cannot run: RuntimeError: late")
    ]
    assert [row.run for row in rows if row.variant == "here"] == [1, 2]


def test_prepare_runs_before_every_call_and_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def spend(seconds):
        clock[0] += seconds

    step = harness.Step(run=lambda: spend(0.002), prepare=lambda: spend(5.0))
    assert harness.milliseconds_cpu(step) == pytest.approx(2.0)
    assert harness.milliseconds_cpu(step, calls=4) == pytest.approx(2.0)
    assert clock[0] == pytest.approx(10.0 + 5 * 0.002)


@pytest.mark.parametrize(("regime", "expected"), [("default", 4), ("warm", 0)])
def test_only_the_default_regime_starts_from_an_empty_heap(monkeypatch, regime, expected):
    trims = []
    monkeypatch.setattr(harness, "_return_free_pages", lambda: trims.append(1))
    variants = [harness.Variant("a", lambda: harness.Step(lambda: None))]
    harness.measure_case("family", make_case(variants), fast_settings(runs=1, regime=regime))
    assert len(trims) == expected  # one warm-up, three rounds


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_extra_memory_counts_what_a_call_holds():
    unit = 64 << 20
    held = []

    def allocate():
        held.append(torch.ones(unit, dtype=torch.uint8))
        torch.ones(unit, dtype=torch.uint8)  # a temporary beside it: two at once

    extra = harness.peak_extra_bytes(harness.Step(allocate), "cpu")
    if extra is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 1.9 * unit < extra < 2.3 * unit


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_extra_memory_counts_blocks_that_malloc_kept():
    unit = 16 << 20

    def allocate():
        return [torch.ones(unit, dtype=torch.uint8) for _ in range(6)]

    step = harness.Step(allocate)
    torch.ones(31 << 20, dtype=torch.uint8)  # freeing it raises malloc's threshold for mapping
    for _ in range(3):
        step.run()  # leaves free pages in the heap
    extra = harness.peak_extra_bytes(step, "cpu")
    if extra is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 5.7 * unit < extra < 7 * unit


# Cases --------------------------------------------------------------------------------------------


def test_byte_counts_are_those_of_the_formula():
    cases = load("bench_divergence").cases(harness.Settings(device="cpu"))
    counted = {(case.name, case.dtype): case.bytes for case in cases}
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        entries = 512 * 128256
        assert counted["forward_kl loss+gradient", dtype] == 3 * size * entries
        assert counted["forward_kl loss", dtype] == 2 * size * entries
        assert counted["jensen_shannon loss+gradient", dtype] == 3 * size * entries
    # the number that the stated floor of this case is computed from: 788 MB
    assert counted["forward_kl loss+gradient", torch.float32] == 788_004_864


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inputs_leave_the_cache(device):
    cases = load("bench_divergence").cases(harness.Settings(device=device))
    # Every kind has a row, on fewer rows: twice the last-level cache of this class of machine.
    least = {True: 64e6, False: 200e6}
    for case in cases:
        few = case.name.startswith("kind ") or "teachers" in case.name
        assert case.bytes is None or case.bytes > least[few]


def test_quick_command_writes_rows_for_every_case(tmp_path):
    command = [sys.executable, "-m", "kdkernels.bench", "--quick", "--device", "cpu"]
    command += ["--family", "divergence", "--regime", "warm", "--out", str(tmp_path)]
    root = str(Path(entry.__file__).resolve().parent.parent)
    found = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    (path,) = tmp_path.glob("divergence-*.csv")
    rows = records.read_rows(path)
    cases = load("bench_divergence").cases(harness.Settings(device="cpu", quick=True))
    assert {row.case for row in rows} == {case.name for case in cases}
    assert {row.regime for row in rows} == {"warm"}
    built = [row for row in rows if hasattr(kd, "Head") or not row.case.startswith("head")]
    failed = [row for row in built if row.median_ms is None]
    assert not failed, failed


def test_fewer_rounds_than_nine_are_refused(capsys):
    with pytest.raises(SystemExit):
        load("command").main(["--rounds", "8"])
    assert "at least 9" in capsys.readouterr().err


# Peers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_peers_compute_the_same_loss(temperature):
    """What stands side by side in a table is one loss: value and gradient, or it says otherwise."""
    torch.manual_seed(0)
    student = torch.randn(6, 50).requires_grad_()
    teacher = torch.randn(6, 50)
    log_q = (student.double() / temperature).log_softmax(-1)
    log_p = (teacher.double() / temperature).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)

    def divergence(left, right):
        return (left.exp() * (left - right)).sum(-1).mean()

    exact = {
        "forward_kl": divergence(log_p, log_q),
        "jensen_shannon": 0.5 * (divergence(log_p, log_m) + divergence(log_q, log_m)),
    }
    found = {
        "forward_kl": peers.forward_kl_peers(temperature, half=True, compile=False),
        "jensen_shannon": peers.jensen_shannon_peers(0.5, temperature, compile=False),
    }
    compared = 0
    for kind, members in found.items():
        (gradient,) = torch.autograd.grad(exact[kind], student, retain_graph=True)
        for peer in members:
            if not peer.value_is_comparable and temperature != 1.0:
                continue  # has no temperature: its note says that it runs at 1
            try:
                loss = peer.load()(student, teacher)
            except harness.MissingPeerError:
                continue
            (theirs,) = torch.autograd.grad(loss, student)
            torch.testing.assert_close(theirs, gradient.float(), rtol=1e-4, atol=1e-6)
            if peer.value_is_comparable:
                torch.testing.assert_close(loss.double(), exact[kind], rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared >= 2  # eager in both forms is always there


@pytest.mark.parametrize("kind", sorted(kd.functional.kinds.KINDS))
def test_formulas_and_peers_of_every_kind_compute_ours(kind):
    torch.manual_seed(0)
    student = torch.randn(4, 30, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(4, 30, dtype=torch.float64)
    for temperature in (1.0, 2.0):
        given = None if kind == "entropy" else teacher
        with kd.use_backend("torch"):
            exact = kd.divergence(student, given, kind, temperature=temperature)
            (gradient,) = torch.autograd.grad(exact, student)
        loss = peers.eager_kind(kind, temperature)(student, teacher)
        torch.testing.assert_close(loss, exact)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], gradient)
        for peer in peers.kind_peers(kind, temperature, compile=False):
            if not peer.value_is_comparable and temperature != 1.0:
                continue
            try:
                theirs = peer.load()(student, teacher)
            except harness.MissingPeerError:
                continue
            (found,) = torch.autograd.grad(theirs, student)
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_head_peers_compute_the_same_loss():
    torch.manual_seed(0)
    hidden, weight, other, other_weight = (
        torch.randn(size) for size in ((5, 16), (70, 16), (5, 8), (70, 8))
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    exact = peers.eager_forward_kl(2.0)(
        (hidden.double() @ weight.double().T), (other.double() @ other_weight.double().T)
    )
    expected = torch.autograd.grad(exact, (hidden, weight))
    for peer in peers.head_peers(2.0, compile=False):
        try:
            loss = peer.load()(hidden, weight, other, other_weight)
        except harness.MissingPeerError:
            continue
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-6)
        found = torch.autograd.grad(loss, (hidden, weight))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_peers_that_are_not_installed_are_named():
    with pytest.raises(harness.MissingPeerError, match="no_such_package"):
        peers.import_peer("no_such_package")
    with pytest.raises(harness.MissingPeerError, match="no_such_package is not installed"):
        peers.peer_file("no_such_package", "x.py")
    with pytest.raises(harness.MissingPeerError, match=r"without no_such_file\.py"):
        peers.peer_file("torch", "no_such_file.py")


def test_one_method_is_taken_out_of_a_file(tmp_path, monkeypatch):
    package = tmp_path / "a_peer"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    (package / "part.py").write_text(
        "import not_there\nclass Trainer:\n    @staticmethod\n"
        "    def loss(x):\n        return F.relu(x) + torch.ones(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = peers.load_function("a_peer", "part.py", "Trainer.loss")
    assert loss(torch.tensor([-1.0])).item() == 1.0
    with pytest.raises(harness.MissingPeerError, match=r"Trainer\.gone"):
        peers.load_function("a_peer", "part.py", "Trainer.gone")


# Tables and pictures ------------------------------------------------------------------------------


@pytest.fixture
def synthetic(tmp_path):
    """Three runs; ratios eager / ours of 10, 8 and 9, one peer missing, an older measurement."""
    rows = [
        make_row(run=run, variant=name, median_ms=time, q1_ms=0.9 * time, q3_ms=1.1 * time)
        for name, times in (("kdkernels", (20.0, 21.0, 30.0)), ("eager", (200.0, 168.0, 270.0)))
        for run, time in enumerate(times, 1)
    ]
    nothing = dict.fromkeys(["median_ms", "q1_ms", "q3_ms", "gb_s", "stream_gb_s", "stream_share"])
    rows.append(make_row(run=0, variant="TRL", note="missing: a|b", extra_memory=None, **nothing))
    rows.append(make_row(variant="eager", date="2025-01-01T00:00Z", median_ms=1.0))
    path = tmp_path / "synthetic.csv"
    records.append_rows(path, rows)
    return path


def test_markdown(synthetic, capsys):
    assert plot.main(["--markdown", str(synthetic)]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert "[512, 128256] float32, default" in text
    assert "A processor (avx2), 2 threads, 2026-01-01T00:00Z, 0123456789" in text
    # the second best run of each, and the second best of the three ratios
    assert "| 21 (18.9 to 23.1) |" in cells["kdkernels"]
    assert "| 200 (180 to 220) |" in cells["eager"]
    assert "| 9.00 |" in cells["eager"]
    assert "missing: a\\|b" in cells["TRL"]
    assert [line.split(" | ")[0] for line in lines[1:]] == ["| kdkernels", "| eager", "| TRL"]
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}


def test_selection_by_case_and_regime(synthetic, capsys):
    plot.main(["--markdown", "--regime", "warm", "--", str(synthetic)])
    assert "kdkernels" not in capsys.readouterr().out
    plot.main(["--markdown", "--case", "forward", "--", str(synthetic)])
    assert "kdkernels" in capsys.readouterr().out


def test_picture(synthetic, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.png"
    assert plot.main(["--png", str(path), str(synthetic)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one measured variant"):
        plot.draw([make_row(median_ms=None)], path)


# Numerics -----------------------------------------------------------------------------------------


def test_numerics_find_a_known_error(monkeypatch):
    student, teacher = numerics.make_inputs(4, 64, 1.0, 0.1, torch.float32, "cpu")
    exact = numerics.reference(student, teacher, "forward_kl")

    def wrong(student, teacher):
        return 1.01 * torch.nn.functional.kl_div(
            student.double().log_softmax(-1),
            teacher.double().log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )

    monkeypatch.setattr(numerics, "LOSS_SCALE", {torch.float32: 2.0**12})
    loss_error, gradient_error = numerics.errors_of(wrong, student, teacher, exact)
    assert loss_error == pytest.approx(0.01, rel=1e-4)
    assert gradient_error == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("gap", [1.0, 1e-3])
def test_numerics_reference_agrees_with_exact_arithmetic(kind, gap):
    mpmath = pytest.importorskip("mpmath")
    student, teacher = numerics.make_inputs(1, 12, 5.0, gap, torch.bfloat16, "cpu")
    loss, _ = numerics.reference(student, teacher, kind)
    with mpmath.workdps(40):
        q, p = (
            [mpmath.exp(x) / sum(mpmath.exp(y) for y in row) for x in row]
            for row in (student[0].tolist(), teacher[0].tolist())
        )
        m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]

        def kl(left, right):
            return sum(x * mpmath.log(x / y) for x, y in zip(left, right, strict=True))

        exact = kl(p, q) if kind == "forward_kl" else (kl(p, m) + kl(q, m)) / 2
        assert abs(mpmath.mpf(loss.item()) - exact) <= 1e-9 * abs(exact)


def test_numerics_csv_and_markdown(tmp_path):
    found = list(
        numerics.measure(
            *("cpu", 2, 32),
            compile=False,
            third_party=False,
            kinds=("forward_kl",),
            dtypes=(torch.float32, torch.bfloat16),
            stds=(1.0,),
            gaps=(1.0, 0.1),
        )
    )
    assert {error.variant for error in found} == {"kdkernels", "eager", "eager, float32 upcast"}
    absent = dataclasses.replace(
        found[0], variant="absent", loss_error=None, gradient_error=None, note="missing: x"
    )
    path = tmp_path / "n.csv"
    numerics.write(path, [*found, absent])
    again = numerics.read(path)
    assert len(again) == len(found) + 1
    assert again[0].loss_error == pytest.approx(found[0].loss_error, rel=1e-2)
    text = numerics.markdown(again)
    assert "**forward_kl, bfloat16, standard deviation 1** ([2, 32]" in text
    assert "| gap 1 | gap 0.1 |" in text
    assert "- absent: missing: x" in text
    compact = numerics.summary(again).splitlines()
    assert sum(line.startswith("| forward_kl |") for line in compact) == 1
    assert sum(line.startswith("| bfloat16, eager, float32 upcast |") for line in compact) == 1


# The GPU script -----------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs bash and GNU tar")
@pytest.mark.parametrize("broken", [False, True])
def test_gpu_script_goes_on_after_a_failure_and_tells(tmp_path, broken):
    """With an interpreter that only records how it is called, or fails in one stage."""
    script = Path(entry.__file__).resolve().parent.parent / "bench" / "gpu.sh"
    if not script.is_file():
        pytest.skip("an installed package has no gpu.sh")
    python = tmp_path / "python"
    fails = '[[ "$*" == *pytest*tests ]] && exit 3' if broken else "true"
    python.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n{fails}\nexit 0\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    found = subprocess.run(
        ["bash", str(script), "build", "tests", "bench"],
        env={**os.environ, "PYTHON": str(python), "OUT": str(out)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == int(broken), found.stdout + found.stderr
    calls = (tmp_path / "calls").read_text()
    assert "setup.py build_ext --inplace" in calls
    assert "-m kdkernels bench --device cuda --peers" in calls
    table = found.stdout[found.stdout.index("stage  ") :]
    states = {line.split()[0]: line for line in table.splitlines()}
    assert states["build"].endswith("ok") and states["bench"].endswith("ok")
    assert states["tests"].endswith("failed, code 3" if broken else "ok")
    listing = subprocess.run(
        ["tar", "-tzf", str(out / "gpu.tar.gz")], capture_output=True, text=True, check=True
    )
    assert {"./build.log", "./tests.log", "./bench.log", "./summary.log"} <= set(
        listing.stdout.split()
    )
