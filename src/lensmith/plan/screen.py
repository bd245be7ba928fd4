"""A plan for a person, in 80 columns: one stacked bar against the card, what is in it, and what to change.

Each part has a letter, in the bar and in the table, so that nothing depends on colour.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lensmith.config.write import write_value
from lensmith.plan.answer import Plan
from lensmith.plan.cards import SPARE_SHARE
from lensmith.plan.fit import Settings
from lensmith.plan.memory import CONTEXT, MemoryPlan
from lensmith.plan.weights import optimizer_name
from lensmith.types import counted

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

BAR_COLUMNS = 72
COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
SHOWN_GIB = 0.005
SHOWN_ROWS = 3
"""Rows of the worst pack that are named; the rest are counted."""
MOMENTS = {
    "tower": "while the image tower looks at the pack's pictures",
    "head": "at the end of the forward pass, when the head is read",
    "backward": "as the backward pass begins",
    "last layers": "as the backward pass ends, when all gradients exist",
    "tower back": "in the tower's backward pass",
    "optimizer": "while the optimizer steps",
    "rollout": "while completions are made",
    "scoring": "while completions are scored",
}


def plan_screen(plan: Plan) -> Iterator[Any]:
    """The whole answer, piece by piece: text and rich tables."""
    yield headline(plan)
    yield stacked_bar(plan.memory, plan.card.gib)
    yield parts_table(plan.memory)
    yield f"The peak is {MOMENTS[plan.memory.moment]}."
    yield from _about_host(plan.memory, "As it is")
    yield from _about_packs(plan)
    yield _about_time(plan)
    if plan.steps:
        yield ""
        yield changes_table(plan)
        yield from _about_host(plan.fitted, "With these changes")
    elif plan.steps is None:
        yield f"No settings make it fit: {plan.way_out}."
    if plan.faster is not None:
        saved, settings = 1 - plan.faster.slower, _written(plan.faster.change.settings, " ")
        yield f"There is room: {settings} takes {plan.faster.peak_gib:.1f} GiB and {saved:.0%} less time."
    yield from plan.notes


def headline(plan: Plan) -> str:
    """Fits or not, in one line with both numbers."""
    method = plan.config.tune.method
    what = f"{plan.facts.name}, {method}, {optimizer_name(plan.facts, plan.config)}"
    verdict = "fits" if plan.fits else "does not fit"
    card = plan.card
    size = "" if card.name.startswith(f"{card.gib:g} GiB") else f" ({card.gib:g} GiB)"
    return (
        f"{what}: {verdict} {card.name}{size}. Needed {plan.memory.peak_gib:.1f} GiB, usable {card.usable_gib:.1f}: all but "
        f"CUDA's own and {SPARE_SHARE:.0%}."
    )


def stacked_bar(memory: MemoryPlan, card_gib: float) -> Text:
    """All parts side by side, each as wide as it is large; `|` is where the card ends."""
    from rich.text import Text

    parts = _shown(memory)
    total = sum(parts.values())
    columns_per_gib = BAR_COLUMNS / max(total, card_gib)
    bar, done, end = Text(), 0.0, round(card_gib * columns_per_gib)
    for number, (letter, gib) in enumerate(zip(_letters(parts), parts.values(), strict=True)):
        start, done = round(done * columns_per_gib), done + gib
        bar.append(letter * (round(done * columns_per_gib) - start), style=f"black on {_colour(number)}")
    if len(bar) <= end:
        return bar.append(" " * (end - len(bar)) + "|")
    return Text.assemble(bar[:end], "|", bar[end:])


def parts_table(memory: MemoryPlan) -> Table:
    """Letter, part, GiB and share of the peak."""
    from rich.table import Column, Table
    from rich.text import Text

    parts = _shown(memory)
    table = Table(
        "", "part", Column("GiB", justify="right"), Column("share", justify="right"), box=None, pad_edge=False
    )
    for number, (letter, (name, gib)) in enumerate(zip(_letters(parts), parts.items(), strict=True)):
        share = "" if name == CONTEXT else f"{gib / memory.peak_gib:.0%}"
        table.add_row(Text(letter, style=f"black on {_colour(number)}"), name, f"{gib:.2f}", share)
    table.add_row("", "reserved by torch", f"{memory.peak_gib:.2f}", "")
    return table


def _shown(memory: MemoryPlan) -> Mapping[str, float]:
    """Parts that are more than 0.00 GiB when rounded."""
    return {name: gib for name, gib in memory.parts.items() if gib >= SHOWN_GIB}


def _letters(parts: Mapping[str, float]) -> Sequence[str]:
    return string.ascii_lowercase[: len(parts)]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _about_packs(plan: Plan) -> Iterator[str]:
    work, worst = plan.work, plan.worst
    images = f", {work.image_tokens:,} of them of {counted(work.images, 'image')}" if work.images else ""
    if worst is None:
        yield f"Planned for packs of {work.tokens:,} tokens{images}."
        return
    named = ", ".join(worst.wheres[:SHOWN_ROWS])
    more = f" and {len(worst.wheres) - SHOWN_ROWS} more" if len(worst.wheres) > SHOWN_ROWS else ""
    yield f"The worst pack has {work.tokens:,} tokens{images}: {named}{more}."
    if worst.largest:
        yield f"Its largest image: {worst.largest}."


def _about_host(memory: MemoryPlan | None, when: str) -> Iterator[str]:
    if memory is not None and memory.host:
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in memory.host.items())
        yield f"{when}, {sum(memory.host.values()):.1f} GiB of host memory are page-locked: {parts}."


def _about_time(plan: Plan) -> str:
    parts = sorted(plan.time.parts.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {seconds / plan.time.step_s:.0%}" for name, seconds in parts[:3])
    run = f" {plan.total_steps:,} steps: {_hours(plan.run_h)}." if plan.run_h is not None and plan.total_steps else ""
    return f"About {_seconds(plan.time.step_s)} per step on {plan.card.name} ({largest}).{run}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours * 60 >= 1 else "under a minute"


def changes_table(plan: Plan) -> Table:
    """What makes it fit, in the order of the ladder, each on top of those above it."""
    from rich.table import Column, Table

    assert plan.steps is not None, "the caller has changes to show"
    table = Table(
        "set, in this order",
        Column("GiB", justify="right"),
        Column("time", justify="right"),
        "cost in time, in quality",
        box=None,
        pad_edge=False,
        title="The smallest change that makes it fit",
        title_justify="left",
    )
    for step in plan.steps:
        cost = f"{step.change.time}; {step.change.quality}"
        table.add_row(_written(step.change.settings), f"{step.peak_gib:.1f}", f"{step.slower - 1:+.0%}", cost)
    return table


def _written(settings: Settings, between: str = "\n") -> str:
    return between.join(f"{path}={write_value(value)}" for path, value in settings.items())


def measured_sentence(plan: Plan, *, peak_gib: float, step_s: float) -> str:
    """Predicted beside measured, for `--measure`."""
    if not peak_gib:
        return f"Measured on a CPU: {step_s:.2f} s for the pack; there is no GPU memory to compare."
    # A measured pack is one of training; completions are not made for it.
    moments = plan.memory.moments.items()
    predicted = max(gib for moment, gib in moments if moment not in ("rollout", "scoring"))
    return (
        f"Measured: {peak_gib:.2f} GiB reserved where {predicted:.2f} were predicted ({predicted / peak_gib - 1:+.1%}), "
        f"{step_s:.2f} s for the pack."
    )
