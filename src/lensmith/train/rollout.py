"""Completions for the prompts of a step, by the built-in engine: seeded by the step, so that a resumed run draws the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lensmith.config.tree import Grpo
from lensmith.data.groups import GroupPacker
from lensmith.model.decode import Completion, Decoder
from lensmith.model.engine import Engine
from lensmith.model.sampling import Sampling
from lensmith.types import Encoded


@dataclass(slots=True)
class RolloutCost:
    """What making completions has cost since the last look."""

    seconds: float = 0.0
    tokens: int = 0

    def take(self) -> RolloutCost:
        """What it has come to; counting starts anew."""
        found = RolloutCost(self.seconds, self.tokens)
        self.seconds, self.tokens = 0.0, 0
        return found


class Rollout:
    """Samples groups of completions from a model as it is now."""

    def __init__(
        self,
        engine: Engine,
        packer: GroupPacker,
        settings: Grpo,
        *,
        end_ids: Sequence[int],
        never_ids: Sequence[int],
        seed: int,
        batch: int | None = None,
    ) -> None:
        """`batch`: most completions written at the same time; None for no limit."""
        self.engine, self.packer, self.settings = engine, packer, settings
        self.seed, self.batch, self.cost = seed, batch, RolloutCost()
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.min_p)
        self.decoder = Decoder(engine, sampling, end_ids=end_ids, never_ids=never_ids)

    def complete(self, prompts: Sequence[Encoded], members: int, draw: int) -> list[list[Completion]]:
        """`members` completions of each prompt. `draw` says which draw of the run this is: equal numbers, equal draws."""
        started = time.perf_counter()
        generator = torch.Generator(self.engine.place)
        groups: list[list[Completion]] = []
        at_once = max(1, self.batch // members) if self.batch else len(prompts)
        for start in range(0, len(prompts), at_once):
            # A seed of its own per part, so that no part depends on how long the one before it was.
            generator.manual_seed(
                int(np.random.SeedSequence([self.seed, draw, start]).generate_state(1, np.uint64)[0] >> 1)
            )
            groups += self.decoder.complete(
                self.packer.pack_prompts(prompts[start : start + at_once]),
                members,
                max_new_tokens=self.settings.max_new_tokens,
                generator=generator,
            )
        self.cost.seconds += time.perf_counter() - started
        self.cost.tokens += sum(len(completion.ids) for group in groups for completion in group)
        return groups
