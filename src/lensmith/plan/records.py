"""Measured runs, as the planner reads them: everything it needs to predict the same run, and what came out.

benchmarks/results/memory-grid.json is `{"records": [...]}`; one record:

    {"name": "8b-qlora-6k", "model": "8B", "card": "NVIDIA H100 80GB HBM3",
     "settings": {"tune.method": "qlora", "memory.recompute": "layers"},
     "work": {"tokens": 6012, "learned": 504, "samples": 8, "images": 8, "image_tokens": 5300, "packs_per_step": 1},
     "rollout": null, "peak_gib": 10.8, "step_s": 0.84}

`settings` are those that differ from the defaults; `work` and `rollout` are the fields of `Work` and `Rollout`. `peak_gib`
is torch's reserved memory, reset before the measured steps; `step_s` a whole optimizer step. Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.config.read import read_config
from lensmith.config.tree import RunConfig
from lensmith.config.write import write_value
from lensmith.errors import ConfigError
from lensmith.plan.cards import match_card
from lensmith.plan.coefficients import Coefficients
from lensmith.plan.facts import read_facts
from lensmith.plan.memory import plan_memory
from lensmith.plan.time import plan_time
from lensmith.plan.work import Rollout, Work


@dataclass(frozen=True, slots=True)
class Record:
    """One measured configuration."""

    name: str
    model: str
    card: str
    settings: Mapping[str, Any]
    work: Work
    peak_gib: float
    step_s: float
    rollout: Rollout | None = None

    @property
    def config(self) -> RunConfig:
        """The settings as a whole config."""
        return read_config(None, [f"{path}={write_value(value)}" for path, value in self.settings.items()])

    def predict(self, coefficients: Coefficients) -> tuple[float, float]:
        """Peak in GiB and seconds per step. Raises ConfigError for a card that is not listed."""
        card = match_card(self.card)
        if card is None:
            raise ConfigError(f"{self.name}: {self.card} is not in lensmith.plan.cards. Add it with its rates.")
        facts, config = read_facts(self.model), self.config
        memory = plan_memory(facts, config, self.work, rollout=self.rollout, coefficients=coefficients)
        time = plan_time(facts, config, self.work, card, rollout=self.rollout, coefficients=coefficients)
        return memory.peak_gib, time.step_s


def read_records(path: Path) -> list[Record]:
    """All records of a file, by name."""
    records = [_record(fields) for fields in json.loads(path.read_text(encoding="utf-8"))["records"]]
    return sorted(records, key=lambda record: record.name)


def _record(fields: Mapping[str, Any]) -> Record:
    known = {name: fields[name] for name in ("name", "model", "card", "settings", "peak_gib", "step_s")}
    rollout = Rollout(**fields["rollout"]) if fields.get("rollout") else None
    return Record(**known, work=Work(**fields["work"]), rollout=rollout)
