"""Peak extra memory and time of a relation over N on the CPU: `python -m bench.relation_memory`.

    python -m bench.relation_memory --png PNG CSV

draws such a table. Each point runs in a process of its own, whose peak resident size is read before
and after.
"""

from __future__ import annotations

import argparse
import csv
import resource
import subprocess
import sys
import time


def one(kind: str, tokens: int, width: int, dense: bool) -> None:
    """Prints N, extra MiB and seconds of one loss + gradient."""
    import torch

    import kdkernels as kd

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    student = torch.randn(1, tokens, width, requires_grad=True)
    teacher = torch.randn(1, tokens, width)
    small = torch.randn(1, 128, width, requires_grad=True)
    with kd.use_backend("torch" if dense else None):
        # Loads what the first call loads.
        kd.relation(small, teacher[:, :128], kind).backward()
        before, start = peak(), time.perf_counter()
        kd.relation(student, teacher, kind).backward()
        elapsed = time.perf_counter() - start
    extra = (peak() - before) / 1024
    print(f"{kind},{tokens},{width},{int(dense)},{extra:.1f},{elapsed:.2f}", end="", flush=True)


def draw(source: str, target: str) -> None:
    """Extra memory over N, both logarithmic, one curve a kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for label in dict.fromkeys((r["kind"], r["dense"]) for r in rows):
        mine = [r for r in rows if (r["kind"], r["dense"]) == label]
        name = label[0] + (" (dense reference)" if label[1] == "1" else "")
        sizes = [int(r["tokens"]) for r in mine]
        axes.loglog(sizes, [float(r["extra_mib"]) for r in mine], marker="o", label=name)
    axes.set_xlabel("tokens N")
    axes.set_ylabel("extra peak memory, MiB")
    axes.legend(frameon=False)
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["softmax_kl", "margin_l1", "gram_row_l2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dense", action="store_true", help="the torch reference instead")
    parser.add_argument(
        "--point", nargs=2, metavar=("KIND", "N"), help="one point, in this process"
    )
    parser.add_argument("--png", nargs=2, metavar=("PNG", "CSV"), help="draw instead of measuring")
    options = parser.parse_args()
    if options.png:
        draw(options.png[1], options.png[0])
        return
    if options.point:
        one(options.point[0], int(options.point[1]), options.width, options.dense)
        return
    from .harness import describe_machine

    machine = describe_machine("cpu")
    tail = ",".join(str(machine[k]) for k in ("device", "date", "commit"))
    print("kind,tokens,width,dense,extra_mib,seconds,device,date,commit", flush=True)
    for kind in options.kinds:
        for tokens in options.tokens:
            command = [sys.executable, "-m", "bench.relation_memory", "--point", kind, str(tokens)]
            command += ["--width", str(options.width)] + (["--dense"] if options.dense else [])
            subprocess.run(command, check=True)
            print("," + tail, flush=True)


if __name__ == "__main__":
    main()
