"""`python -m kdkernels demo`: a teacher, a student and three losses on text that is always there.

A byte-pair tokenizer and a small teacher are trained on the sources of the Python standard
library; a smaller student then learns three ways from the same weights and the same batches:
labels only, the plain torch KL, and the KL of kdkernels. The demo compares time, memory and
values of the last two, and fails when their values differ.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo with the command line `argv` (default: of the process).

    Returns 0 when eager and kdkernels agree, 1 when they do not, 2 when a part could not run.
    """
    from kdkernels.demo.run import main as run_main

    return run_main(argv)
