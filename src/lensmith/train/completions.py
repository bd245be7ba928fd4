"""What was answered, and how it was judged: completions.jsonl in the run folder, and completions.html to look at.

The lines of a step are written before it is taken, so that what broke it can be read; the page follows when its numbers
are known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from lensmith.config.tree import RunConfig
from lensmith.rundir import RunDir, naming_full_disk
from lensmith.train.grpo_stats import Batch, GrpoStats
from lensmith.train.page import CompletionPage
from lensmith.train.page.step import Asked, Judged
from lensmith.types import counted


class CompletionLog:
    """Keeps the completions of every rollout.show_every_steps-th step, and the page of them."""

    def __init__(
        self, run: RunDir, config: RunConfig, tokenizer: Any, say: Callable[[str], None], *, total_steps: int
    ) -> None:
        self._run, self._every, self._group = run, config.rollout.show_every_steps, config.grpo.group
        self._tokenizer, self._say, self._drawn = tokenizer, say, 0
        self._failed: dict[str, int] = {}
        self._page = CompletionPage(run.page_path, f"{run.path.name}: what is answered", total_steps)
        self._is_news = False
        """Whether completions were kept that the page does not show yet."""

    def close(self) -> None:
        """Say how often each reward failed, and write the page for the last time, at rest.

        Where this start of the run answered nothing, the page of an earlier one stays.
        """
        for name, count in self._failed.items():
            self._say(f"Reward {name} failed for {counted(count, 'completion')} of this run.")
        if self._drawn:
            self._write(running=False)

    def look(self, stats: GrpoStats, alarms: Sequence[str] = (), *, before: bool = False) -> None:
        """A step was taken: the page gets its numbers and alarms, and is renewed where completions were kept.

        `before`: it was taken before this start of the run, and is only there for the curves.
        """
        self._page.look(stats, alarms)
        if self._is_news and not before:
            self._write(running=True)
            self._is_news = False

    def add(self, batch: Batch) -> None:
        """One line per completion, written before the step is taken; failures of rewards are said."""
        for name, failure in batch.table.failures.items():
            known = self._failed.get(name, 0)
            self._failed[name] = known + failure.count
            if not known:
                self._say(
                    f"{failure.first.rstrip('.')}. Such completions have no number from it; failures are counted."
                )
        self._drawn += 1
        if (self._drawn - 1) % self._every:
            return
        judged = self._judged(batch)
        lines = []
        for prompt, one in zip(batch.prompts, judged, strict=True):
            sample = prompt.sample
            lines.append(
                {
                    "step": batch.step,
                    "where": sample.where,
                    "question": sample.question,
                    "reference": sample.answer,
                    "images": [str(image) for image in sample.images],
                    "completion": one.text,
                    "tokens": one.tokens,
                    "stopped": one.stopped,
                    "rewards": one.rewards,
                    "total": one.total,
                    "advantage": one.advantage,
                }
            )
        with naming_full_disk(self._run.path), self._run.completions_path.open("a", encoding="utf-8") as file:
            # ASCII, because a half of a character cannot be written as UTF-8, and tokens can spell one.
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._page.add(batch.step, self._asked(batch, judged))
        self._is_news = True

    def _write(self, *, running: bool) -> None:
        with naming_full_disk(self._run.path):
            self._page.write(running=running, failures=self._failed)

    def _judged(self, batch: Batch) -> list[Judged]:
        texts = self._tokenizer.batch_decode([list(c.ids) for c in batch.completions], skip_special_tokens=True)
        return [
            Judged(
                text=text,
                tokens=len(completion.ids),
                stopped=completion.stopped,
                rewards={name: _known(value) for name, value in zip(batch.table.names, values, strict=True)},
                total=_known(total),
                advantage=advantage,
            )
            for text, completion, values, total, advantage in zip(
                texts, batch.completions, batch.table.values, batch.table.total, batch.advantages, strict=True
            )
        ]

    def _asked(self, batch: Batch, judged: Sequence[Judged]) -> list[Asked]:
        """Per prompt; the completions of a group stand together."""
        starts = range(0, len(judged), self._group)
        return [
            Asked(
                where=batch.prompts[start].sample.where,
                question=batch.prompts[start].sample.question,
                reference=batch.prompts[start].sample.answer,
                images=batch.prompts[start].encoded.images,
                completions=judged[start : start + self._group],
            )
            for start in starts
        ]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
