"""The demo from the command line to the exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import kdkernels
from kdkernels.backends import pick
from kdkernels.demo import report as reporting
from kdkernels.demo import text
from kdkernels.demo.settings import KERNELS, TEACHER, VARIANTS, Setting, choose_setting


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels demo",
        description="Distils a small model three ways and compares time, memory and values.",
    )
    parser.add_argument("--smoke", action="store_true", help="the small setting")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="default: demo_out")
    parser.add_argument("--steps", type=_positive, help="steps of each student")
    parser.add_argument("--seed", type=int, default=0, help="weights and order, default 0")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    return parser.parse_args(argv)


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; 0: eager and kdkernels agree, 1: they differ, 2: a part could not run."""
    options = parse_arguments(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device here", file=sys.stderr)
        return 2
    if options.out.exists() and not options.out.is_dir():
        print(f"--out: {options.out} is not a folder", file=sys.stderr)
        return 2
    setting = choose_setting(device, options.smoke)
    if options.steps is not None:
        setting = dataclasses.replace(setting, steps=options.steps)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="kdkernels_demo_") as scratch:
            results = run_variants(setting, device, options.seed, Path(scratch))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    report = {
        "setting": setting.to_dict(),
        "seed": options.seed,
        "device": device,
        "teacher": results.pop(TEACHER),
        "results": results,
        "verdict": reporting.judge_equality(results),
        "machine": machine_sentence(device, results[KERNELS]),
        "seconds": time.perf_counter() - start,
    }
    paths = reporting.write_report(options.out, report)
    print("\n" + reporting.markdown_page(report))
    print(f"Wrote {', '.join(map(str, paths))} after {report['seconds']:.0f} s.")
    return 0 if report["verdict"]["passed"] else 1


def run_variants(
    setting: Setting, device: str, seed: int, scratch: Path
) -> dict[str, dict[str, Any]]:
    """Text, tokenizer, teacher, then the three students, each in its own process."""
    with tqdm(total=3, desc=f"{'text':<12}", unit="part", dynamic_ncols=True) as bar:
        files = text.collect_files(limit_bytes=setting.text_bytes)
        training, validation = (text.read_texts(part) for part in text.split_files(files))
        bar.update(1)
        bar.set_postfix(tokenizer=f"{sum(map(len, training)) / 1e6:.1f} M characters")
        # Trained on training text only: validation must not shape the vocabulary.
        tokenizer = text.train_tokenizer(training, setting.vocabulary)
        bar.update(1)
        ids = {
            "training": text.encode_texts(tokenizer, training),
            "validation": text.encode_texts(tokenizer, validation),
        }
        bar.set_postfix(tokens=f"{len(ids['training']) / 1e6:.1f} M")
        bar.update(1)
    limits = {"training": None, "validation": setting.validation_blocks}
    job: dict[str, Any] = {
        "setting": setting.to_dict(),
        "device": device,
        "seed": seed,
        "scratch": str(scratch / "trainer"),
        "teacher": str(scratch / "teacher"),
    }
    for name, row in ids.items():
        job[name] = str(scratch / f"{name}.npy")
        np.save(job[name], text.cut_blocks(row, setting.length, limits[name]))
    return {name: run_child(job, name, scratch) for name in (TEACHER, *VARIANTS)}


def run_child(job: dict[str, Any], name: str, scratch: Path) -> dict[str, Any]:
    """Trains one variant in a fresh process, whose peak memory is then its own."""
    result = scratch / f"{name}.result.json"
    path = scratch / f"{name}.job.json"
    path.write_text(json.dumps({**job, "variant": name, "result": str(result)}))
    root = str(Path(kdkernels.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": root if not inherited else os.pathsep.join((root, inherited)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if job["device"] == "cuda":
        # One device: with several the Trainer would split each batch over them.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    command = [sys.executable, "-m", "kdkernels.demo.variant", str(path)]
    subprocess.run(command, check=True, env=environment)
    return json.loads(result.read_text())


def machine_sentence(device: str, result: dict[str, Any]) -> str:
    """Device, threads, versions and the backend that served kdkernels."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor_name()
    backend = pick("divergence", device).__name__.rsplit(".", 1)[-1]
    version = getattr(kdkernels, "__version__", "unknown")
    return (
        f"Measured on {device} ({name}), {result['threads']} threads, kdkernels {version} with "
        f"backend {backend}, torch {torch.__version__}, transformers {result['transformers']}, "
        f"Python {platform.python_version()}."
    )


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
