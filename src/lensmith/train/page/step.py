"""One step on the page: per prompt its pictures, the question, and what was answered, the best first.

Completions are whatever a model says: long, endless words, markup, text that turns the direction of what follows. All of
it goes through `show`, is isolated in its own direction and may break anywhere; what is long is folded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lensmith.evals.markup import shorten, show
from lensmith.types import ImageSize, counted

STEP_BYTES = 1_500_000
"""Most of one step on the page."""
CHARACTERS = (24_000, 6_000, 1_500, 300)
"""Most shown of one text; the next smaller one is taken where a step would be too large."""
FOLDED_CHARACTERS, FOLDED_LINES = 700, 14
"""Longer completions are folded up."""
PREVIEW_CHARACTERS = (170, 90)
"""Of the beginning and of the end, where an answer stands after a long thought."""
MOST_PROMPTS, MOST_COMPLETIONS, MOST_PICTURES = 8, 16, 4
"""Shown of a step, of a prompt, and of a prompt's pictures; completions.jsonl has all."""
NAME_CHARACTERS = 40

Thumbnail = Callable[[ImageSize], tuple[str | None, str]]


@dataclass(frozen=True, slots=True)
class Judged:
    """One completion and what was thought of it."""

    text: str
    tokens: int
    stopped: bool
    """Whether it ended itself."""
    rewards: Mapping[str, float | None]
    """None where a reward said nothing."""
    total: float | None
    advantage: float


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt with all of its completions."""

    where: str
    question: str
    reference: str
    images: Sequence[ImageSize]
    completions: Sequence[Judged]


def write_step(step: int, prompts: Sequence[Asked], thumbnail: Thumbnail) -> str:
    """The `<section>` of one step, at most STEP_BYTES of UTF-8 whatever the texts hold."""
    sections = (_section(step, prompts, thumbnail, characters) for characters in CHARACTERS)
    for section in sections:
        if len(section.encode()) <= STEP_BYTES:
            return section
    return f'<p class="soft" id="step-{step}">Step {step:,} is too large for this page; completions.jsonl has it.</p>'


def _section(step: int, prompts: Sequence[Asked], thumbnail: Thumbnail, characters: int) -> str:
    shown = prompts[:MOST_PROMPTS]
    most = max((abs(one.advantage) for asked in prompts for one in asked.completions), default=0.0) or 1.0
    cards = "\n".join(_card(asked, thumbnail, characters, most) for asked in shown)
    left = len(prompts) - len(shown)
    rest = f'<p class="soft">And {counted(left, "more prompt")} in completions.jsonl.</p>' if left else ""
    return f'<section class="step" id="step-{step}"><h2>Step {step:,}</h2>\n{cards}{rest}</section>'


def _card(asked: Asked, thumbnail: Thumbnail, characters: int, most: float) -> str:
    ordered = sorted(asked.completions, key=lambda one: -math.inf if one.total is None else one.total, reverse=True)
    shown = _ends(ordered, MOST_COMPLETIONS)
    left = len(ordered) - len(shown)
    rest = f'<p class="soft">The best and the worst; {left:,} between them in completions.jsonl.</p>' if left else ""
    totals = {one.total for one in ordered}
    flat = '<p class="soft">All the same reward: it teaches nothing.</p>' if len(totals) == 1 < len(ordered) else ""
    items = "\n".join(_completion(one, characters, most) for one in shown)
    reference = f"<dt>reference</dt><dd>{_text(asked.reference, characters)}</dd>" if asked.reference else ""
    return (
        f'<article class="card asked">{_pictures(asked.images, thumbnail)}<div class="said">'
        f"<h3><code>{show(shorten(asked.where, 300))}</code></h3>"
        f"<dl><dt>question</dt><dd>{_text(asked.question, characters)}</dd>{reference}</dl>{flat}{rest}"
        f'<ol class="completions">\n{items}\n</ol></div></article>'
    )


def _ends(ordered: Sequence[Judged], most: int) -> Sequence[Judged]:
    if len(ordered) <= most:
        return ordered
    return [*ordered[: most - most // 2], *ordered[len(ordered) - most // 2 :]]


def _pictures(images: Sequence[ImageSize], thumbnail: Thumbnail) -> str:
    if not images:
        return ""
    count = min(MOST_PICTURES, len(images))
    chosen = [images[round(n * (len(images) - 1) / max(1, count - 1))] for n in range(count)]
    several = " several" if count > 1 else ""
    more = f'<p class="soft">and {len(images) - count:,} more</p>' if len(images) > count else ""
    return f'<div class="pictures{several}">{"".join(_picture(size, thumbnail) for size in chosen)}{more}</div>'


def _picture(size: ImageSize, thumbnail: Thumbnail) -> str:
    address, fault = thumbnail(size)
    if address is None:
        return f'<p class="broken">{show(shorten(fault, 200))}</p>'
    height, width = size.seen_px
    return f'<figure><img src="{address}" alt=""><figcaption>{width:,} × {height:,} px</figcaption></figure>'


def _completion(one: Judged, characters: int, most: float) -> str:
    total = "none" if one.total is None else _number(one.total)
    rewards = "".join(
        f'<li><span class="name">{show(shorten(name, NAME_CHARACTERS))}</span> <b>{_or_none(value)}</b></li>'
        for name, value in one.rewards.items()
    )
    cut = "" if one.stopped else ' <span class="cut">cut off</span>'
    return (
        f'<li><div class="judged"><p class="total"><span class="soft">reward</span> <b>{total}</b></p>'
        f"{_advantage(one.advantage, most)}"
        f'<p class="length">{counted(one.tokens, "token")}{cut}</p>'
        f'<ul class="rewards">{rewards}</ul></div>{_folded(one, characters)}</li>'
    )


def _advantage(advantage: float, most: float) -> str:
    """A bar from the middle: to the right what is made likelier, to the left what is made less likely."""
    share = 50 * min(abs(advantage) / most, 1.0) if math.isfinite(advantage) else 0.0
    side = "up" if advantage > 0 else "down" if advantage < 0 else "level"
    return (
        f'<p class="advantage"><span class="soft">advantage</span> <b class="{side}">{advantage:+.2f}</b>'
        f'<span class="scale" aria-hidden="true"><i class="{side}" style="--share:{share:.1f}"></i></span></p>'
    )


def _folded(one: Judged, characters: int) -> str:
    if not one.text.strip():
        return '<p class="text soft">(nothing)</p>'
    text = _text(one.text, characters)
    if len(one.text) <= FOLDED_CHARACTERS and one.text.count("\n") < FOLDED_LINES:
        return f'<div class="text">{text}</div>'
    first, last = PREVIEW_CHARACTERS
    # Line ends become blanks; endless runs of them must not leave an empty preview.
    begins, ends = " ".join(one.text.split())[:first], " ".join(one.text[-4 * last :].split())[-last:]
    return (
        f'<details class="text"><summary><bdi>{show(begins)}</bdi> … <bdi>{show(ends)}</bdi> '
        f'<span class="more">all of it</span></summary>'
        f"{text}</details>"
    )


def _text(text: str, characters: int) -> str:
    """Text in its own direction, with its line ends; the rest of what is too long is counted."""
    left = len(text) - characters
    rest = f'<span class="soft"> … {left:,} more characters in completions.jsonl</span>' if left > 0 else ""
    return f'<p class="words" dir="auto">{show(text[:characters])}{rest}</p>'


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= 0.01 or not value else f"{value:.1e}"


def _or_none(value: float | None) -> str:
    return "none" if value is None else _number(value)
