"""completions.html: how a GRPO run goes and what its model says, renewed while it runs; one file, no scripts.

On top the curves over all steps and the alarms that rang, below the newest steps prompt by prompt. A step is drawn once
and kept as text; writing the page puts the pieces together. The layout is page.html beside this file.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lensmith.evals.markup import fill_template, list_facts, show
from lensmith.train.page.curves import Plot, draw_plot
from lensmith.train.page.step import Asked, write_step
from lensmith.train.page.thumbnails import Thumbnails
from lensmith.types import counted

if TYPE_CHECKING:
    from lensmith.train.grpo_stats import GrpoStats

MOST_STEPS = 20
"""Newest steps shown prompt by prompt."""
PAGE_BYTES = 6_000_000
"""Most of all steps together, as UTF-8; the newest one is always there."""
REFRESH_S = 20
"""Between two looks of an open page at the file: longer than a glance at a completion takes."""
MOST_ALARMS = 50


class CompletionPage:
    """What the page of a run shows. `look` takes a step's numbers, `add` its completions; `write` renews the file."""

    def __init__(self, path: Path, title: str, total_steps: int) -> None:
        self.path, self.title, self.total_steps = path, title, total_steps
        self._stats: list[GrpoStats] = []
        self._alarms: deque[tuple[int, str]] = deque(maxlen=MOST_ALARMS)
        self._steps: deque[tuple[str, int]] = deque()
        """Newest steps as HTML, and their bytes."""
        self._left_out = 0
        self._thumbnail = Thumbnails()

    def look(self, stats: GrpoStats, alarms: Sequence[str] = ()) -> None:
        """The numbers of one more step, and what began to go wrong with it."""
        self._stats.append(stats)
        self._alarms.extend((stats.step, sentence) for sentence in alarms)

    def add(self, step: int, prompts: Sequence[Asked]) -> None:
        """The completions of one more step; the oldest ones leave the page."""
        section = write_step(step, prompts, self._thumbnail)
        self._steps.append((section, len(section.encode())))
        while len(self._steps) > MOST_STEPS or (
            len(self._steps) > 1 and sum(size for _, size in self._steps) > PAGE_BYTES
        ):
            self._steps.popleft()
            self._left_out += 1

    def write(self, *, running: bool, failures: Mapping[str, int]) -> None:
        """Write beside, then rename: a browser sees the old page or the new one. `failures`: how often each reward failed.

        Not forced to disk: everything on it is in metrics.jsonl and completions.jsonl as well.
        """
        refresh = f'<meta http-equiv="refresh" content="{REFRESH_S}">' if running else ""
        state = f"Running; this page looks for news every {REFRESH_S} s." if running else "The run has ended."
        blanks = {
            "title": show(self.title),
            "refresh": refresh,
            "state": state,
            "facts": list_facts(self._facts()),
            "alarms": self._alarm_list(failures),
            "plots": "".join(self._plots()),
            "steps": "\n".join(section for section, _ in reversed(self._steps)),
            "left_out": self._left_out_sentence(),
        }
        beside = self.path.with_name(f".{self.path.name}.new")
        # A half of a character, which JSON and tokens can hold, was written out by `show`.
        beside.write_text(fill_template("lensmith.train.page", "page.html", blanks), encoding="utf-8")
        beside.replace(self.path)

    def _facts(self) -> dict[str, str]:
        if not self._stats:
            return {"step": f"0 of {self.total_steps:,}"}
        last = self._stats[-1]
        facts = {
            "step": f"{last.step:,} of {self.total_steps:,}",
            "reward": f"{last.reward:.3f} ± {last.reward_std:.3f}",
            "tokens a completion": f"{last.completion_tokens:,.0f}",
            "cut off": f"{last.truncated:.0%}",
            "groups without signal": f"{last.zero_variance:.0%}",
            "seconds a step": f"{last.step_s:.1f}",
        }
        return facts | ({"GiB": f"{last.peak_gib:.1f}"} if last.peak_gib else {})

    def _alarm_list(self, failures: Mapping[str, int]) -> str:
        told = [f"Reward {name} failed for {counted(count, 'completion')} so far." for name, count in failures.items()]
        told += [sentence for _, sentence in reversed(self._alarms)]
        if not told:
            return '<p class="card none"><span class="right" aria-hidden="true">✓</span> None rang.</p>'
        items = "".join(
            f'<li><span class="wrong" aria-hidden="true">!</span> {show(sentence)}</li>' for sentence in told
        )
        return f'<ul class="card alarms">{items}</ul>'

    def _plots(self) -> list[str]:
        """The curves that tell how it goes; one without any value is left out."""
        stats = self._stats
        if not stats:
            return []
        names = dict.fromkeys(name for one in stats for name in one.rewards)
        rewards = {name: [one.rewards.get(name) for one in stats] for name in names}
        total: dict[str, list[float | None]] = {"weighted sum": [one.reward for one in stats]}
        lengths = [one.completion_tokens for one in stats]
        entropies = [one.entropy for one in stats]
        shares = {
            "groups whose rewards are all equal": [one.zero_variance for one in stats],
            "completions cut off": [one.truncated for one in stats],
        }
        plots = [
            Plot("Reward", total | rewards, "{:.3f}", note="Means over the completions of a step."),
            Plot("Entropy", {"nats a token": entropies}, "{:.3f}", low=0, high=_most(entropies)),
            Plot("Length", {"tokens a completion": lengths}, "{:,.0f}", low=0, high=_most(lengths)),
            Plot("What teaches nothing", shares, "{:.0%}", low=0, high=1),
        ]
        if any(one.kl is not None for one in stats):
            plots.append(Plot("Divergence from the start", {"nats a token": [one.kl for one in stats]}, "{:.4f}"))
        steps = [one.step for one in stats]
        alarms = sorted({step for step, _ in self._alarms})
        return [draw_plot(plot, steps, alarms) for plot in plots]

    def _left_out_sentence(self) -> str:
        first = self._stats[0].step if self._stats else 1
        shown = f"The newest {counted(len(self._steps), 'step')} prompt by prompt" if self._steps else "No step yet"
        left = f"; {counted(self._left_out, 'earlier one')} left the page" if self._left_out else ""
        curves = f"Curves from step {first:,} on, over {counted(len(self._stats), 'step')}."
        return f"{shown}{left}; completions.jsonl has every one that was kept. {curves}"


def _most(values: Sequence[float | None]) -> float:
    """The top of an axis that begins at 0; 1 where nothing is above it."""
    return max((value for value in values if value is not None and math.isfinite(value)), default=0.0) or 1.0
