"""Measures cases: variants interleaved, medians and quartiles, traffic, peak extra memory.

A family's `bench_<family>.py` gives `cases(settings)`; nothing here knows a family. A variant that
cannot be built or fails becomes a row whose note says why, and the others go on.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import records
from .records import Row

STREAM = "stream, 2 reads + 1 write"


class MissingPeerError(Exception):
    """A peer that is not installed or cannot run on this device; its text becomes the note."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What is timed (`run`) and what must happen before each timing without being timed."""

    run: Callable[[], object]
    prepare: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Variant:
    """One contender. `build` makes its step and may raise; `note` goes into its rows."""

    name: str
    build: Callable[[], Step]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work. `setup` allocates its inputs and returns the variants that share them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    setup: Callable[[], list[Variant]]
    bytes: int | None = None  # None: a question of overhead, not of traffic
    unit_bytes: int | None = None  # one logits tensor
    calls: int = 1  # calls per sample, for work of a few microseconds


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure. `variants` and `cases` select by substring; empty selects all."""

    device: str = "cpu"
    rounds: int = 9
    runs: int = 3
    warmup: int = 2
    regime: str = "default"
    quick: bool = False
    peers: bool = False
    cases: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    deadline: float | None = None  # time.monotonic() after which no further run starts

    def selects_case(self, name: str) -> bool:
        """Whether to measure this case."""
        return not self.cases or any(part in name for part in self.cases)

    def selects_variant(self, name: str) -> bool:
        """Whether to measure this variant."""
        return not self.variants or any(part in name for part in self.variants)

    def is_late(self) -> bool:
        """Whether the time limit is over."""
        return self.deadline is not None and time.monotonic() > self.deadline


# Time ---------------------------------------------------------------------------------------------


def milliseconds_cpu(step: Step, calls: int = 1) -> float:
    """Wall time of one call. The result is dropped only after the clock has stopped."""
    step.prepare()
    result = None
    start = time.perf_counter()
    for _ in range(calls):
        result = step.run()
    elapsed = time.perf_counter() - start
    del result
    return elapsed * 1e3 / calls


def milliseconds_cpu_default(step: Step, calls: int = 1) -> float:
    """The same with an empty heap at the start: the regime "default".

    Blocks below 32 MiB come from malloc's heap, and what one variant leaves free there, the next
    one would find without page faults: its time would depend on its neighbours.
    """
    _return_free_pages()
    return milliseconds_cpu(step, calls)


def milliseconds_cuda(step: Step, calls: int = 1) -> float:
    """Device time of one call between two events, or host time where `calls` asks for overhead."""
    step.prepare()
    if calls > 1:
        torch.cuda.synchronize()
        start_time = time.perf_counter()
        for _ in range(calls):
            step.run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start_time) * 1e3 / calls
    _flush_buffer().zero_()  # nothing of the inputs is left in L2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # A backlog: the device sleeps a few milliseconds while the host queues all launches, so the
    # events bracket kernels and not the gaps between launches.
    torch.cuda._sleep(8_000_000)
    start.record()
    result = step.run()
    end.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(end)


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def _timer(settings: Settings) -> Callable[[Step, int], float]:
    if settings.device == "cuda":
        return milliseconds_cuda
    return milliseconds_cpu_default if settings.regime == "default" else milliseconds_cpu


# Memory -------------------------------------------------------------------------------------------


def peak_extra_bytes(step: Step, device: str) -> int | None:
    """Most memory held at once during one call beyond what was held before it; None if unknown.

    CPU: the resident peak (VmHWM), reset through /proc/self/clear_refs, after malloc has returned
    what it holds free. Outputs count: a fresh gradient is one logits tensor. Free regions that an
    earlier variant's blocks below 32 MiB left in the heap are not returned within a call, so a
    variant measured after such a one may count up to one tensor too many; alone it does not.
    """
    step.prepare()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step.run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        _return_free_pages()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
        except OSError:
            return None
        result = step.run()
        peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _return_free_pages() -> None:
    # Free pages that malloc keeps would be used again without page faults and without raising the
    # peak: a peer that works in blocks below 32 MiB would seem to need almost nothing.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


# The stream limit ---------------------------------------------------------------------------------


def stream_step(device: str, quick: bool = False) -> tuple[Step, int, str]:
    """(step, its bytes, how): dst = a + b over buffers far larger than any cache."""
    count = (8 if quick else 64) << 20  # float32: 32 or 256 MiB a buffer
    a, b, dst = (torch.ones(count, dtype=torch.float32, device=device) for _ in range(3))
    moved = 3 * 4 * count  # read a, read b, write dst
    kernel = _native_stream() if device == "cpu" else None
    if kernel is not None:
        return Step(lambda: kernel(dst, a, b)), moved, "non-temporal stores"
    how = "torch.add" + (", stores through the cache" if device == "cpu" else "")
    return Step(lambda: torch.add(a, b, out=dst)), moved, how


def _native_stream() -> Callable[..., object] | None:
    """The extension's non-temporal stream, where it was built with one."""
    try:
        from kdkernels import _C
    except ImportError:
        return None
    return getattr(_C, "stream_2r1w", None)


