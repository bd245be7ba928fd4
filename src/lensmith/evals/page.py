"""The page that shows what a run changed: one HTML file with everything inside it, no scripts and nothing fetched.

The layout is page.html beside this file; here are the pieces that go into it, each escaped where it is made. Right and
wrong are told by a mark, a word for screen readers and a struck-through answer, never by colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.errors import RowError
from lensmith.evals.markup import data_uri, fill_template, list_facts, shorten, show
from lensmith.evals.score import Comparison, Score
from lensmith.types import ImageRef

THUMBNAIL_PX = 256
"""Longest side of a picture on the page: enough for 88 CSS pixels on a dense screen."""
SHOWN_CHARACTERS = 80
"""Longer answers are cut on the page; the kept predictions have all of them."""
LOSSLESS_BYTES = 20_000
"""A drawing is a small PNG; a photograph is a smaller JPEG."""
JPEG_QUALITY = 80
SMOOTHING = 0.05
"""Share of all steps that one point of the smooth line is the mean of."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the before/after table."""

    name: str
    before: Score | None
    """None where one model alone was asked."""
    after: Score


@dataclass(frozen=True, slots=True)
class Example:
    """One test question with both answers."""

    picture: Path | ImageRef | None
    question: str
    reference: str
    before: str | None
    """None where one model alone was asked."""
    after: str
    right_before: float
    right_after: float
    """1 right, 0 wrong, between them partly right."""
    note_before: str = ""
    note_after: str = ""
    """Said behind each answer, such as what it earned."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Examples under one heading, with the sentence that says how they were chosen."""

    heading: str
    note: str
    examples: Sequence[Example]


def render_page(
    *,
    title: str,
    summary: str,
    facts: Mapping[str, str],
    table: Sequence[Line],
    comparison: Comparison | None,
    galleries: Sequence[Gallery],
    footer: str,
    curve: Path | None = None,
    curve_text: str = "",
    curve_heading: str = "Loss",
    notes: Sequence[str] = (),
) -> str:
    """The whole page as text.

    Args:
        comparison: None where one model alone was asked, and so no line of the table has a `before`.
        curve: a PNG, and `curve_text` says in words what it shows.
        notes: sentences below the table.
    """
    compared = f"{comparison.sentence} {comparison.difference_sentence} " if comparison else ""
    columns = ("Questions", "Before", "After") if comparison else ("Questions", "Score")
    blanks = {
        "title": show(title),
        "summary": show(summary),
        "facts": list_facts(facts),
        "heading": "Before and after" if comparison else "Score",
        "columns": "".join(f'<th scope="col">{column}</th>' for column in columns),
        "table": "\n".join(_table_row(line) for line in table),
        "table_note": show(f"{compared}The thin line in a bar is the 95\u00a0% interval."),
        "notes": "".join(f'<p class="note">{show(note)}</p>' for note in notes),
        "curve": "" if curve is None else _curve(curve, curve_heading, curve_text),
        "examples": "\n".join(_gallery(gallery) for gallery in galleries if gallery.examples),
        "footer": show(footer),
    }
    return fill_template("lensmith.evals", "page.html", blanks)


def _curve(curve: Path, heading: str, text: str) -> str:
    image = data_uri(curve.read_bytes(), "image/png")
    return f'<h2>{show(heading)}</h2>\n<figure><img src="{image}" alt="{show(text)}"></figure>'


def _table_row(line: Line) -> str:
    scores = ((line.before, "before"), (line.after, "after"))
    cells = "".join(_table_cell(score, when) for score, when in scores if score is not None)
    return f'<tr><th scope="row">{show(line.name)}<br><small>n = {line.after.n:,}</small></th>{cells}</tr>'


def _table_cell(score: Score, when: str) -> str:
    value, low, high = (100 * share for share in (score.value, score.low, score.high))
    return (
        f'<td class="{when}"><span class="value">{value:.1f}\u00a0%</span> <small>{low:.1f} to {high:.1f}</small>'
        f'<div class="bar" style="--value:{value:.2f};--low:{low:.2f};--high:{high:.2f}"><i></i><b></b></div></td>'
    )


