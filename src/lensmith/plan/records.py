"""Measured runs, as the planner reads them: benchmarks/results/memory-grid.json, written by benchmarks/memory_grid.py.

    {"gpu_or_cpu": "NVIDIA H100 80GB HBM3", "cases": [
      {"size": "8b", "settings": ["tune.method=qlora", "memory.recompute=16"], "tokens": 6144, "images": 8,
       "image_tokens": 700, "learned": 488, "samples": 8, "peak_gib": 10.8, "step_s": 0.84}, ...]}

`image_tokens` are those of each image; a step is one pack. `peak_gib` is torch's reserved memory. A case with `group` is
a training pack of GRPO: so many completions, which are all that is learned, share each prompt. A case may have `rollout`,
with the fields of `Rollout`, where its times and peaks hold the making of completions too. Other keys are ignored, and
cases with an `error` are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lensmith.config.read import read_config
from lensmith.config.tree import RunConfig
from lensmith.errors import ConfigError
from lensmith.plan.cards import match_card
from lensmith.plan.coefficients import Coefficients
from lensmith.plan.facts import read_facts
from lensmith.plan.memory import plan_memory
from lensmith.plan.time import plan_time
from lensmith.plan.work import Rollout, Work, shared_work
from lensmith.types import counted


@dataclass(frozen=True, slots=True)
class Record:
    """One measured configuration."""

    name: str
    model: str
    card: str
    settings: tuple[str, ...]
    """As on the command line; all others have their defaults."""
    work: Work
    peak_gib: float
    step_s: float
    rollout: Rollout | None = None

    def predict(self, coefficients: Coefficients) -> tuple[float, float]:
        """Peak in GiB and seconds per step. Raises ConfigError for a card that is not listed."""
        card = match_card(self.card)
        if card is None:
            raise ConfigError(f"{self.name}: {self.card} is not in lensmith.plan.cards. Add it with its rates.")
        facts, config = read_facts(self.model), _config(self.settings)
        memory = plan_memory(facts, config, self.work, rollout=self.rollout, coefficients=coefficients)
        time = plan_time(facts, config, self.work, card, rollout=self.rollout, coefficients=coefficients)
        return memory.peak_gib, time.step_s


@cache
def _config(settings: tuple[str, ...]) -> RunConfig:
    return read_config(None, settings)


def read_records(path: Path) -> list[Record]:
    """All cases of a file that ended well, by name."""
    grid = json.loads(path.read_text(encoding="utf-8"))
    records = [_record(case, grid["gpu_or_cpu"]) for case in grid["cases"] if "error" not in case]
    return sorted(records, key=lambda record: record.name)


def _record(case: Mapping[str, Any], card: str) -> Record:
    work = Work(
        tokens=case["tokens"],
        learned=case["learned"],
        samples=case["samples"],
        images=case["images"],
        image_tokens=case["images"] * case["image_tokens"],
    )
    if (group := case.get("group", 1)) > 1:
        work = shared_work(work, prefixes=work.samples // group)
    name = f"{case['size']} {' '.join(case['settings'])} {work.tokens} tokens, {counted(work.images, 'image')}"
    name += f", groups of {group}" if group > 1 else ""
    rollout = Rollout(**case["rollout"]) if case.get("rollout") else None
    return Record(name, case["size"], card, tuple(case["settings"]), work, case["peak_gib"], case["step_s"], rollout)
