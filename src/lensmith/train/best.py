"""The checkpoint with the best reward is kept, and offered where a run ends worse than it once was.

Rewards of single steps are those of a few prompts and jump about, so a checkpoint is judged by the mean of the last
SMOOTH_STEPS steps before it. Those were answered by weights up to so many steps older: what is kept is the neighbourhood
of the best, not a proof. Checkpoints before step SMOOTH_STEPS are not judged. `lensmith eval` on both checkpoints is the proof.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lensmith.rundir import RunDir

if TYPE_CHECKING:
    from lensmith.train.grpo_stats import GrpoStats

SMOOTH_STEPS = 5


@dataclass(frozen=True, slots=True)
class Standing:
    """How a checkpoint did: one line of best.json."""

    step: int
    reward: float
    """Mean over the last SMOOTH_STEPS steps."""
    spread: float
    """Standard deviation of those steps' rewards."""


class BestCheckpoint(TrainerCallback):
    """`look` at each step; as a callback it names the checkpoint just written where it is the best so far."""

    def __init__(self, run: RunDir, keep: int) -> None:
        """`keep`: checkpoints that stay besides the best, as save.keep says."""
        self._run, self._keep = run, keep
        self._recent: list[GrpoStats] = []

    def look(self, stats: GrpoStats) -> None:
        """A step was taken."""
        self._recent = [*self._recent[1 - SMOOTH_STEPS :], stats]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if len(self._recent) < SMOOTH_STEPS:
            return
        now, best = self._standing(state.global_step), self.best
        if best is None or now.reward > best.reward:
            self._run.keep_best(now, keep=self._keep)

    @property
    def best(self) -> Standing | None:
        """The best so far; None before the first save, or where its checkpoint is gone."""
        kept = self._run.read_best()
        return None if kept is None else Standing(**kept)

    def sentences(self, last_step: int, collapsed: Sequence[str]) -> list[str]:
        """An offer to go back, where the run ends below its best by more than that one's spread or has collapsed.

        Args:
            last_step: the step that the run ended with.
            collapsed: names of the alarms of a collapse that rang.
        """
        best = self.best
        if best is None or best.step == last_step or len(self._recent) < SMOOTH_STEPS:
            return []
        now = self._standing(last_step)
        fell = now.reward < best.reward - best.spread
        if not fell and not collapsed:
            return []
        why = f"An alarm rang ({', '.join(collapsed)}): the" if collapsed else "The"
        checkpoint = self._run.checkpoint_path(best.step)
        return [
            f"{why} last steps have a mean reward of {now.reward:.3f}; those before step {best.step} had "
            f"{best.reward:.3f} ± {best.spread:.3f}, and that checkpoint is kept. To compare both: lensmith eval "
            f"{self._run.path} and lensmith eval {checkpoint}. To go on from it: lensmith train {self._run.config_path} "
            f"tune.start_from={checkpoint} run={self._run.path}-from-{best.step}. Other programs load {checkpoint / 'tuned'}."
        ]

    def _standing(self, step: int) -> Standing:
        rewards = [stats.reward for stats in self._recent]
        return Standing(step, statistics.mean(rewards), statistics.stdev(rewards))
