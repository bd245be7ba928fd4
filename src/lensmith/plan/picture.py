"""A plan as a picture: one stacked bar as it is, one with the changes, against the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lensmith.errors import ConfigError
from lensmith.plan.answer import Plan
from lensmith.plan.memory import MemoryPlan

SUFFIXES = (".png", ".svg")
WIDTH_IN, BAR_IN, MARGIN_IN = 9.0, 0.9, 1.5
NAMED_SHARE = 0.04
"""Narrower parts, as shares of the picture, have no figure in them."""
STRENGTH = 0.65
"""Of colours: black figures stand on them."""


def draw_plan(plan: Plan, path: Path) -> None:
    """Write a .png or .svg. Raises ConfigError for another suffix, or a folder that does not exist."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--picture {path}: a picture is a {' or '.join(SUFFIXES)} file. Name it like plan.png.")
    if not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: there is no folder {path.parent}. Make it, or choose another place.")
    from matplotlib.figure import Figure

    bars = {f"as it is\n{plan.memory.peak_gib:.1f} GiB": plan.memory}
    if plan.steps and plan.fitted is not None:
        bars[f"with the changes\n{plan.fitted.peak_gib:.1f} GiB"] = plan.fitted
    figure = Figure(figsize=(WIDTH_IN, MARGIN_IN + BAR_IN * len(bars)), layout="constrained")
    axes = figure.subplots()
    extent = 1.05 * max(plan.card.gib, *(sum(memory.parts.values()) for memory in bars.values()))
    colours = _colours(list(bars.values()))
    for row, memory in enumerate(bars.values()):
        _draw_bar(axes, row, memory, colours, extent)
    _draw_card(axes, plan, len(bars))
    axes.set(
        xlim=(0, extent), xlabel="GiB", yticks=range(len(bars)), yticklabels=list(bars), ylim=(len(bars) - 0.4, -0.8)
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.suptitle(f"{plan.facts.name}, {plan.config.tune.method}: peak memory by part", fontsize="medium")
    figure.savefig(path, dpi=150)


def _colours(memories: list[MemoryPlan]) -> dict[str, Any]:
    """One colour per part, the same in all bars, light enough for black figures; their order tells them apart too."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(name for memory in memories for name in memory.parts))
    palette = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]  a listed colour map has them
    lighter = [tuple(1 - (1 - value) * STRENGTH for value in colour) for colour in palette]
    return {name: lighter[number % len(lighter)] for number, name in enumerate(names)}


def _draw_bar(axes: Any, row: int, memory: MemoryPlan, colours: dict[str, Any], extent: float) -> None:
    left, known = 0.0, set(axes.get_legend_handles_labels()[1])
    for name, gib in memory.parts.items():
        label = name if name not in known else None
        axes.barh(row, gib, left=left, height=0.6, color=colours[name], edgecolor="white", linewidth=0.8, label=label)
        if gib / extent > NAMED_SHARE:
            axes.text(left + gib / 2, row, f"{gib:.1f}", ha="center", va="center", fontsize="small")
        left += gib


def _draw_card(axes: Any, plan: Plan, bars: int) -> None:
    gib = plan.card.gib
    axes.axvline(gib, color="black", linewidth=1.2)
    axes.text(gib, -0.6, f"{plan.card.name} ", ha="right", va="center", fontsize="small")
    # The context is a part of the bars, so that what is usable ends where the share that stays free begins.
    spare = gib - plan.card.usable_gib - plan.memory.parts["CUDA context"]
    axes.axvspan(gib - spare, gib, color="black", alpha=0.12, linewidth=0, ymax=bars / (bars + 0.4))
