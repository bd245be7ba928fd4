"""Fits the planner's coefficients to measured runs: every other record of the grid, by name; errors are of the rest.

python tools/fit_plan.py benchmarks/results/memory-grid.json
python tools/fit_plan.py benchmarks/results/memory-grid.json --write
python tools/fit_plan.py benchmarks/results/memory-grid.json --out coefficients.json --picture fit.png

--write brings all that comes of a grid up to date: src/lensmith/plan/coefficients.json, docs/plan-fit.png and the table of
docs/plan.md.

Huber's loss of relative errors, plus a pull towards the values as derived, so that what a grid does not show stays as it
was (Levenberg-Marquardt on the logarithms of the coefficients, which keeps them positive).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lensmith.plan.coefficients import Coefficients
from lensmith.plan.records import Record, read_records

MEMORY = ("kept_activations", "live_layer", "tower", "head", "fragmentation_gib", "fragmentation_share")
TIME = (
    "matmul",
    "tower_matmul",
    "bandwidth",
    "pcie",
    "layer_launch_ms",
    "few_bit_launch_ms",
    "tower_launch_ms",
    "update_launch_ms",
)
BOUNDS = {
    "matmul": (0.2, 0.9),
    "tower_matmul": (0.2, 0.9),
    "bandwidth": (0.3, 0.95),
    "pcie": (0.3, 0.95),
}
"""Shares of a maker's rate that software reaches: nobody gets all of it, and less means that something else is slow."""
OUTLIER = 0.1
"""Relative error from which a record counts by its size, no more by its square: one odd hour must not bend the rest."""
PULL = 0.02
"""Weight of a coefficient's change, in logarithms, against relative errors: a factor of two costs as much as 1.4 % of error."""
ROUNDS = 60
DAMPINGS = 12
"""Tries of a round, each with a shorter step."""
NUDGE = 1e-4
TICKS = (0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 50)
SMALL_TOKENS = 2048
"""Of a pack: below, a step is about as long as its kernels take to be launched."""
REPOSITORY = Path(__file__).resolve().parents[1]
WRITTEN = REPOSITORY / "src" / "lensmith" / "plan" / "coefficients.json", REPOSITORY / "docs" / "plan-fit.png"
LONGEST_STEP = 0.3
"""Of a logarithm per round; peaks change their moment, so far steps mislead."""


def fit(records: Sequence[Record], start: Coefficients) -> Coefficients:
    """Coefficients that predict peaks and times of these records best."""
    found = _descend(start, MEMORY, lambda c: [r.predict(c)[0] / r.peak_gib - 1 for r in records])
    return _descend(found, TIME, lambda c: [r.predict(c)[1] / r.step_s - 1 for r in records])


def _descend(start: Coefficients, names: Sequence[str], errors: Callable[[Coefficients], list[float]]) -> Coefficients:
    origin = np.log([getattr(start, name) for name in names])
    pulled = np.eye(len(names)) * PULL
    place = origin.copy()

    def residuals(at: np.ndarray) -> np.ndarray:
        return np.array([*errors(_at(start, names, at)), *(pulled @ (at - origin))])

    lowest, highest = np.log([BOUNDS.get(name, (1e-6, 1e6)) for name in names]).T
    damping = 1e-3
    for _ in range(ROUNDS):
        here = residuals(place)
        # What is far off pulls no harder than what is off by OUTLIER.
        weights = OUTLIER / np.maximum(np.abs(here), OUTLIER)
        slopes = np.stack([(residuals(place + step) - here) / NUDGE for step in np.eye(len(names)) * NUDGE], axis=1)
        bend, pull = slopes.T @ (weights[:, None] * slopes), -slopes.T @ (weights * here)
        for _ in range(DAMPINGS):
            step = np.linalg.solve(bend + damping * np.eye(len(names)), pull)
            tried = np.clip(place + np.clip(step, -LONGEST_STEP, LONGEST_STEP), lowest, highest)
            if _loss(residuals(tried)) < _loss(here):
                place, damping = tried, damping / 5
                break
            damping *= 5
        else:
            break
    return _at(start, names, place)


