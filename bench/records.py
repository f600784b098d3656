"""One measured variant is one row; this file says what a row holds and how it is kept in a CSV."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant in one run of one case. Empty times: it did not run, and `note` says why."""

    family: str
    case: str
    device: str  # name of the processor or the card
    isa: str  # CPU instruction set, or "sm_90" and the like
    threads: int
    date: str  # UTC, ISO 8601
    commit: str
    versions: str  # "name=version;name=version"
    regime: str  # allocator: "default", "warm" or "caching"
    run: int  # 1, 2, 3: whole repetitions; bars use the second best
    rounds: int
    shape: str  # "512x128256"
    dtype: str
    variant: str
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    bytes: int | None = None  # least traffic of the case, the same for every variant
    gb_s: float | None = None  # bytes / median
    stream_gb_s: float | None = None  # 2 reads + 1 write, interleaved with the variants of this run
    stream_share: float | None = None  # gb_s / stream_gb_s
    extra_memory: float | None = None  # peak beyond the inputs, in units of one logits tensor
    note: str = ""


COLUMNS = [field.name for field in dataclasses.fields(Row)]
_INTEGERS = {"threads", "run", "rounds", "bytes"}
_FLOATS = {"median_ms", "q1_ms", "q3_ms", "gb_s", "stream_gb_s", "stream_share", "extra_memory"}


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Appends rows; a new file gets its header first. Floats keep six significant digits."""
    path = Path(path)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_to_text(getattr(row, column)) for column in COLUMNS])


def read_rows(path: Path) -> list[Row]:
    """Reads what `append_rows` wrote; ValueError for a file of another schema."""
    path = Path(path)
    _check_header(path)
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{name: _from_text(name, text) for name, text in record.items()})
            for record in csv.DictReader(file)
        ]


def _check_header(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), None)
    if header != COLUMNS:
        raise ValueError(f"{path}: expected the columns {COLUMNS}, got {header}")


def _to_text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _from_text(name: str, text: str) -> object:
    if name in _INTEGERS:
        return int(text) if text else None
    if name in _FLOATS:
        return float(text) if text else None
    return text


# Statistics ---------------------------------------------------------------------------------------


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile), interpolated linearly as numpy does."""
    if not samples:
        raise ValueError("samples: expected at least one value, got none")
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, middle, third


def second_best(values: Sequence[float], largest: bool = False) -> float:
    """The second best of several runs, so that neither a lucky nor an unlucky run sets a bar.

    Times are best when small, ratios in our favour when large (`largest=True`).
    """
    if not values:
        raise ValueError("values: expected at least one run, got none")
    ordered = sorted(values, reverse=largest)
    return ordered[min(1, len(ordered) - 1)]
