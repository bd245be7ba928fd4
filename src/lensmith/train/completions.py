"""What was answered, and how it was judged: completions.jsonl in the run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lensmith.config.tree import RunConfig
from lensmith.rundir import RunDir, naming_full_disk
from lensmith.train.grpo_stats import Batch
from lensmith.types import counted

COMPLETIONS = "completions.jsonl"


class CompletionLog:
    """Keeps the completions of every rollout.show_every_steps-th step."""

    def __init__(self, run: RunDir, config: RunConfig, tokenizer: Any, say: Callable[[str], None]) -> None:
        self._run, self._every, self._tokenizer = run, config.rollout.show_every_steps, tokenizer
        self._say, self._drawn = say, 0
        self._failed: dict[str, int] = {}

    @property
    def path(self) -> Path:
        return self._run.path / COMPLETIONS

    def close(self) -> None:
        """Say how often each reward failed."""
        for name, count in self._failed.items():
            self._say(f"Reward {name} failed for {counted(count, 'completion')} of this run.")

    def add(self, batch: Batch) -> None:
        """One line per completion, written before the step is taken; failures of rewards are said."""
        for name, failure in batch.table.failures.items():
            known = self._failed.get(name, 0)
            self._failed[name] = known + failure.count
            if not known:
                self._say(f"{failure.first} Such completions have no number from it; failures are counted.")
        self._drawn += 1
        if (self._drawn - 1) % self._every:
            return
        texts = self._tokenizer.batch_decode([list(c.ids) for c in batch.completions], skip_special_tokens=True)
        lines = []
        for number, text in enumerate(texts):
            sample, completion = batch.prompts[number].sample, batch.completions[number]
            values = batch.table.values[number]
            lines.append(
                {
                    "step": batch.step,
                    "where": sample.where,
                    "question": sample.question,
                    "reference": sample.answer,
                    "images": [str(image) for image in sample.images],
                    "completion": text,
                    "tokens": len(completion.ids),
                    "stopped": completion.stopped,
                    "rewards": {
                        name: None if math.isnan(value) else float(value)
                        for name, value in zip(batch.table.names, values, strict=True)
                    },
                    "advantage": batch.advantages[number],
                }
            )
        with naming_full_disk(self._run.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