def stream_gbs(device: str = "cpu", rounds: int = 9, quick: bool = False) -> float:
    """GB/s of two reads and one write: the ceiling that shares are shares of."""
    step, moved, _ = stream_step(device, quick)
    timer = milliseconds_cuda if device == "cuda" else milliseconds_cpu
    timer(step)
    _, median, _ = records.quartiles([timer(step) for _ in range(rounds)])
    return moved / median / 1e6


# Machine ------------------------------------------------------------------------------------------


def describe_machine(device: str) -> dict[str, object]:
    """The columns that say where a row was measured."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name, isa = torch.cuda.get_device_name(), f"sm_{major}{minor}"
    else:
        name, isa = _cpu_name_and_isa()
    return {
        "device": name,
        "isa": isa,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "commit": commit(),
        "versions": versions(),
    }


def _cpu_name_and_isa() -> tuple[str, str]:
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        pass
    isa = next((i for i in ("avx512f", "avx2") if i in flags), platform.machine())
    forced = os.environ.get("KDK_CPU_ISA")
    return name, f"{isa} (forced {forced})" if forced else isa


def commit() -> str:
    """The checkout's commit, `KDK_COMMIT` where there is no git, or "unknown"."""
    if os.environ.get("KDK_COMMIT"):
        return os.environ["KDK_COMMIT"]
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def versions() -> str:
    """Versions of everything that is compared, as far as it is installed."""
    from importlib import metadata

    found = []
    for name in ("kdkernels", "torch", "triton", "trl", "torchtune", "liger-kernel", "orda-kernel"):
        try:
            found.append(f"{name}={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ";".join(found)


# One case -----------------------------------------------------------------------------------------


def measure_case(
    family: str,
    case: Case,
    settings: Settings,
    timer: Callable[[Step, int], float] | None = None,
) -> list[Row]:
    """All rows of a case: `runs` runs of `rounds` rounds, each timing every variant once.

    The order rotates by one from round to round, so no variant always follows the same neighbour.
    """
    cuda = settings.device == "cuda"
    if timer is None:
        timer = _timer(settings)
    base = Row(
        family=family,
        case=case.name,
        **describe_machine(settings.device),
        regime=settings.regime,
        run=0,
        rounds=settings.rounds,
        shape="x".join(map(str, case.shape)),
        dtype=str(case.dtype).removeprefix("torch."),
        variant="",
        bytes=case.bytes,
    )
    # One code object compiled for many shapes meets torch.compile's recompile limit, after which it
    # silently runs eagerly: every case starts with an empty cache.
    torch.compiler.reset()
    steps, notes, memory, failures = _build(case, settings, timer)
    rows = [dataclasses.replace(base, variant=name, note=text) for name, text in failures.items()]
    stream_bytes = None
    if case.bytes is not None and steps:
        steps[STREAM], stream_bytes, notes[STREAM] = stream_step(settings.device, settings.quick)
        timer(steps[STREAM], 1)
    for run in range(1, settings.runs + 1):
        if run > 1 and settings.is_late():
            break
        samples = _interleave(steps, case.calls, settings.rounds, timer, failures)
        for name in set(samples) ^ set(steps):
            rows.append(dataclasses.replace(base, variant=name, run=run, note=failures[name]))
            del steps[name]
        stream = None
        if STREAM in samples:
            stream = stream_bytes / records.quartiles(samples[STREAM])[1] / 1e6
            # Its row says how long the case's bytes take at that rate.
            samples[STREAM] = [time * case.bytes / stream_bytes for time in samples[STREAM]]
        for name, times in samples.items():
            q1, median, q3 = records.quartiles(times)
            rate = None if case.bytes is None else case.bytes / median / 1e6
            rows.append(
                dataclasses.replace(
                    base,
                    run=run,
                    variant=name,
                    median_ms=median,
                    q1_ms=q1,
                    q3_ms=q3,
                    gb_s=rate,
                    stream_gb_s=stream,
                    stream_share=rate / stream if rate and stream else None,
                    extra_memory=memory.get(name),
                    note=notes[name],
                )
            )
    steps.clear()
    _release(cuda)
    return rows


def _build(
    case: Case, settings: Settings, timer: Callable[[Step, int], float]
) -> tuple[dict[str, Step], dict[str, str], dict[str, float | None], dict[str, str]]:
    """(steps, notes, extra memory, failures) by variant; every step has run `warmup` times."""
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    memory: dict[str, float | None] = {}
    failures: dict[str, str] = {}
    try:
        variants = case.setup()
    except Exception as error:
        return steps, notes, memory, {"all": describe_failure(error)}
    for variant in variants:
        if not settings.selects_variant(variant.name):
            continue
        notes[variant.name] = variant.note
        try:
            step = variant.build()
            for _ in range(settings.warmup):
                timer(step, 1)
            memory[variant.name] = _extra_memory(step, case, settings)
            steps[variant.name] = step
        except Exception as error:  # whatever a peer throws is its result, not ours
            failures[variant.name] = describe_failure(error)
        # After the handler: while it runs, the traceback still holds what the variant allocated.
        if variant.name in failures:
            _release(settings.device == "cuda")
    return steps, notes, memory, failures


def _interleave(
    steps: dict[str, Step],
    calls: int,
    rounds: int,
    timer: Callable[[Step, int], float],
    failures: dict[str, str],
) -> dict[str, list[float]]:
    """Times of every variant, one a round; one that fails moves to `failures`."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(rounds):
        shift = index % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            if name not in samples:
                continue
            try:
                samples[name].append(timer(steps[name], calls))
            except Exception as error:
                failures[name] = describe_failure(error)
                del samples[name]
    return samples


def _extra_memory(step: Step, case: Case, settings: Settings) -> float | None:
    # A warm heap keeps its pages, and the resident size is too coarse for small tensors: in both
    # cases the peak says nothing about what the call needed.
    if case.unit_bytes is None or settings.regime == "warm":
        return None
    if settings.device == "cpu" and case.unit_bytes <= 32 << 20:
        return None
    extra = peak_extra_bytes(step, settings.device)
    return None if extra is None else extra / case.unit_bytes


def describe_failure(error: BaseException) -> str:
    """One line for the note column: what is missing, or what was thrown."""
    text = " ".join(str(error).split())[:240]
    if isinstance(error, MissingPeerError):
        return f"missing: {text}"
    return f"cannot run: {type(error).__name__}: {text}"


def _release(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def summary_line(row: Row) -> str:
    """A row as one line of text for the terminal."""
    head = f"{row.case:<28}{row.shape:>14} {row.dtype:<9}{row.regime:<8}{row.variant:<36}"
    if row.median_ms is None:
        return f"{head} -- {row.note}"
    line = f"{head} run {row.run} {row.median_ms:10.4f} ms [{row.q1_ms:.4f} .. {row.q3_ms:.4f}]"
    if row.gb_s is not None:
        line += f" {row.gb_s:8.1f} GB/s"
    if row.stream_share is not None:
        line += f" {100 * row.stream_share:5.1f} % of stream"
    if row.extra_memory is not None:
        line += f" {row.extra_memory:6.2f} logits extra"
    return line


def run_cases(
    family: str,
    cases: Sequence[Case],
    settings: Settings,
    path: Path,
    show: Callable[[str], None] = print,
) -> int:
    """Measures the selected cases in turn, appends to the CSV, returns the number of rows."""
    count = 0
    for case in cases:
        if not settings.selects_case(case.name):
            continue
        if settings.is_late():
            show(f"{case.name}: not started, the time limit is over")
            continue
        rows = measure_case(family, case, settings)
        records.append_rows(path, rows)
        count += len(rows)
        for row in rows:
            show(summary_line(row))
    return count
