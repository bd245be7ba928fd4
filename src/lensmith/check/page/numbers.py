"""The figures of a report as HTML: tokens as a drawing with its table, then images, answers and packs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lensmith.evals.markup import shorten, show
from lensmith.types import counted

if TYPE_CHECKING:
    from lensmith.check.report import AnswerReport, CheckReport, Histogram, ImageReport, PackReport, Spread, TokenReport

SHOWN_ANSWER = 80
SHOWN_KINDS = 6
"""File formats and scripts named; the rest is left to `--json`."""
LEAST_HEIGHT = 1.5
"""Of 100: a bar of one row among a million is still seen."""


def write_numbers(report: CheckReport, anchors: Mapping[tuple[str, int], str]) -> str:
    """All figures; `anchors`: (side, row) -> its name in the page, for rows that are shown."""
    return "".join(
        [
            _tokens(report.tokens),
            '<div class="cards">',
            _images(report.images),
            _largest(report.tokens, anchors),
            _answers(report.answers),
            _packs(report.packs),
            "</div>",
        ]
    )


def _tokens(tokens: TokenReport) -> str:
    if tokens.per_row is None:
        return ""
    share = (
        f"{tokens.image / tokens.total:.0%} of all tokens are images, {tokens.learned / tokens.total:.1%} are learned."
    )
    return (
        f'<section class="card figure"><h3>Tokens per row</h3><p class="soft">{share}</p>{_histogram(tokens)}'
        + _spread_table(
            ("Per row", "smallest", "median", "95\u00a0%", "largest"),
            {"tokens": tokens.per_row, "of them image": tokens.image_per_row, "learned": tokens.learned_per_row},
        )
        + "</section>"
    )


def _histogram(tokens: TokenReport) -> str:
    histogram, most = tokens.histogram, max(tokens.histogram.rows, default=0)
    if not most:
        return ""
    bars = "".join(_bar(histogram, number, most) for number in range(len(histogram.rows)))
    low, high = histogram.edges[0], histogram.edges[-1]
    budget = ""
    if low < tokens.budget < high:
        budget = f'<path class="budget" d="M{len(histogram.rows) * (tokens.budget - low) / (high - low):.3f} 0V100"/>'
    where = "dashed line" if budget else "beyond the right end" if tokens.budget >= high else "left of all rows"
    return (
        f'<figure class="plot"><figcaption><span class="key image"></span>image <span class="key text"></span>text '
        f'<span class="soft">· tallest bar {counted(most, "row")} · budget {tokens.budget:,} tokens ({where})</span>'
        "</figcaption>"
        f'<svg role="img" aria-label="Rows by tokens; the table below has the same figures." '
        f'viewBox="0 0 {len(histogram.rows)} 100" preserveAspectRatio="none">{bars}{budget}</svg>'
        f'<div class="axis" aria-hidden="true"><span>{low:,}</span><span>{(low + high) // 2:,}</span>'
        f"<span>{high:,} tokens</span></div>"
        f"<details><summary>As a table</summary>{_histogram_table(histogram)}</details></figure>"
    )


def _bar(histogram: Histogram, number: int, most: int) -> str:
    rows = histogram.rows[number]
    if not rows:
        return ""
    image, text = histogram.image_tokens[number], histogram.text_tokens[number]
    height = max(100 * rows / most, LEAST_HEIGHT)
    image_height = height * image / max(image + text, 1)
    left, top = number + 0.05, 100 - height
    words = (
        f"{histogram.edges[number]:,} to {histogram.edges[number + 1]:,} tokens: {counted(rows, 'row')}, "
        f"{image / max(image + text, 1):.0%} image"
    )
    return (
        f'<g><title>{words}</title><rect class="image" x="{left:.2f}" y="{top:.2f}" width=".9" height="{image_height:.2f}"/>'
        f'<rect class="text" x="{left:.2f}" y="{top + image_height:.2f}" width=".9" height="{height - image_height:.2f}"/></g>'
    )


def _histogram_table(histogram: Histogram) -> str:
    rows = (
        (f"{low:,} to {high:,}", f"{count:,}", f"{image:,}", f"{text:,}")
        for low, high, count, image, text in zip(
            histogram.edges,
            histogram.edges[1:],
            histogram.rows,
            histogram.image_tokens,
            histogram.text_tokens,
            strict=False,
        )
        if count
    )
    return _table(("Tokens", "rows", "image tokens", "text tokens"), rows)


def _largest(tokens: TokenReport, anchors: Mapping[tuple[str, int], str]) -> str:
    if not tokens.largest:
        return ""
    items = "".join(
        f"<li>{_link(show(row.where), anchors.get((row.side, row.row)))} "
        f'<span class="soft">{row.tokens:,} tokens, {row.image_tokens:,} image</span></li>'
        for row in tokens.largest
    )
    return f'<section class="card figure"><h3>Largest rows</h3><ol class="plain">{items}</ol></section>'


def _link(html: str, anchor: str | None) -> str:
    return f'<a href="#{anchor}"><code>{html}</code></a>' if anchor else f"<code>{html}</code>"


def _images(images: ImageReport) -> str:
    if not images.uses:
        return ""
    spreads = {
        "width on disk, px": images.original_width_px,
        "width seen, px": images.seen_width_px,
        "height on disk, px": images.original_height_px,
        "height seen, px": images.seen_height_px,
    }
    facts = {
        "Different pictures": f"{images.pictures:,} in {counted(images.uses, 'use')}",
        "Reduced": f"{images.reduced:,}",
        "Enlarged": f"{images.enlarged:,}",
        "Formats": _shares(images.formats, "{:,}"),
    }
    if images.scale is not None:
        facts["Side seen / on disk"] = f"{images.scale.median:.0%} in the median, {images.scale.min:.0%} at the least"
    table = _spread_table(("Images", "smallest", "median", "95\u00a0%", "largest"), spreads)
    return f'<section class="card figure"><h3>Images: on disk → seen</h3>{table}{_facts(facts)}</section>'


def _answers(answers: AnswerReport) -> str:
    if answers.characters is None:
        return ""
    facts = {"Different answers": f"{answers.different:,}"}
    if answers.most_common is not None:
        text, rows = answers.most_common
        facts["Said most often"] = f"“{shorten(text, SHOWN_ANSWER)}” in {counted(rows, 'row')}"
    if answers.scripts:
        facts["Scripts of all texts"] = _shares(answers.scripts, "{:.0%}")
    table = _spread_table(("Answers", "smallest", "median", "95\u00a0%", "largest"), {"characters": answers.characters})
    return f'<section class="card figure"><h3>Answers</h3>{table}{_facts(facts)}</section>'


def _packs(packs: PackReport) -> str:
    if not packs.packs:
        return ""
    facts = {
        "Samples in an epoch": f"{packs.samples:,}",
        "Packs in an epoch": f"{packs.packs:,}, {packs.fill:.1%} full",
        "Saved by shared images": f"{packs.shared_tokens:,} tokens",
        "Optimizer steps of the run": f"{packs.steps:,}",
    }
    if packs.hours is not None:
        facts["Expected time"] = f"{packs.hours:.1f} h"
    return f'<section class="card figure"><h3>Packing</h3>{_facts(facts)}</section>'


def _shares(shares: Mapping[str, float], form: str) -> str:
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    more = f" and {len(ordered) - SHOWN_KINDS} more" if len(ordered) > SHOWN_KINDS else ""
    return ", ".join(f"{name} {form.format(share)}" for name, share in ordered[:SHOWN_KINDS]) + more


def _facts(facts: Mapping[str, str]) -> str:
    return (
        '<dl class="lines">'
        + "".join(f"<div><dt>{show(name)}</dt><dd>{show(value)}</dd></div>" for name, value in facts.items())
        + "</dl>"
    )


def _spread_table(head: Sequence[str], spreads: Mapping[str, Spread | None]) -> str:
    rows = (
        (name, *(f"{value:,.0f}" for value in (spread.min, spread.median, spread.p95, spread.max)))
        for name, spread in spreads.items()
        if spread is not None
    )
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col">{show(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{show(name)}</th>{"".join(f"<td>{show(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f'<table class="figures"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
