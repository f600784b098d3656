"""Peak extra memory of Sinkhorn's unrolled gradient on the CPU: `python -m bench.transport_memory`.

Each point runs in a process of its own, whose peak resident size is read before and after: one
problem of N rows and columns, the gradient of the sharp cost through T iterations.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

from .bench_transport import EPSILON, OURS, log_loop

_AUTOGRAD = "autograd through the loop"


def one(variant: str, size: int, iterations: int) -> None:
    """Prints variant, N, T, extra MiB, extra in units of the cost, seconds."""
    import torch

    import kdkernels as kd

    def run(size: int) -> None:
        cost = torch.rand(1, size, size, requires_grad=True)
        a = torch.full((1, size), 1.0 / size)
        before, start = peak(), time.perf_counter()
        if variant == OURS:
            value = kd.sinkhorn(cost, a, a, epsilon=EPSILON, iterations=iterations)
        else:
            value = log_loop(cost, a, iterations)[0]
        torch.autograd.grad(value.sum(), cost)
        elapsed = time.perf_counter() - start
        extra = peak() - before
        if size > 64:
            matrices = extra * 1024 / (4 * size * size)
            print(
                f"{variant},{size},{iterations},{extra / 1024:.1f},{matrices:.2f},{elapsed:.2f}",
                flush=True,
            )

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    run(64)  # loads what the first call loads
    run(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--point", metavar="VARIANT", help="one point, in this process")
    options = parser.parse_args()
    if options.point:
        one(options.point, options.size, options.iterations)
        return
    print("variant,size,iterations,extra_mib,extra_costs,seconds", flush=True)
    for variant in (OURS, _AUTOGRAD):
        command = [sys.executable, "-m", "bench.transport_memory", "--point", variant]
        command += ["--size", str(options.size), "--iterations", str(options.iterations)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
