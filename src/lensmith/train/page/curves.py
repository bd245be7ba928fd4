"""Curves over the steps of a run as inline SVG: small, one after the other, each with a table for who does not see it.

Where there are more steps than POINTS, a point is the mean of neighbouring ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lensmith.evals.markup import shorten, show

POINTS = 240
"""Most points of one curve."""
TABLE_ROWS = 12
MOST_LINES = 6
"""Lines in one plot that can still be told apart; the rest is counted."""
NAME_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture: lines over the same steps."""

    title: str
    lines: Mapping[str, Sequence[float | None]]
    """Name -> one value per step; None where there was none."""
    form: str = "{:.3g}"
    low: float | None = None
    """Where the axis begins and ends. None: at the smallest and the largest value."""
    high: float | None = None
    note: str = ""


def draw_plot(plot: Plot, steps: Sequence[int], alarms: Sequence[int] = ()) -> str:
    """The `<section>` of one plot; empty where no value is known. `alarms` are steps that are marked by a dashed line."""
    edges = _edges(len(steps))
    drawn = {name: _means(values, edges) for name, values in plot.lines.items()}
    shown = {name: means for name, means in drawn.items() if any(mean is not None for mean in means)}
    left_out = max(0, len(shown) - MOST_LINES)
    shown = dict(list(shown.items())[:MOST_LINES])
    known = [mean for means in shown.values() for mean in means if mean is not None]
    if not known:
        return ""
    low = min(known) if plot.low is None else plot.low
    high = max(known) if plot.high is None else plot.high
    ends = [steps[a] for a, _ in pairwise(edges)]
    marks = "".join(f'<path class="alarm" d="M{_place(step, ends):.3f} 0V100"/>' for step in alarms)
    # The first line is drawn last, over the others.
    lines = "".join(
        f'<path class="line-{number}" d="{_path(means, low, high)}"/>'
        for number, means in reversed(list(enumerate(shown.values())))
    )
    keys = "".join(_key(number, name, means, plot.form) for number, (name, means) in enumerate(shown.items()))
    more = f'<li class="soft">and {left_out} more</li>' if left_out else ""
    note = f'<p class="soft">{show(plot.note)}</p>' if plot.note else ""
    return (
        f'<section class="card plot"><h3>{show(plot.title)}</h3>{note}<ul class="keys">{keys}{more}</ul>'
        f'<div class="field"><span class="top" aria-hidden="true">{plot.form.format(high)}</span>'
        f'<span class="bottom" aria-hidden="true">{plot.form.format(low)}</span>'
        f'<svg role="img" aria-label="{show(plot.title)} over the steps; the table below has the same figures." '
        f'viewBox="0 -4 {max(1, len(ends) - 1)} 108" preserveAspectRatio="none">{marks}{lines}</svg></div>'
        f'<div class="axis" aria-hidden="true"><span>step {steps[0]:,}</span><span>{steps[-1]:,}</span></div>'
        f"<details><summary>As a table</summary>{_table(shown, ends, plot.form)}</details></section>"
    )


def _edges(steps: int) -> list[int]:
    """Where the stretches of steps that one point stands for begin, and the end."""
    points = min(POINTS, steps)
    return [round(point * steps / points) for point in range(points + 1)]


def _means(values: Sequence[float | None], edges: Sequence[int]) -> list[float | None]:
    means: list[float | None] = []
    for a, b in pairwise(edges):
        known = [value for value in values[a:b] if value is not None and math.isfinite(value)]
        means.append(sum(known) / len(known) if known else None)
    return means


def _place(step: int, ends: Sequence[int]) -> float:
    """Of a step on the axis: the point whose stretch it lies in."""
    return max(0, sum(first <= step for first in ends) - 1)


def _path(means: Sequence[float | None], low: float, high: float) -> str:
    """Through all points that are known, broken where one is not; a lone one becomes a dot."""
    span, pen, parts = high - low or 1.0, "M", []
    middle = 50.0 if high == low else None
    for x, mean in enumerate(means):
        if mean is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x} {100 - 100 * (mean - low) / span if middle is None else middle:.1f}")
        if pen == "M":
            parts.append("h0")  # of no length, with round ends
        pen = "L"
    return "".join(parts)


def _key(number: int, name: str, means: Sequence[float | None], form: str) -> str:
    """What a line is, and from what to what it went; the line's own stroke beside it, so that colour is not all."""
    known = [mean for mean in means if mean is not None]
    return (
        f'<li><svg class="key" viewBox="0 0 20 8" aria-hidden="true"><path class="line-{number}" d="M1 4H19"/></svg>'
        f'<span class="name">{show(shorten(name, NAME_CHARACTERS))}</span> '
        f"<b>{form.format(known[0])} → {form.format(known[-1])}</b></li>"
    )


def _table(lines: Mapping[str, Sequence[float | None]], ends: Sequence[int], form: str) -> str:
    chosen = sorted({round(n * (len(ends) - 1) / max(1, TABLE_ROWS - 1)) for n in range(TABLE_ROWS)})
    head = "".join(f'<th scope="col">{show(shorten(name, NAME_CHARACTERS))}</th>' for name in lines)
    rows = "".join(
        f'<tr><th scope="row">{ends[point]:,}</th>'
        + "".join(f"<td>{'' if (v := means[point]) is None else form.format(v)}</td>" for means in lines.values())
        + "</tr>"
        for point in chosen
    )
    return (
        f'<div class="wide"><table class="figures"><thead><tr><th scope="col">step</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