def _gallery(gallery: Gallery) -> str:
    items = "\n".join(_example(example) for example in gallery.examples)
    return (
        f'<h2>{show(gallery.heading)}</h2>\n<p class="soft">{show(gallery.note)}</p>\n'
        f'<ol class="examples">\n{items}\n</ol>'
    )


def _example(example: Example) -> str:
    before = (
        "" if example.before is None else _answer("before", example.before, example.right_before, example.note_before)
    )
    after = _answer(
        "answer" if example.before is None else "after", example.after, example.right_after, example.note_after
    )
    return (
        f'<li class="card">{_picture(example.picture)}'
        f"<p>{show(shorten(example.question, SHOWN_CHARACTERS))}</p><dl>"
        f"<dt>right answer</dt><dd>{show(shorten(example.reference, SHOWN_CHARACTERS))}</dd>{before}{after}</dl></li>"
    )


def _answer(when: str, answer: str, right: float, note: str) -> str:
    mark, word = ("✓", "right") if right == 1 else ("✗", "wrong") if right == 0 else ("~", "partly")
    spoken = f"{right:.0%} right" if word == "partly" else word
    said = show(shorten(answer, SHOWN_CHARACTERS)) or "(nothing)"
    told = f" <small>{show(note)}</small>" if note else ""
    return (
        f'<dt>{when}</dt><dd class="{word}"><span aria-hidden="true">{mark}</span><span class="hidden">{spoken}: </span> '
        f'<span class="said">{said}</span>{told}</dd>'
    )


def _picture(picture: Path | ImageRef | None) -> str:
    if picture is None:
        return '<span class="soft">no picture</span>'
    ref = ImageRef(picture, key=str(picture)) if isinstance(picture, Path) else picture
    try:
        return f'<img src="{_thumbnail_uri(ref)}" alt="">'
    except RowError as fault:  # it was there when the question was asked
        return f'<span class="soft">{show(shorten(fault.sentence, SHOWN_CHARACTERS))}</span>'


def _thumbnail_uri(ref: ImageRef) -> str:
    from lensmith.data.images import open_image

    upright = open_image(ref)
    upright.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    lossless, lossy = io.BytesIO(), io.BytesIO()
    upright.save(lossless, "PNG", optimize=True)
    if lossless.tell() <= LOSSLESS_BYTES:
        return data_uri(lossless.getvalue(), "image/png")
    upright.convert("RGB").save(lossy, "JPEG", quality=JPEG_QUALITY)
    return data_uri(lossy.getvalue(), "image/jpeg")


def draw_loss_curve(samples: Sequence[int], losses: Sequence[float], path: Path, *, title: str) -> None:
    """Write the loss over the samples seen as a PNG of 1280 x 640 pixels.

    Args:
        samples: samples of each optimizer step (not summed up).
        losses: nats per learned token, one per step.
    """
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = _curve_axes(title)
    seen = np.cumsum(samples)
    _plot_smoothed(axes, seen, losses)
    axes.set_yscale("log")
    # Both ends may lie within one decade, which must have labels too.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(0, seen[-1])
    axes.set_xlabel("questions seen")
    axes.set_ylabel("loss (nats per learned token)")
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)


def draw_reward_curve(rewards: Sequence[float], path: Path, *, title: str) -> None:
    """Write the mean reward of each optimizer step as a PNG of 1280 x 640 pixels."""
    figure, axes = _curve_axes(title)
    steps = range(1, len(rewards) + 1)
    _plot_smoothed(axes, steps, rewards)
    axes.set_xlim(1, max(2, len(rewards)))
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def _curve_axes(title: str) -> tuple[Any, Any]:
    """A figure and its axes, in the page's style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure without pyplot: no global state, and the user's own backend and style stay as they are.
    figure = Figure(figsize=(6.4, 3.2), dpi=200, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#e4e4df", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _plot_smoothed(axes: Any, x: Any, values: Sequence[float]) -> None:
    axes.plot(x, values, color="#9db8dd", linewidth=0.8, label="each step")
    axes.plot(x, smooth(values), color="#1d5fbf", linewidth=2, label="running mean")


def smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over SMOOTHING of all steps; narrower near both ends, so that it starts and ends on the data."""
    reach = round(SMOOTHING * len(values) / 2)
    means = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        means.append(sum(window) / len(window))
    return means
