"""stub until merge"""

from dataclasses import dataclass
from typing import Any
import numpy as np


@dataclass(frozen=True, slots=True)
class RewardBatch:
    completions: Any
    completion_ids: Any
    samples: Any
    truncated: Any


@dataclass
class RewardTable:
    names: Any
    values: Any


class RewardSet:
    names = ("exact",)
    weights = (1.0,)

    def score(self, b):
        return RewardTable(
            self.names, np.array([[float(c.strip() == s.answer.strip())] for c, s in zip(b.completions, b.samples)])
        )

    def failure_sentences(self):
        return []


def load_rewards(specs, *, root, on_error):
    return RewardSet()
