"""Registers, shared memory and spills of every kernel on every architecture: build/ptxas.csv.

Configures a CUDA build in --build, compiles kdkernels_core and reads what `ptxas -v` says. Exits
with 1 if a kernel spills or uses a stack, so that CI sees it. `--log` reads a saved log instead.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("kernel", "arch", "registers", "stack", "spill_stores", "spill_loads", "shared")

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\w+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(log: str) -> list[dict]:
    """One row per kernel and architecture. A kernel's lines follow each other in the log of one
    compilation; a device function of its own between them is no kernel."""
    rows, row, current = [], None, None
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            row = dict.fromkeys(FIELDS, 0)
            row["kernel"], row["arch"] = entry.groups()
            current = row["kernel"]
            rows.append(row)
        elif row is None:
            continue
        elif properties := _PROPERTIES.search(line):
            current = properties.group(1)
        elif (stack := _STACK.search(line)) and current == row["kernel"]:
            row["stack"], row["spill_stores"], row["spill_loads"] = map(int, stack.groups())
        elif used := _USED.search(line):
            row["registers"] = int(used.group(1))
            shared = _SHARED.search(line)
            row["shared"] = int(shared.group(1)) if shared else 0
    return rows


def readable(names: list[str]) -> list[str]:
    """C++ names, without arguments, of mangled ones."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    out = subprocess.run([tool], input="\n".join(names), text=True, capture_output=True, check=True)
    return [
        re.sub(r"^void |kd::cuda::|kd::|\(anonymous namespace\)::|\([^()]*\)$", "", n)
        for n in out.stdout.splitlines()
    ]


def compile_log(build: Path, jobs: int, archs: str | None) -> str:
    """What a fresh build of the kernels prints."""
    import pybind11

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("ptxas_table: nvcc is not on the PATH")
    configure = [
        "cmake",
        "-S",
        str(ROOT / "csrc"),
        "-B",
        str(build),
        "-DKDK_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    if archs:
        configure.append(f"-DKDK_CUDA_ARCHS={archs}")
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    # Clean, because what is up to date prints nothing.
    command = [
        "cmake",
        "--build",
        str(build),
        "--target",
        "kdkernels_core",
        "--clean-first",
        "-j",
        str(jobs),
    ]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(done.stdout[-4000:] + "\nptxas_table: the build failed")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "ptxas")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "ptxas.csv")
    parser.add_argument("--log", type=Path, help="read this log instead of compiling")
    parser.add_argument("--archs", help='instead of the default list, e.g. "80;90"')
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.log:
        log = arguments.log.read_text()
    else:
        log = compile_log(arguments.build, arguments.jobs, arguments.archs)
    rows = parse(log)
    if not rows:
        sys.exit("ptxas_table: the log names no kernel")
    for row, name in zip(rows, readable([r["kernel"] for r in rows])):
        row["kernel"] = name
    rows.sort(key=lambda r: (r["kernel"], r["arch"]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    for arch in sorted({r["arch"] for r in rows}):
        mine = [r for r in rows if r["arch"] == arch]
        most = max(mine, key=lambda r: r["registers"])
        print(
            f"{arch}: {len(mine)} kernels, at most {most['registers']} registers ({most['kernel']})"
        )
    bad = [r for r in rows if r["spill_stores"] or r["spill_loads"] or r["stack"]]
    for row in bad:
        print(
            f"SPILL {row['arch']} {row['kernel']}: stack {row['stack']}, stores "
            f"{row['spill_stores']}, loads {row['spill_loads']}"
        )
    print(f"{len(rows)} kernels, {len(bad)} with a spill or a stack; {arguments.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
