"""`python -m kdkernels info | demo | bench`."""

from __future__ import annotations

import argparse
import sys


def info() -> int:
    """Print versions, backends and what the binary was built for."""
    import torch

    import kdkernels
    from kdkernels.backends.native import extension

    print(f"kdkernels {kdkernels.__version__}, torch {torch.__version__}")
    print(f"python    {sys.version.split()[0]}")
    native = extension("_C")
    if isinstance(native, str):
        print(f"_C        not built ({native})")
    else:
        others = ", ".join(native.compiled_isas())
        print(f"CPU ISA   {native.isa()} (compiled: {others}), {native.num_threads()} threads")
        print(f"binding   {native.binding()}")
        if hasattr(native, "cuda_info"):
            cuda = native.cuda_info()
            needs = f"{cuda['runtime'] // 1000}.{cuda['runtime'] % 1000 // 10}"
            driver = cuda["driver"]
            has = f"{driver // 1000}.{driver % 1000 // 10}" if driver else "no driver"
            print(f"CUDA      built for {native.cuda_architectures.replace(';', ', ')}")
            print(f"driver    needs CUDA {needs}, found {has}; {cuda['devices']} device(s)")
        else:
            print("CUDA      not in this build")
    for report in kdkernels.backends():
        state = "available" if report.available else f"not available: {report.why_not}"
        print(f"{report.family:<11} {report.backend:<7} {state}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m kdkernels`."""
    parser = argparse.ArgumentParser(prog="python -m kdkernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends, what the binary was built for")
    commands.add_parser("demo", help="distil a small model on real text", add_help=False)
    commands.add_parser("bench", help="benchmarks against the installed peers", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "info":
        if rest:
            parser.error(f"info: unknown arguments {' '.join(rest)}")
        return info()
    if arguments.command == "demo":
        from kdkernels import demo

        return demo.main(rest)
    from kdkernels import bench

    return bench.main(rest)


if __name__ == "__main__":
    sys.exit(main())
