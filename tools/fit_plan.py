"""Fits the planner's coefficients to measured runs: every other record of the grid, by name; errors are of the rest.

python tools/fit_plan.py benchmarks/results/memory-grid.json
python tools/fit_plan.py benchmarks/results/memory-grid.json --out src/lensmith/plan/coefficients.json --picture docs/plan.png

Squared relative errors, plus a pull towards the values as derived, so that what a grid does not show stays as it was
(Gauss-Newton on the logarithms of the coefficients, which keeps them positive).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median

import numpy as np

from lensmith.plan.coefficients import Coefficients
from lensmith.plan.records import Record, read_records

MEMORY = ("kept_activations", "live_layer", "tower", "head", "fragmentation_gib", "fragmentation_share")
TIME = ("matmul", "tower_matmul", "bandwidth", "pcie", "layer_launch_ms")
PULL = 0.02
"""Weight of a coefficient's change, in logarithms, against relative errors: a factor of two costs as much as 1.4 % of error."""
ROUNDS = 30
NUDGE = 1e-4
TICKS = (0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 50)
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

    for _ in range(ROUNDS):
        here = residuals(place)
        slopes = np.stack([(residuals(place + step) - here) / NUDGE for step in np.eye(len(names)) * NUDGE], axis=1)
        step, *_ = np.linalg.lstsq(slopes, -here, rcond=None)
        step = np.clip(step, -LONGEST_STEP, LONGEST_STEP)
        # A shorter step where the peak's moment changed on the way.
        better = next((s for s in (step, step / 4, step / 16) if _size(residuals(place + s)) < _size(here)), None)
        if better is None:
            break
        place = place + better
    return _at(start, names, place)


def _size(values: np.ndarray) -> float:
    return float(values @ values)


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
    options = parser.parse_args(arguments)
    records = read_records(options.grid)
    fitted, judged = split(records)
    found = fit(fitted, Coefficients())
    told = {
        "fitted_on": {"records": len(fitted), "cards": sorted({record.card for record in records})},
        "note": f"By tools/fit_plan.py from {options.grid.name}; errors are of the {len(judged)} records that it has not seen.",
        "errors": report_errors(judged, found),
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
