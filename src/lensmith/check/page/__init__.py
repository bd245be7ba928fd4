"""report.html: the outcome of a check and, row by row, what the model will see; one file, no scripts, nothing fetched.

The layout is page.html beside this file. Under 20 MB whatever the data: a set number of rows, of each a set number of
pictures and characters, and of each picture a set number of bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lensmith.check.findings import CODES
from lensmith.check.page.choice import Choice, Group, choose_rows
from lensmith.check.page.numbers import write_numbers
from lensmith.check.page.row import MARKS, PICTURES_PER_ROW, SENTENCE_CHARACTERS, write_row
from lensmith.errors import ConfigError
from lensmith.evals.markup import fill_template, list_facts, shorten, show
from lensmith.types import counted

if TYPE_CHECKING:
    from lensmith.check.report import CheckReport, Finding, Side
    from lensmith.data.source import SampleSource

PICTURES_BYTES = 9_000_000
"""Of all pictures together, before base64 makes them a third larger."""
PICTURE_BYTES = 400_000
"""Most of one picture."""
SHOWN_PLACES = 5
"""Rows of a finding that are named on the page; `--json` has them all."""
SHOWN_FILES = 20
UNITS = ((10**9, " G"), (10**6, " M"), (10**3, " k"))
"""For figures at a glance, from two digits on."""
GENERATOR, GENERATOR_WITHIN = b'content="lensmith check"', 1000
"""How a page of ours is known, and in how many of its first bytes."""
HEADINGS: dict[Group, tuple[str, str]] = {
    "drawn": ("Drawn at random", "By the seed alone: what training reads most of the time."),
    "edges": ("At the edges", "The largest, the smallest, the most reduced and the longest answer."),
    "found": ("With findings", "The first rows of each finding."),
}


def write_page(
    report: CheckReport,
    sources: Mapping[Side, SampleSource],
    path: Path,
    *,
    seed: int,
    rows: int = 24,
    blind: str | None = None,
) -> None:
    """Write the page to `path`.

    Args:
        sources: what was checked, by side, with the caps that data.on_long=shrink gives.
        seed: draws the rows that are shown.
        rows: how many are shown.
        blind: the sentence of a blind test.
    """
    choices = choose_rows(report, sources, seed=seed, rows=rows)
    names = ", ".join(dict.fromkeys(file.name for file in report.files[:SHOWN_FILES]))
    anchors = {(choice.side, choice.row): choice.anchor for choice in choices}
    sign, word = ("✓", "ready") if report.is_clean else ("✗", "stopped")
    blanks = {
        "title": show(f"Check of {shorten(names, 120)}"),
        "names": show(shorten(names, 400)),
        "sign": sign,
        "word": word,
        "headline": "Ready to train" if report.is_clean else "Not ready to train",
        "verdict": show(report.verdict),
        "blind": f"<p>{show(blind)}</p>" if blind else "",
        "facts": list_facts(_facts(report)),
        "findings": _findings(report, anchors),
        "numbers": write_numbers(report, anchors),
        "rows": _rows(choices, sources),
        "notes": _notes(report),
        "footer": show(_footer(report, len(choices), seed)),
    }
    path.write_text(fill_template("lensmith.check.page", "page.html", blanks), encoding="utf-8")


def refuse_foreign_page(path: Path) -> None:
    """Raise ConfigError where another file than an earlier page would be written over."""
    if not path.exists():
        return
    with contextlib.suppress(OSError), path.open("rb") as file:
        if GENERATOR in file.read(GENERATOR_WITHIN):
            return
    raise ConfigError(
        f"{path}: is there already and is no page of `lensmith check`. Choose another file with --html, or none with --no-html."
    )


def _facts(report: CheckReport) -> dict[str, str]:
    return {
        "rows": f"{report.rows:,}",
        "ok": f"{report.ok:,}",
        "refused": f"{report.refused:,}",
        "pictures": f"{report.images.pictures:,}",
        "tokens": _rounded(report.tokens.total),
        "learned tokens": _rounded(report.tokens.learned),
    }


def _rounded(number: int) -> str:
    size, unit = next(((size, unit) for size, unit in UNITS if number >= 10 * size), (1, ""))
    return f"{number / size:,.0f}{unit}"


def _findings(report: CheckReport, anchors: Mapping[tuple[str, int], str]) -> str:
    if not report.findings:
        return '<p class="card none"><span class="right" aria-hidden="true">✓</span> Nothing found.</p>'
    rows = "\n".join(_finding(finding, anchors) for finding in report.findings)
    return (
        '<table class="card findings"><thead><tr><th scope="col">Finding</th><th scope="col">Count</th>'
        f'<th scope="col">What and where</th><th scope="col">What to do</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _finding(finding: Finding, anchors: Mapping[tuple[str, int], str]) -> str:
    return (
        f'<tr class="{finding.severity}"><th scope="row"><span class="mark" aria-hidden="true">{MARKS[finding.severity]}'
        f"</span> <code>{finding.code}</code><br><small>{finding.severity}</small></th>"
        f'<td class="count">{finding.count:,}</td>'
        f"<td><p>{show(CODES[finding.code].meaning)}</p>{_places(finding, anchors)}</td>"
        f"<td><p>{show(finding.fix)}</p></td></tr>"
    )


def _places(finding: Finding, anchors: Mapping[tuple[str, int], str]) -> str:
    """The first row with its sentence, then where the next ones are."""
    shown = {example.where: anchors.get((example.side, example.row)) for example in finding.examples}
    places = [_place(where, shown.get(where)) for where in finding.where[:SHOWN_PLACES]]
    if not places:
        return ""
    told = f": {show(shorten(finding.examples[0].sentence, SENTENCE_CHARACTERS))}" if finding.examples else ""
    more = max(finding.count, len(finding.where)) - len(places)
    rest = ", ".join(places[1:]) + (f" and {more:,} more" if more > 0 else "")
    return f"<p>{places[0]}{told}</p>" + (f'<p class="places">Also {rest}</p>' if rest else "")


def _place(where: str, anchor: str | None) -> str:
    code = f"<code>{show(shorten(where, SENTENCE_CHARACTERS))}</code>"
    return f'<a href="#{anchor}">{code}</a>' if anchor else code


def _rows(choices: Sequence[Choice], sources: Mapping[Side, SampleSource]) -> str:
    picture_bytes = min(PICTURE_BYTES, PICTURES_BYTES // max(1, len(choices) * PICTURES_PER_ROW))
    parts = []
    for group, (heading, note) in HEADINGS.items():
        members = [choice for choice in choices if choice.group == group]
        if members:
            parts.append(f'<h3>{heading}</h3><p class="soft">{note}</p>')
        parts += [write_row(choice, sources[choice.side], picture_bytes=picture_bytes) for choice in members]
    return "\n".join(parts)


def _notes(report: CheckReport) -> str:
    files = [
        f"{file.name} ({file.side}): {counted(file.rows, 'row')}, {file.refused:,} refused. {file.layout} {file.boxes or ''}"
        for file in report.files[:SHOWN_FILES]
    ]
    told = "".join(f"<li>{show(shorten(note, SENTENCE_CHARACTERS))}</li>" for note in (*files, *report.sentences))
    return f'<ul class="notes">{told}</ul>'


def _footer(report: CheckReport, shown: int, seed: int) -> str:
    looked = "every picture decoded" if report.decoded else "headers and ends of pictures only"
    return f"lensmith check: {report.took_s:.1f} s, {looked}. {counted(shown, 'row')} shown, drawn with seed {seed}."
