"""From CSVs of the harness to a picture and to the Markdown tables of the README.

python bench/plot.py --markdown bench/results/x.csv ...
python bench/plot.py --png out.png bench/results/x.csv ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: let the relative imports below find the folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "bench"

from . import records
from .records import Row

OURS = "kdkernels"
Group = tuple[str, str, str, str, str, str]  # family, device, case, shape, dtype, regime


def group_of(row: Row) -> Group:
    """Rows of one group were measured side by side and may be compared."""
    return (row.family, row.device, row.case, row.shape, row.dtype, row.regime)


def groups(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """Rows by group, in order of appearance. Of several dates a group keeps the newest alone:
    a ratio of two days would compare machines."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(group_of(row), []).append(row)
    return {
        key: [row for row in members if row.date == max(member.date for member in members)]
        for key, members in found.items()
    }


def runs_of(rows: Sequence[Row], variant: str) -> dict[int, Row]:
    """The timed rows of a variant by run."""
    return {row.run: row for row in rows if row.variant == variant and row.median_ms is not None}


def best_row(rows: Sequence[Row], variant: str) -> Row | None:
    """The run whose median is the second best; None for a variant that never ran."""
    runs = list(runs_of(rows, variant).values())
    if not runs:
        return None
    chosen = records.second_best([row.median_ms for row in runs])
    return next(row for row in runs if row.median_ms == chosen)


def speedup(rows: Sequence[Row], variant: str, reference: str = OURS) -> float | None:
    """How many times longer `variant` takes than `reference`: second best ratio within one run."""
    theirs, ours = runs_of(rows, variant), runs_of(rows, reference)
    ratios = [theirs[run].median_ms / ours[run].median_ms for run in theirs if run in ours]
    return records.second_best(ratios, largest=True) if ratios else None


def variants_of(rows: Sequence[Row]) -> list[str]:
    """Variants of a group: ours first, then by time, then those that did not run."""

    def order(name: str) -> tuple[bool, bool, float]:
        best = best_row(rows, name)
        return (
            not name.startswith(OURS),
            best is None,
            best.median_ms if best is not None else 0.0,
        )

    return sorted(dict.fromkeys(row.variant for row in rows), key=order)


# Markdown -----------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """One table a group, under a heading that says what, where and when."""
    return "\n".join(_table(members) for members in groups(rows).values())


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = f"**{first.case}, [{first.shape.replace('x', ', ')}] {first.dtype}, {first.regime}**"
    place = f"{first.device} ({first.isa}), {first.threads} threads, {first.date}, {first.commit}"
    lines = [
        f"{title}: {place}",
        "",
        "| variant | ms (quartiles) | GB/s | of stream | extra memory | time / ours | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in variants_of(rows):
        best = best_row(rows, variant)
        if best is None:
            note = next(row.note for row in rows if row.variant == variant)
            lines.append(f"| {variant} | - | - | - | - | - | {_cell(note)} |")
            continue
        cells = [
            variant,
            f"{number(best.median_ms)} ({number(best.q1_ms)} to {number(best.q3_ms)})",
            "-" if best.gb_s is None else number(best.gb_s),
            "-" if best.stream_share is None else f"{100 * best.stream_share:.0f} %",
            "-" if best.extra_memory is None else f"{best.extra_memory:.2f}",
            _ratio(speedup(rows, variant)),
            _cell(best.note),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Three significant digits, never in exponent form for the sizes met here."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# Picture ------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of time (whiskers: quartiles) and of extra memory; one line of panels a group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = {
        key: members
        for key, members in groups(rows).items()
        if any(row.median_ms is not None for row in members)
    }
    if not timed:
        raise ValueError("rows: expected at least one measured variant, got none")
    counts = [sum(best_row(m, v) is not None for v in variants_of(m)) for m in timed.values()]
    figure, panels = pyplot.subplots(
        len(timed),
        2,
        squeeze=False,
        figsize=(12, sum(0.9 + 0.28 * count for count in counts)),
        gridspec_kw={"width_ratios": [3, 1], "height_ratios": [count + 2 for count in counts]},
        layout="constrained",
    )
    for (left, right), members in zip(panels, timed.values(), strict=True):
        _draw_group(left, right, members)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_group(left, right, rows: Sequence[Row]) -> None:
    names = [name for name in variants_of(rows) if best_row(rows, name) is not None]
    best = [best_row(rows, name) for name in names]
    places = range(len(names))
    colours = ["tab:blue" if name.startswith(OURS) else "tab:gray" for name in names]
    times = [row.median_ms for row in best]
    whiskers = [
        [row.median_ms - row.q1_ms for row in best],
        [row.q3_ms - row.median_ms for row in best],
    ]
    bars = left.barh(places, times, xerr=whiskers, color=colours)
    left.bar_label(bars, labels=[f" {number(time)}" for time in times], fontsize=7)
    left.set_yticks(places, names, fontsize=8)
    left.invert_yaxis()
    left.margins(x=0.12)
    left.set_xlabel("ms", fontsize=8)
    first = rows[0]
    title = f"{first.case}  [{first.shape}]  {first.dtype}  {first.regime}  ({first.device})"
    left.set_title(title, fontsize=9, loc="left")
    measured = [
        (place, row)
        for place, row in zip(places, best, strict=True)
        if row.extra_memory is not None
    ]
    if not measured:
        right.set_axis_off()
        return
    right.barh(
        [place for place, _ in measured],
        [row.extra_memory for _, row in measured],
        color=[colours[place] for place, _ in measured],
    )
    right.set_ylim(left.get_ylim())
    right.set_yticks([])
    right.set_xlabel("extra memory, in logits tensors", fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 on success."""
    parser = argparse.ArgumentParser(description="Tables and pictures from the harness's CSVs.")
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--png", type=Path, help="write a picture")
    parser.add_argument("--case", nargs="+", default=[], help="parts of the names of cases")
    parser.add_argument("--regime", nargs="+", default=[], help="allocator regimes")
    options = parser.parse_args(arguments)
    if not options.markdown and options.png is None:
        parser.error("expected --markdown, --png OUT.png or both")
    rows = [row for path in options.csv for row in records.read_rows(path)]
    rows = [
        row
        for row in rows
        if (not options.case or any(part in row.case for part in options.case))
        and (not options.regime or row.regime in options.regime)
    ]
    if options.markdown:
        print(markdown(rows))
    if options.png is not None:
        draw(rows, options.png)
        print(f"wrote {options.png}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
