"""One row as HTML: its pictures as seen with boxes over them, the prompt as fed, what is learned, and what was found.

Boxes are looked for in the decoded ids, not in the row: a conversion that went wrong is seen to have gone wrong.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.check.page.choice import Reason
from lensmith.check.page.picture import UNITS, Box, list_boxes, write_picture
from lensmith.check.seen import Piece, draw_seen, read_back
from lensmith.data.box_text import find_boxes, read_image_index
from lensmith.data.boxes import count_videos_once
from lensmith.errors import RowError
from lensmith.evals.markup import shorten, show
from lensmith.types import Moment, counted

if TYPE_CHECKING:
    from lensmith.check.findings import Severity
    from lensmith.check.page.choice import Choice
    from lensmith.config.tree import Boxes
    from lensmith.data.source import Samples, SampleSource
    from lensmith.types import Encoded, ImageSize, Sample

PICTURES_PER_ROW = 4
RUN_TOKENS = 500
"""Tokens shown of one run of text; the rest is counted."""
ROW_CHARACTERS = 12_000
"""Characters shown of all texts of a row; what comes after is counted."""
RAW_CHARACTERS = 2_000
"""Characters shown of a row that cannot be used, as it is on disk."""
SENTENCE_CHARACTERS = 600
SAME_SCALE = 0.05
"""Rounding to whole tokens changes sides by a few per cent; only what goes beyond is told."""
MARKS: dict[Severity | None, str] = {"error": "✗", "warning": "!", "note": "i", None: "·"}
"""Findings are told apart by a mark and a word, never by colour alone."""


def write_row(choice: Choice, source: SampleSource, *, picture_bytes: int) -> str:
    """The `<article>` of one row, also of one that cannot be used; each picture takes at most `picture_bytes`."""
    reasons = choice.reasons
    try:
        sample = source.sample(choice.row)
        encoded = source.encode(sample, max_tokens=source.caps.get(choice.row))
    except RowError as fault:
        where, cost, body = fault.where, "cannot be used; as it is on disk:", _on_disk(source.samples, choice.row)
        if not any(reason.code for reason in reasons):
            reasons = (*reasons, Reason(fault.sentence, fault.code, "error"))
    else:
        where, cost, body = encoded.where, _cost(encoded), _as_seen(sample, encoded, source, picture_bytes)
    listed = "".join(map(_list_reason, reasons))
    return (
        f'<article class="card row" id="{choice.anchor}">'
        f"<h4><code>{show(where)}</code> <small>{choice.side} · {cost}</small></h4>"
        + (f'<ul class="reasons">{listed}</ul>' if listed else "")
        + f"{body}</article>"
    )


def _list_reason(reason: Reason) -> str:
    name = f"<b>{reason.code}</b> " if reason.code else ""
    word = f'<span class="hidden">{reason.severity}: </span>' if reason.severity else ""
    return (
        f'<li class="{reason.severity or "chosen"}"><span aria-hidden="true">{MARKS[reason.severity]}</span> '
        f"{word}{name}{show(shorten(reason.text, SENTENCE_CHARACTERS))}</li>"
    )


def _cost(encoded: Encoded) -> str:
    image_tokens = sum(image.tokens for image in encoded.images)
    images = f" = {image_tokens:,} image + {encoded.num_tokens - image_tokens:,} text" if image_tokens else ""
    return f"{counted(encoded.num_tokens, 'token')}{images} · {encoded.num_learned:,} learned"


def _as_seen(sample: Sample, encoded: Encoded, source: SampleSource, picture_bytes: int) -> str:
    pieces = list(read_back(encoded, source.encoder.tokenizer, most_tokens=RUN_TOKENS))
    prompt = f'<pre class="prompt" dir="auto">{"".join(_spans(pieces))}</pre>'
    if not encoded.images:
        return prompt
    boxes = list(_boxes(pieces, sample.boxes, encoded.images))
    shown = np.unique(np.linspace(0, len(encoded.images) - 1, PICTURES_PER_ROW).round().astype(int)).tolist()
    figures = []
    for number in shown:
        size = encoded.images[number]
        over = [box for owner, box in boxes if owner is size]
        figures.append(_figure(f"Picture {number + 1} of {encoded.where}", size, over, source, picture_bytes))
    more = len(encoded.images) - len(shown)
    rest = f'<p class="soft">and {counted(more, "more picture")}</p>' if more else ""
    several = " several" if len(shown) > 1 else ""
    return f'<div class="sight"><div class="pictures{several}">{"".join(figures)}{rest}</div>{prompt}</div>'


def _figure(name: str, size: ImageSize, boxes: Sequence[Box], source: SampleSource, picture_bytes: int) -> str:
    try:
        drawn = draw_seen(size, source.encoder.geometry)
    except RowError as fault:
        return (
            f'<figure><p class="broken">{fault.code}: {show(shorten(fault.sentence, SENTENCE_CHARACTERS))}</p></figure>'
        )
    picture = write_picture(drawn, boxes, alt=f"{name} as the model sees it", most_bytes=picture_bytes)
    return f"<figure>{picture}<figcaption>{_caption(size)}{list_boxes(boxes)}</figcaption></figure>"


def _caption(size: ImageSize) -> str:
    (height, width), (seen_height, seen_width) = size.original_px, size.seen_px
    moment = f"at {size.ref.time_s:.1f} s: " if isinstance(size.ref, Moment) else ""
    scale = f", {size.scale:.0%} of the side" if abs(size.scale - 1) > SAME_SCALE else ""
    return (
        f"{moment}{width:,} × {height:,} → <b>{seen_width:,} × {seen_height:,} px</b>{scale}: "
        f"{counted(size.tokens, 'token')}"
    )


def _boxes(
    pieces: Sequence[Piece], declared: Boxes | None, sizes: Sequence[ImageSize]
) -> Iterator[tuple[ImageSize, Box]]:
    """Boxes and points in what was decoded, each with the picture that it lies in."""
    pictures = count_videos_once(sizes)
    for learned, group in itertools.groupby(pieces, key=lambda piece: piece.learned):
        text = "".join(piece.text or "" for piece in group if not piece.special)
        for span in find_boxes(text, bare=learned and declared is not None):
            index = 0 if len(pictures) == 1 else read_image_index(text, span)
            if index is not None and index < len(pictures):
                size = pictures[index]
                yield size, Box(span.kind, _in_thousandths(span.numbers, declared, size), learned)


def _in_thousandths(numbers: tuple[float, ...], declared: Boxes | None, size: ImageSize) -> tuple[float, ...]:
    """Numbers as the model speaks them, as thousandths of the picture; undeclared ones are taken to be that."""
    if declared is None or declared.target == "xyxy_1000":
        return numbers
    height, width = size.seen_px
    return tuple(UNITS * number / side for number, side in zip(numbers, itertools.cycle((width, height)), strict=False))


def _spans(pieces: Sequence[Piece]) -> Iterator[str]:
    """The prompt: special tokens quiet, learned tokens marked one by one, the end counted where it is too long."""
    room, shown = ROW_CHARACTERS, 0
    for learned, group in itertools.groupby(pieces, key=lambda piece: piece.learned):
        spans = []
        for piece in group:
            if room <= 0:
                break
            spans.append(_span(piece))
            room -= len(piece.text or "")
            shown += 1
        text = "".join(spans)
        yield f'<mark><span class="hidden">learned: </span>{text}</mark>' if learned and text else text
    if left := pieces[shown:]:
        tokens, learned_tokens = sum(p.tokens for p in left), sum(p.tokens for p in left if p.learned)
        yield f'<span class="cut"> … {tokens:,} more tokens, {learned_tokens:,} of them learned</span>'


def _span(piece: Piece) -> str:
    if piece.text is None:
        return f'<span class="cut"> … {counted(piece.tokens, "more token")} … </span>'
    if piece.special:
        times = f" × {piece.tokens:,}" if piece.tokens > 1 else ""
        return f'<span class="special">{show(piece.text)}{times}</span>'
    return f"<i>{show(piece.text).replace(chr(10), LINE_END)}</i>" if piece.learned else show(piece.text)


LINE_END = '<span class="special" aria-hidden="true">↵</span>\n'
"""A learned line end is a token like any other, and must not look like an accident of the page."""


def _on_disk(samples: Samples, row: int) -> str:
    """The fields of a row that cannot be used, or nothing where not even they can be read."""
    for (span, _), file in zip(samples.spans, samples.files, strict=True):
        if row in span:
            try:
                fields = file.rows[row - span.start].fields
            except RowError:
                return ""
            text = "\n".join(f"{name}: {_value(value)}" for name, value in fields.items())
            return f'<pre class="prompt" dir="auto">{show(shorten(text, RAW_CHARACTERS))}</pre>'
    return ""


def _value(value: Any) -> str:
    if isinstance(value, str):
        return shorten(value, RAW_CHARACTERS)
    return json.dumps(value, ensure_ascii=False, default=_name)


def _name(value: Any) -> str:
    return f"({len(value):,} bytes)" if isinstance(value, bytes) else f"({type(value).__name__})"
