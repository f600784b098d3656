"""`python -m kdkernels bench`: chooses families, allocator regimes and where the CSVs go."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

# glibc gives every large temporary back to the kernel and faults its pages in again at the next
# call. "warm" keeps the heap, which compares kernels instead of page faults; users see "default".
WARM_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
REGIMES = {"default": {}, "warm": WARM_HEAP}


def families() -> list[str]:
    """Families that have a `bench_<family>.py` beside this file."""
    names = (module.name for module in pkgutil.iter_modules([str(FOLDER)]))
    return sorted(name.removeprefix("bench_") for name in names if name.startswith("bench_"))


def default_folder() -> Path:
    """`bench/results` of a checkout; `bench_out` of the current folder for an installed package."""
    inside_checkout = (FOLDER.parent / "setup.py").is_file()
    return FOLDER / "results" if inside_checkout else Path("bench_out")


def slug(text: str) -> str:
    """A device name as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels bench",
        description="Measures kdkernels and its peers in one run; writes CSVs.",
    )
    parser.add_argument("--family", nargs="+", choices=families(), default=None, metavar="FAMILY")
    parser.add_argument("--peers", action="store_true", help="with the installed third-party peers")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the results")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--case", nargs="+", default=[], help="parts of the names of cases")
    parser.add_argument("--variant", nargs="+", default=[], help="parts of the names of variants")
    parser.add_argument("--regime", choices=("default", "warm", "both"), default="both")
    parser.add_argument("--rounds", type=int, help="interleaved rounds a run, at least 9")
    parser.add_argument("--runs", type=int, help="repetitions; bars use the second best (3)")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no further run after")
    parser.add_argument("--out", type=Path, help="folder of the CSVs")
    # One regime of one family, in this very process: how the command calls itself.
    parser.add_argument("--csv", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when every family ran, 1 otherwise."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 9 and not options.quick:
        parser.error(f"--rounds: expected at least 9 (or --quick), got {options.rounds}")
    import torch

    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a device that is here, got cuda, and torch finds no GPU")
    if options.csv is not None:
        return _measure(options)

    folder = options.out or default_folder()
    paths, failed = [], False
    for family in options.family or families():
        path = folder / f"{family}-{slug(_device_name(options.device))}-{_today()}.csv"
        paths.append(path)
        for regime in _regimes(options):
            code = _spawn(options, family, regime, path)
            if code != 0:
                print(f"{family}, {regime}: ended with code {code}", file=sys.stderr)
                failed = True
    written = [path for path in paths if path.is_file()]
    for path in written:
        print(f"wrote {path}")
    if options.plot and written:
        from . import plot, records

        rows = [row for path in written for row in records.read_rows(path)]
        plot.draw(rows, options.plot)
        print(f"wrote {options.plot}")
    return int(failed or not written)


def _regimes(options: argparse.Namespace) -> list[str]:
    if options.device == "cuda":
        return ["caching"]  # torch's own caching allocator; malloc plays no part
    if not sys.platform.startswith("linux"):
        return ["default"]  # the warm heap is a setting of glibc
    return list(REGIMES) if options.regime == "both" else [options.regime]


def _spawn(options: argparse.Namespace, family: str, regime: str, path: Path) -> int:
    """One regime in a process of its own: malloc reads its settings at start-up only."""
    command = [sys.executable, "-m", "kdkernels.bench", "--family", family, "--csv", str(path)]
    command += ["--device", options.device]
    # A GPU has one regime of its own; the child then takes it from the device.
    command += ["--regime", regime] if regime in REGIMES else []
    for name in ("case", "variant"):
        values = getattr(options, name)
        command += [f"--{name}", *values] if values else []
    for name in ("rounds", "runs", "time_limit"):
        value = getattr(options, name)
        command += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    command += ["--quick"] if options.quick else []
    command += ["--peers"] if options.peers else []
    environment = {k: v for k, v in os.environ.items() if k not in WARM_HEAP}
    environment.update(REGIMES.get(regime, {}))
    import kdkernels

    package_folder = str(Path(kdkernels.__file__).resolve().parent.parent)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_folder, inherited]))
    sys.stdout.flush()
    return subprocess.run(command, env=environment, check=False).returncode


def _measure(options: argparse.Namespace) -> int:
    from . import harness

    regime = "caching" if options.device == "cuda" else options.regime
    limit = options.time_limit
    settings = harness.Settings(
        device=options.device,
        rounds=options.rounds or (3 if options.quick else 9),
        runs=options.runs or (1 if options.quick else 3),
        warmup=1 if options.quick else 2,
        regime=regime,
        quick=options.quick,
        peers=options.peers,
        cases=tuple(options.case),
        variants=tuple(options.variant),
        deadline=None if limit is None else time.monotonic() + limit,
    )
    for family in options.family or families():
        module = importlib.import_module(f"{__package__}.bench_{family}")
        harness.run_cases(family, module.cases(settings), settings, options.csv)
    return 0


def _device_name(device: str) -> str:
    from . import harness

    return str(harness.describe_machine(device)["device"])


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
