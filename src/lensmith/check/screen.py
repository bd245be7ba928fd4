"""A check for a person, in 80 columns: what was found, what rows cost, how large the pictures are. Returns, prints nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lensmith.types import counted

if TYPE_CHECKING:
    from rich.text import Text

    from lensmith.check.findings import Severity
    from lensmith.check.report import CheckReport, Finding, Histogram, Spread

COLUMNS = 80
INDENT = "  "
SHOWN_WHERES = 3
SHOWN_LARGEST = 3
SHOWN_SHARES = 4
BAR_COLUMNS = 40
MOST_BARS = 8
IMAGE_BAR, TEXT_BAR = "█", "░"
STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "dim"}


def check_screen(report: CheckReport) -> Iterator[Text | str]:
    """The whole report, line by line; the last one is the verdict."""
    yield from _heading("found" if report.findings else "found nothing")
    for finding in report.findings:
        yield from _about_finding(finding)
    if report.tokens.per_row:
        yield from _heading("tokens")
        yield from _about_tokens(report)
    if report.images.uses:
        yield from _heading("images")
        yield from _about_images(report)
    if report.answers.characters:
        yield from _heading("answers")
        yield from _about_answers(report)
    if report.packs.samples:
        yield from _heading("training")
        yield from _about_training(report)
    yield from _about_files(report)
    yield ""
    yield from _wrapped(report.verdict, "")


def _heading(text: str) -> Iterator[Text | str]:
    from rich.text import Text

    yield ""
    yield Text(text, style="bold")


def _about_finding(finding: Finding) -> Iterator[Text | str]:
    """Code, rows and places in one line; below it, what is wrong with the first row, or what to do."""
    from rich.text import Text

    label = Text.assemble(INDENT, (f"{finding.severity:<8}", STYLES[finding.severity]), f"{finding.code:<20}")
    label.append(f"{finding.count:>9,}  ")
    yield label.append(_places(finding, COLUMNS - len(label)))
    first = next((example.sentence for example in finding.examples if example.sentence), "")
    told = f"{finding.where[0]}: {first}" if finding.severity == "error" and first else finding.fix
    for line in _wrapped(told, INDENT * 2):
        yield Text(line, style="dim")


def _places(finding: Finding, columns: int) -> str:
    """The first few rows, as many as fit."""
    for shown in range(min(SHOWN_WHERES, len(finding.where)), 0, -1):
        more = len(finding.where) - shown
        text = ", ".join(finding.where[:shown]) + (f" and {more:,} more" if more else "")
        if len(text) <= columns or shown == 1:
            return text
    return ""


def _about_tokens(report: CheckReport) -> Iterator[str]:
    tokens = report.tokens
    share = tokens.image / tokens.total
    yield from _table(
        {
            "per row": f"{_spread(tokens.per_row)}; the budget is {tokens.budget:,}",
            "in all": f"{tokens.total:,} tokens: {share:.0%} images, {1 - share:.0%} text",
            "learned": f"{tokens.learned:,} tokens; per row {_spread(tokens.learned_per_row)}",
            "largest": ", ".join(f"{row.where} ({row.tokens:,})" for row in tokens.largest[:SHOWN_LARGEST]),
        }
    )
    if len(tokens.histogram.rows) > 1:
        yield ""
        yield from _bars(tokens.histogram)


def _bars(histogram: Histogram) -> Iterator[str]:
    """Rows by their tokens, each bar split into the share of images and of text."""
    edges, rows, image, text = _coarser(histogram)
    longest, width = max(rows), len(f"{edges[-1]:,}")
    yield f"{INDENT}{'tokens':>{2 * width + 3}}  rows: {IMAGE_BAR} images {TEXT_BAR} text"
    for number in range(len(rows)):
        columns = -(-rows[number] * BAR_COLUMNS // longest)
        all_tokens = image[number] + text[number]
        images = round(columns * image[number] / all_tokens) if all_tokens else 0
        bar = IMAGE_BAR * images + TEXT_BAR * (columns - images)
        yield f"{INDENT}{edges[number]:>{width},} - {edges[number + 1]:>{width},}  {bar}{' ' if bar else ''}{rows[number]:,}"


def _coarser(histogram: Histogram) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
    """Neighbouring bins put together until there are at most MOST_BARS."""
    step = -(-len(histogram.rows) // MOST_BARS)
    edges = [*histogram.edges[:-1:step], histogram.edges[-1]]

    def summed(values: Sequence[int]) -> list[int]:
        return [sum(values[start : start + step]) for start in range(0, len(values), step)]

    return edges, summed(histogram.rows), summed(histogram.image_tokens), summed(histogram.text_tokens)


def _about_images(report: CheckReport) -> Iterator[str]:
    images = report.images
    formats = ", ".join(f"{count:,} {name}" for name, count in list(images.formats.items())[:SHOWN_SHARES])
    changed = [
        f"{count:,} {verb}" for count, verb in ((images.reduced, "reduced"), (images.enlarged, "enlarged")) if count
    ]
    scale = (
        f"; sides to {images.scale.median:.0%} in the median, {images.scale.min:.0%} at the least"
        if images.scale
        else ""
    )
    yield from _table(
        {
            "shown": f"{images.uses:,}, {images.pictures:,} different: {formats}",
            "on disk": _sides(images.original_width_px, images.original_height_px),
            "seen": _sides(images.seen_width_px, images.seen_height_px),
            "changed": ", ".join(changed) + scale if changed else "none reduced, none enlarged",
        }
    )


def _about_answers(report: CheckReport) -> Iterator[str]:
    answers, told = report.answers, {}
    told["length"] = _spread(answers.characters, "character")
    told["different"] = f"{answers.different:,}"
    if answers.most_common:
        text, count = answers.most_common
        told["most common"] = f"{textwrap.shorten(text, 40, placeholder='…')!r} in {counted(count, 'row')}"
    shares = list(answers.scripts.items())[:SHOWN_SHARES]
    told["scripts"] = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
    yield from _table({name: text for name, text in told.items() if text})


def _about_training(report: CheckReport) -> Iterator[str]:
    packs, told = report.packs, {}
    saved = f"; sharing images saves {packs.shared_tokens:,} tokens" if packs.shared_tokens else ""
    told["an epoch"] = (
        f"{counted(packs.samples, 'sample')} in {counted(packs.packs, 'pack')}, {packs.fill:.0%} full{saved}"
    )
    hours = f", {packs.hours:.1f} hours at the speed of the run so far" if packs.hours is not None else ""
    told["the run"] = f"{counted(packs.steps, 'step')}{hours}"
    yield from _table(told)


def _about_files(report: CheckReport) -> Iterator[Text | str]:
    """What boxes look like, and each file's rows where there are several."""
    told = {file.name: file.boxes for file in report.files if file.boxes}
    if told:
        yield from _heading("boxes")
        for name, sentence in told.items():
            yield from _wrapped(f"{name}: {sentence}", INDENT)
    if len(report.files) > 1:
        yield from _heading("files")
        rows = {
            f.name: f"{counted(f.rows, 'row')} = {f.ok:,} ok + {f.refused:,} refused ({f.side})" for f in report.files
        }
        yield from _table(rows)


def _table(rows: Mapping[str, str]) -> Iterator[str]:
    """Names and values side by side; long values go on below themselves."""
    width = max(len(name) for name in rows) + 2
    for name, value in rows.items():
        yield from textwrap.wrap(
            f"{INDENT}{name:<{width}}{value}", COLUMNS, subsequent_indent=INDENT + " " * width, break_on_hyphens=False
        )


def _wrapped(text: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text, COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _spread(spread: Spread | None, unit: str = "token") -> str:
    if spread is None:
        return "none"
    if spread.min == spread.max:
        return counted(round(spread.min), unit)
    return f"{spread.min:,.0f} to {spread.max:,.0f} {unit}s, {spread.median:,.0f} in the median"


def _sides(width: Spread | None, height: Spread | None) -> str:
    if width is None or height is None:
        return "none"
    median = f"{width.median:,.0f} x {height.median:,.0f} px"
    if width.min == width.max and height.min == height.max:
        return median
    return f"{median} in the median, up to {width.max:,.0f} wide and {height.max:,.0f} high"
