"""What the demo says: the verdict on equality, one table, one picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kdkernels.demo.settings import EAGER, KERNELS, TITLES, VARIANTS

JSON_NAME, MARKDOWN_NAME, PLOT_NAME = "demo.json", "demo.md", "demo.png"
COMPARED_STEPS = 50
LOSS_TOLERANCE = 1e-4  # relative, per step
PERPLEXITY_TOLERANCE = 5e-3  # relative, after the last step
_COLOURS = {"labels": "#8c8c8c", "eager": "#d1793b", "kdkernels": "#2b6ca3"}


def judge_equality(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compares eager and kdkernels: the first 50 losses and the final perplexity.

    Returns `passed` and the differences found. A value that is not finite fails, and so do runs
    of different length.
    """
    eager, kernels = results[EAGER], results[KERNELS]
    pairs = list(zip(eager["losses"], kernels["losses"], strict=False))[:COMPARED_STEPS]
    same_length = len(eager["losses"]) == len(kernels["losses"]) and bool(pairs)
    loss_difference = max((_relative(left, right) for left, right in pairs), default=math.inf)
    perplexity_difference = _relative(eager["perplexity"], kernels["perplexity"])
    passed = (
        same_length
        and loss_difference <= LOSS_TOLERANCE
        and perplexity_difference <= PERPLEXITY_TOLERANCE
    )
    return {
        "passed": passed,
        "compared_steps": len(pairs),
        "loss_difference": loss_difference,
        "loss_tolerance": LOSS_TOLERANCE,
        "perplexity_difference": perplexity_difference,
        "perplexity_tolerance": PERPLEXITY_TOLERANCE,
    }


def _relative(expected: float, found: float) -> float:
    if not (math.isfinite(expected) and math.isfinite(found)):
        return math.inf
    return abs(found - expected) / max(abs(expected), 1e-30)


def verdict_sentence(verdict: dict[str, Any]) -> str:
    """One sentence: whether eager and kdkernels agree, and by how much they differ."""
    word = "agree" if verdict["passed"] else "DIFFER"
    return (
        f"Eager and kdkernels {word}: losses of the first {verdict['compared_steps']} steps differ "
        f"by at most {verdict['loss_difference']:.1e} (allowed {verdict['loss_tolerance']:.0e}), "
        f"final perplexities by {verdict['perplexity_difference']:.1e} "
        f"(allowed {verdict['perplexity_tolerance']:.0e}), both relative."
    )


def markdown_table(results: dict[str, dict[str, Any]]) -> str:
    """The table of the variants. Times are medians; memory is growth during training."""
    lines = [
        "| variant | validation perplexity | step, ms | loss part, ms | peak memory, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in VARIANTS:
        result = results[name]
        peak = result["peak_bytes"]
        memory = "not measured" if peak is None else f"{peak / 2**20:.0f}"
        lines.append(
            f"| {TITLES[name]} | {result['perplexity']:.1f} | {result['step_seconds'] * 1e3:.1f} "
            f"| {result['loss_seconds'] * 1e3:.1f} | {memory} |"
        )
    return "\n".join(lines)


def ratio_sentence(results: dict[str, dict[str, Any]]) -> str:
    """Eager divided by kdkernels: loss part, whole step and, where measured, memory."""
    eager, kernels = results[EAGER], results[KERNELS]
    parts = [
        f"loss part {eager['loss_seconds'] / kernels['loss_seconds']:.2f}",
        f"step {eager['step_seconds'] / kernels['step_seconds']:.2f}",
    ]
    if eager["peak_bytes"] and kernels["peak_bytes"]:
        parts.append(f"peak memory {eager['peak_bytes'] / kernels['peak_bytes']:.2f}")
    return f"Eager KL over kdkernels KL: {', '.join(parts)} times."


def write_report(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Writes demo.json, demo.md and demo.png into `folder`; other files there are not touched.

    `report` holds `results` (variant -> numbers), `verdict`, `teacher`, `setting` and `machine`
    (the closing sentence).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in (JSON_NAME, MARKDOWN_NAME, PLOT_NAME)]
    paths[0].write_text(json.dumps(report, indent=1) + "\n")
    paths[1].write_text(markdown_page(report))
    draw_plot(paths[2], report["results"])
    return paths


def markdown_page(report: dict[str, Any]) -> str:
    results, setting = report["results"], report["setting"]
    rows = setting["batch"] * setting["length"]
    sentences = [
        f"Student of {results[KERNELS]['parameters'] / 1e6:.1f} M parameters, teacher of "
        f"{report['teacher']['parameters'] / 1e6:.1f} M (validation perplexity "
        f"{report['teacher']['perplexity']:.1f}), {setting['vocabulary']} vocabulary entries, "
        f"{rows} rows a step, {setting['steps']} steps. Same initial weights and batches.",
        "The loss part is logits to gradient of the student's logits. Medians over steps; memory: "
        f"{results[KERNELS]['peak_method']}.",
        ratio_sentence(results),
        verdict_sentence(report["verdict"]),
        report["machine"],
    ]
    head = "# kdkernels demo\n\n" + sentences[0]
    return "\n\n".join([head, markdown_table(results), *sentences[1:]]) + "\n"


def draw_plot(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Loss curves, bars of time (loss part below, rest of the step above), bars of memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, times, memory) = pyplot.subplots(
        1, 3, figsize=(13, 4), width_ratios=(2, 1, 1), layout="constrained"
    )
    for name in VARIANTS:
        losses = results[name]["losses"]
        style = {"linestyle": "--", "linewidth": 1.6} if name == KERNELS else {"linewidth": 2.6}
        label = TITLES[name] + (" (cross entropy)" if name == "labels" else "")
        curves.plot(range(1, len(losses) + 1), losses, color=_COLOURS[name], label=label, **style)
    curves.set(xlabel="step", ylabel="training loss, nats", title="Loss")
    curves.legend(frameon=False, loc="center right")
    names = [TITLES[name].replace(" ", "\n") for name in VARIANTS]
    colours = [_COLOURS[name] for name in VARIANTS]
    loss = [results[name]["loss_seconds"] * 1e3 for name in VARIANTS]
    whole = [results[name]["step_seconds"] * 1e3 for name in VARIANTS]
    rest = [step - part for step, part in zip(whole, loss, strict=True)]
    times.bar(names, loss, color=colours)
    times.bar(names, rest, bottom=loss, color=colours, alpha=0.3)
    times.bar_label(times.containers[0], fmt="%.0f", label_type="center")
    times.bar_label(times.containers[1], fmt="%.0f", label_type="center")
    times.set(ylabel="ms, median", title="Step: loss part, rest (pale)")
    peaks = [(results[name]["peak_bytes"] or 0) / 2**20 for name in VARIANTS]
    memory.bar_label(memory.bar(names, peaks, color=colours), fmt="%.0f")
    memory.set(ylabel="MiB", title="Peak memory growth")
    for axes in (curves, times, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
