"""How exact losses and gradients are: ours and the peers' against float64, as CSV and Markdown.

    python bench/numerics.py --csv bench/results/numerics-cpu.csv --markdown
    python bench/numerics.py --from-csv bench/results/numerics-cpu.csv --summary

For each standard deviation of the logits and each student-teacher gap the inputs are rounded to
the dtype first; float64 then computes from those rounded inputs, so an error is the method's own.
Half dtypes for the kinds in HALF_KINDS alone. Loss: relative error. Gradient: relative L2 error;
rounding it to 16 bits alone costs about 1.6e-3 in bfloat16 and 2e-4 in float16. Float16 gradients
are taken under a loss scale, as a gradient scaler does, because the entries of a mean over rows lie
below float16's smallest normal number.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: let the relative imports below find the folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "bench"

import torch
import torch.nn.functional as F

from . import harness, peers

STDS = (1.0, 5.0, 10.0)
GAPS = (1.0, 0.1, 0.01, 0.001)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = tuple(peers.EAGER)
# Kinds measured in every dtype and with torch.compile.
HALF_KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
OURS = "kdkernels"
LOSS_SCALE = {torch.float16: 2.0**12}


@dataclasses.dataclass(frozen=True)
class Error:
    """Errors of one method on one input; empty where it does not apply or the method cannot run."""

    device: str
    date: str
    commit: str
    versions: str
    kind: str
    shape: str
    dtype: str
    std: float
    gap: float
    variant: str
    loss_error: float | None = None
    gradient_error: float | None = None
    note: str = ""


COLUMNS = [field.name for field in dataclasses.fields(Error)]


def reference(
    student: torch.Tensor, teacher: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient) in float64 from the formulas, tau = 1, mean over rows."""
    student = student.detach().double().requires_grad_()
    log_q = F.log_softmax(student, dim=-1)
    log_p = F.log_softmax(teacher.double(), dim=-1)
    if kind == "forward_kl":
        # sum p (expm1(-d) + d) with d = log p - log q: no cancellation at any gap
        rows = _gap_sum(log_p, log_q)
    elif kind == "jensen_shannon":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        rows = 0.5 * (_gap_sum(log_p, log_m) + _gap_sum(log_q, log_m))
    else:
        rows = peers.EAGER[kind](log_p, log_q)  # 16 digits leave enough at these gaps
    loss = rows.mean()
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def _gap_sum(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    # KL(p, q) by rows; adding sum q - sum p = 0 makes every summand non-negative
    d = log_p - log_q
    return (log_p.exp() * (torch.expm1(-d) + d)).sum(-1)


def make_inputs(
    rows: int, vocabulary: int, std: float, gap: float, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher), each (N, V), rounded to `dtype`; the same numbers for every dtype."""
    generator = torch.Generator().manual_seed(0)
    teacher = std * torch.randn(rows, vocabulary, generator=generator)
    student = teacher + gap * torch.randn(rows, vocabulary, generator=generator)
    return student.to(device, dtype), teacher.to(device, dtype)


def methods(kind: str, half: bool, compile: bool, third_party: bool) -> list[peers.Peer]:
    """Ours and every peer for a kind, at tau = 1."""
    import kdkernels as kd

    def own(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.divergence(student, None if kind == "entropy" else teacher, kind)

    ours = peers.Peer(OURS, lambda: own, third_party=False)
    if kind == "forward_kl":
        return [ours, *peers.forward_kl_peers(1.0, half, compile, third_party)]
    if kind == "jensen_shannon":
        written = peers.kind_peers(kind, 1.0, compile, third_party=False)
        return [ours, *written, *peers.jensen_shannon_peers(0.5, 1.0, compile, third_party)]
    compile = compile and kind in HALF_KINDS
    return [ours, *peers.kind_peers(kind, 1.0, compile, third_party)]


def errors_of(
    loss: Callable[..., torch.Tensor],
    student: torch.Tensor,
    teacher: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
) -> tuple[float, float]:
    """(relative loss error, relative L2 gradient error) of one method against `exact`."""
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, teacher)
    scale = LOSS_SCALE.get(leaf.dtype, 1.0)
    (gradient,) = torch.autograd.grad(value.float() * scale, leaf)
    return (
        relative(value.detach().double() - exact[0], exact[0]),
        relative(gradient.double() / scale - exact[1], exact[1]),
    )


def relative(difference: torch.Tensor, exact: torch.Tensor) -> float:
    """|difference| / |exact|; 0 / 0 is 0: an exact zero that was met."""
    size, error = exact.norm().item(), difference.norm().item()
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def measure(
    device: str,
    rows: int,
    vocabulary: int,
    compile: bool = True,
    third_party: bool = True,
    kinds: Sequence[str] = KINDS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    stds: Sequence[float] = STDS,
    gaps: Sequence[float] = GAPS,
) -> Iterator[Error]:
    """Every method on every input, method by method so that each is loaded and compiled once."""
    machine = harness.describe_machine(device)
    for kind in kinds:
        for dtype in dtypes if kind in HALF_KINDS else dtypes[:1]:
            torch.compiler.reset()
            base = Error(
                **{key: machine[key] for key in ("device", "date", "commit", "versions")},
                kind=kind,
                shape=f"{rows}x{vocabulary}",
                dtype=str(dtype).removeprefix("torch."),
                std=0.0,
                gap=0.0,
                variant="",
            )
            inputs = {}
            for std in stds:
                for gap in gaps:
                    pair = make_inputs(rows, vocabulary, std, gap, dtype, device)
                    inputs[std, gap] = (pair, reference(*pair, kind))
            for method in methods(kind, dtype.itemsize == 2, compile, third_party):
                yield from _measure_method(method, inputs, base)


def _measure_method(method: peers.Peer, inputs: dict, base: Error) -> Iterator[Error]:
    base = dataclasses.replace(base, variant=method.name, note=method.note)
    try:
        loss = method.load()
        for (std, gap), ((student, teacher), exact) in inputs.items():
            loss_error, gradient_error = errors_of(loss, student, teacher, exact)
            yield dataclasses.replace(
                base,
                std=std,
                gap=gap,
                loss_error=loss_error if method.value_is_comparable else None,
                gradient_error=gradient_error,
            )
    except Exception as error:  # whatever a peer throws is its result, not ours
        yield dataclasses.replace(base, note=harness.describe_failure(error))


# Files --------------------------------------------------------------------------------------------


def write(path: Path, errors: Sequence[Error]) -> None:
    """Writes a new CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for error in errors:
            values = (getattr(error, name) for name in COLUMNS)
            writer.writerow(
                ["" if v is None else f"{v:.3g}" if isinstance(v, float) else v for v in values]
            )


def read(path: Path) -> list[Error]:
    """Reads what `write` wrote; ValueError for a file of another schema."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: expected the columns {COLUMNS}, got {reader.fieldnames}")
        found = []
        for record in reader:
            for name in ("std", "gap", "loss_error", "gradient_error"):
                record[name] = float(record[name]) if record[name] else None
            found.append(Error(**record))
    return found


def markdown(errors: Sequence[Error]) -> str:
    """A table for each kind, dtype and standard deviation: `loss | gradient` error for each gap."""
    lines: list[str] = []
    tables: dict[tuple[str, str, float], list[Error]] = {}
    for error in errors:
        if error.loss_error is not None or error.gradient_error is not None:
            tables.setdefault((error.kind, error.dtype, error.std), []).append(error)
    for (kind, dtype, std), members in tables.items():
        first = members[0]
        gaps = sorted({error.gap for error in members}, reverse=True)
        lines += [
            f"**{kind}, {dtype}, standard deviation {std:g}** ([{first.shape.replace('x', ', ')}], "
            f"{first.device}, {first.date}, {first.commit})",
            "",
            "| method: loss / gradient error | "
            + " | ".join(f"gap {gap:g}" for gap in gaps)
            + " |",
            "|---" * (len(gaps) + 1) + "|",
        ]
        for variant in dict.fromkeys(error.variant for error in members):
            by_gap = {error.gap: error for error in members if error.variant == variant}
            cells = [_pair(by_gap.get(gap)) for gap in gaps]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
        lines.append("")
    absent = {
        (error.variant, error.note): None
        for error in errors
        if error.loss_error is None and error.gradient_error is None
    }
    if absent:
        lines += ["Not run:", ""]
        lines += [f"- {variant}: {note}" for variant, note in absent]
        lines.append("")
    return "\n".join(lines)


def summary(errors: Sequence[Error]) -> str:
    """Two kinds of tables, the worst of the standard deviations in each cell: ours and the plain
    formula for every kind in float32, and every method in every dtype for the kinds in HALF_KINDS.
    """
    worst: dict[tuple[str, str, str, float], list[Error]] = {}
    for error in errors:
        if error.gradient_error is not None:
            key = (error.kind, error.dtype, error.variant, error.gap)
            worst.setdefault(key, []).append(error)
    gaps = sorted({key[3] for key in worst}, reverse=True)
    head = " | ".join(f"gap {gap:g}" for gap in gaps)

    def row(title: str, kind: str, dtype: str, variant: str) -> str:
        cells = [_worst_pair(worst.get((kind, dtype, variant, gap), [])) for gap in gaps]
        return f"| {title} | " + " | ".join(cells) + " |"

    lines = [f"| float32: loss / gradient error | {head} |", "|---" * (len(gaps) + 1) + "|"]
    for kind in dict.fromkeys(key[0] for key in worst):
        lines.append(row(kind, kind, "float32", OURS))
        lines.append(row(f"{kind}, eager", kind, "float32", "eager"))
    for kind in HALF_KINDS:
        lines += ["", f"| {kind}: loss / gradient error | {head} |"]
        lines.append("|---" * (len(gaps) + 1) + "|")
        for dtype, variant in dict.fromkeys(key[1:3] for key in worst if key[0] == kind):
            lines.append(row(f"{dtype}, {variant}", kind, dtype, variant))
    return "\n".join(lines)


def _worst_pair(errors: Sequence[Error]) -> str:
    columns = zip(*((error.loss_error, error.gradient_error) for error in errors), strict=True)
    found = [None if None in column else _worst(column) for column in columns]
    return " / ".join("-" if v is None else f"{v:.0e}" for v in found) or "-"


def _worst(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _pair(error: Error | None) -> str:
    if error is None:
        return "-"
    values = (error.loss_error, error.gradient_error)
    return " / ".join("-" if value is None else f"{value:.1e}" for value in values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 on success."""
    parser = argparse.ArgumentParser(description="Errors of losses and gradients against float64.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--no-peers", action="store_true", help="ours and PyTorch's alone")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--csv", type=Path, help="write, or with --from-csv nothing")
    parser.add_argument("--from-csv", type=Path, help="read these errors instead of measuring")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument("--summary", action="store_true", help="print two compact tables")
    options = parser.parse_args(arguments)
    if options.from_csv is not None:
        errors = read(options.from_csv)
    else:
        errors = list(
            measure(
                options.device,
                options.rows,
                options.vocabulary,
                compile=not options.no_compile,
                third_party=not options.no_peers,
            )
        )
    if options.csv is not None and options.from_csv is None:
        write(options.csv, errors)
        print(f"wrote {options.csv}", file=sys.stderr)
    if options.markdown:
        print(markdown(errors))
    if options.summary:
        print(summary(errors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
