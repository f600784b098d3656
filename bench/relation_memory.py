"""Peak extra memory and time of a relation over N on the CPU: `python -m bench.relation_memory`.

Each point runs in a process of its own, whose peak resident size is read before and after.
"""

from __future__ import annotations

import argparse
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
    print(f"{kind},{tokens},{width},{(peak() - before) / 1024:.1f},{elapsed:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["softmax_kl", "margin_l1", "gram_row_l2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dense", action="store_true", help="the torch reference instead")
    parser.add_argument(
        "--point", nargs=2, metavar=("KIND", "N"), help="one point, in this process"
    )
    options = parser.parse_args()
    if options.point:
        one(options.point[0], int(options.point[1]), options.width, options.dense)
        return
    print("kind,tokens,width,extra_mib,seconds", flush=True)
    for kind in options.kinds:
        for tokens in options.tokens:
            command = [sys.executable, "-m", "bench.relation_memory", "--point", kind, str(tokens)]
            command += ["--width", str(options.width)] + (["--dense"] if options.dense else [])
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
