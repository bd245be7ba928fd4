"""Questions on the way: asked every `eval.every_steps` steps, the best checkpoint kept, and the end where nothing gets better.

The held-out questions choose the checkpoint, so its score on them is a little too good; with few questions, chance chooses.
Scores of a final verdict come from questions that chose nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl

from lensmith.config.tree import RunConfig
from lensmith.evals.score import Score
from lensmith.rundir import RunDir
from lensmith.train.ranks import rank
from lensmith.types import counted

During = Callable[[Any, int], Score | None]
"""(model, step) -> the score of the held-out questions; None where nothing is to be chosen by it."""
Verdict = Literal["none", "best", "worse", "over"]


@dataclass(frozen=True, slots=True)
class BestScore:
    """How the best checkpoint did: what best.json holds."""

    step: int
    metric: str
    score: float
    lower_is_better: bool

    def is_beaten_by(self, score: Score) -> bool:
        return score.is_better_than(self.score)

    def beats(self, score: Score) -> bool:
        return score.value != self.score and not score.is_better_than(self.score)


class Rounds(TrainerCallback):
    """Asks, keeps and stops. Of several processes the first one asks, and all of them do as it decides."""

    def __init__(self, during: During | None, config: RunConfig, run: RunDir, say: Callable[[str], None]) -> None:
        """`during` may be None on other processes than the first, and where nothing is asked."""
        self._during, self._run, self._say, self._keep = during, run, say, config.save.keep
        self._every_steps, self._patience = config.eval.every_steps, config.eval.patience
        # A GRPO run keeps the checkpoint of its best reward, which costs no questions (lensmith.train.best).
        self._keeps_best = config.task == "sft"
        self._found: BestScore | None = None
        self.spent_s = 0.0
        """Seconds of asking, which are no training time."""
        self.ended_at: int | None = None
        """The step after which nothing had got better for `eval.patience` rounds."""

    @property
    def best(self) -> BestScore | None:
        """The best so far whose checkpoint is there."""
        kept = self._run.read_best() if self._keeps_best else None
        return None if kept is None else BestScore(**kept)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, model: Any = None, **_: Any) -> None:
        step = state.global_step
        last = step == state.max_steps  # the evaluation after training asks then
        if not self._every_steps or step % self._every_steps or last:
            return
        start = time.perf_counter()
        verdict = self._judge(self._during(model, step), step) if self._during and rank() == 0 else "none"
        verdict = _share(verdict)
        # Where it ended is saved too: the same command again must find it.
        control.should_save = control.should_save or verdict in ("best", "over")
        if verdict == "over":
            control.should_training_stop, self.ended_at = True, step
        self.spent_s += time.perf_counter() - start

    def on_save(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if self._found is not None and self._found.step == state.global_step:
            self._run.keep_best(self._found, keep=self._keep)

    def is_over(self, step: int) -> bool:
        """Whether a run that stands at that step had no better round for `eval.patience` rounds."""
        best = self.best
        if not self._patience or not self._every_steps or best is None:
            return False
        return step // self._every_steps - best.step // self._every_steps >= self._patience

    def _judge(self, score: Score | None, step: int) -> Verdict:
        if score is None or not self._keeps_best:
            return "none"
        best = self.best
        if best is None or best.is_beaten_by(score):
            self._found = BestScore(step, score.metric, score.value, score.lower_is_better)
            return "best"
        if not self.is_over(step):
            return "worse"
        self._say(
            f"Stopped after step {step}: {counted(self._patience or 0, 'round')} of questions without a better score than "
            f"{best.score:.1%} after step {best.step} (eval.patience). The run ends with the weights of that step."
        )
        return "over"


def _share(verdict: Verdict) -> Verdict:
    """What the first process decided, on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return verdict
    told: list[Any] = [verdict]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]