def _loss(residuals: np.ndarray) -> float:
    """Huber's: squares up to OUTLIER, from there on straight."""
    size = np.abs(residuals)
    return float(np.where(size <= OUTLIER, size**2, 2 * OUTLIER * size - OUTLIER**2).sum())


def _at(start: Coefficients, names: Sequence[str], place: np.ndarray) -> Coefficients:
    return replace(start, **{name: float(np.exp(value)) for name, value in zip(names, place, strict=True)})


def report_errors(records: Sequence[Record], found: Coefficients) -> dict[str, float]:
    """Relative errors of peak and time, median and worst."""
    predicted = [record.predict(found) for record in records]
    peaks = [abs(peak / record.peak_gib - 1) for record, (peak, _) in zip(records, predicted, strict=True)]
    times = [abs(step_s / record.step_s - 1) for record, (_, step_s) in zip(records, predicted, strict=True)]
    return {
        "peak_median": round(median(peaks), 4),
        "peak_worst": round(max(peaks), 4),
        "step_median": round(median(times), 4),
        "step_worst": round(max(times), 4),
    }


def list_errors(fitted: Sequence[Record], judged: Sequence[Record], found: Coefficients) -> list[dict[str, Any]]:
    """Errors of both halves, and of kinds of packs that the fit has not seen; a kind without a record is left out."""
    kinds = {
        "fitted on": fitted,
        "not seen by the fit": judged,
        f"of these, under {SMALL_TOKENS:,} tokens": [r for r in judged if r.work.tokens < SMALL_TOKENS],
        "of these, GRPO with shared prompts": [r for r in judged if r.work.key_tokens],
    }
    return [
        {"what": what, "records": len(records), **report_errors(records, found)}
        for what, records in kinds.items()
        if records
    ]


def split(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Records to fit and records to judge by: every other one, in the order of their names."""
    return list(records[0::2]), list(records[1::2])


def draw(records: Sequence[Record], found: Coefficients, path: Path) -> None:
    """Predicted against measured, the judged half filled."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    fitted, judged = split(records)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, which, unit in zip(panels, (0, 1), ("GiB reserved", "s per step"), strict=True):
        measured = [(record.peak_gib, record.step_s)[which] for record in records]
        axes.axline((min(measured), min(measured)), (max(measured), max(measured)), color="0.7", linewidth=1)
        for half, label, face in ((fitted, "fitted on", "none"), (judged, "not seen by the fit", "C0")):
            places = [((r.peak_gib, r.step_s)[which], r.predict(found)[which]) for r in half]
            axes.scatter(*zip(*places, strict=True), label=label, facecolors=face, edgecolors="C0")
        axes.set(xscale="log", yscale="log", xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}")
        ticks = [tick for tick in TICKS if min(measured) * 0.8 < tick < max(measured) * 1.25]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--write", action="store_true", help="coefficients, picture and page of this repository")
    options = parser.parse_args(arguments)
    if options.write:
        options.out, options.picture = WRITTEN
    records = read_records(options.grid)
    fitted, judged = split(records)
    found = fit(fitted, Coefficients())
    told = {
        "fitted_on": {"records": len(fitted), "cards": sorted({record.card for record in records})},
        "note": f"By tools/fit_plan.py from {options.grid.name}; errors are of the {len(judged)} records that it has not seen.",
        "errors": report_errors(judged, found),
        "errors_by_kind": list_errors(fitted, judged, found),
        "values": {item.name: round(asdict(found)[item.name], 4) for item in fields(found)},
    }
    print(json.dumps(told, indent=2))
    for record in records:
        peak, step_s = record.predict(found)
        seen = "fitted" if record in fitted else "judged"
        peaks, steps = f"{peak:6.2f} / {record.peak_gib:6.2f} GiB", f"{step_s:6.3f} / {record.step_s:6.3f} s"
        print(f"{record.name:40} {seen}  {peaks}  {steps}", file=sys.stderr)
    if options.out:
        options.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if options.picture:
        draw(records, found, options.picture)
    if options.write:
        # In a process of its own: it reads what was written just now.
        subprocess.run([sys.executable, str(REPOSITORY / "tools" / "write_docs.py")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
