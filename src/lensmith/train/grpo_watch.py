"""Everybody who is told of each GRPO step: metrics.jsonl, the alarms, the page, the best checkpoint, the progress line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lensmith.train.best import BestCheckpoint
from lensmith.train.completions import CompletionLog
from lensmith.train.grpo_alarms import Alarms
from lensmith.train.grpo_stats import GrpoStats
from lensmith.train.ranks import rank

if TYPE_CHECKING:
    from lensmith.train.prepare import Prepared, Say
    from lensmith.train.progress import TrainProgress


class GrpoWatch:
    """`GrpoWatch(...)(stats)` after each step; `close` when there are no more, however the run ended."""

    def __init__(self, prepared: Prepared, say: Say, progress: TrainProgress | None) -> None:
        """Steps of earlier starts are told again, since alarms compare with what was normal at first."""
        run, config = prepared.run, prepared.config
        self.total_steps = len(prepared.plan.steps)
        self.loss = float("nan")
        """Of the last step of this start."""
        self._run, self._say, self._progress = run, say, progress
        self._alarms = Alarms(config.grpo, prepared.loaded.dtype, vllm=config.rollout.engine == "vllm")
        self.best = BestCheckpoint(run, config.save.keep)
        tokenizer = prepared.loaded.processor.tokenizer
        self.log = CompletionLog(run, config, tokenizer, say, total_steps=self.total_steps)
        for line in run.read_metrics():
            stats = GrpoStats(**line)
            self.best.look(stats)
            self.log.look(stats, self._alarms.look(stats), before=True)

    def __call__(self, stats: GrpoStats) -> None:
        self.loss = stats.loss
        if rank() != 0:
            return
        self._run.append_metrics(stats)
        self.best.look(stats)
        sentences = self._alarms.look(stats)
        for sentence in sentences:
            self._say(sentence)
        self.log.look(stats, sentences)
        if self._progress is not None:
            self._progress.update(stats, self.total_steps)

    def close(self) -> None:
        """Failures of rewards are said; the page comes to rest."""
        self.log.close()

    def advice(self) -> list[str]:
        """What to do about a run that ended worse than it was."""
        return self.best.sentences(self.total_steps, self._alarms.collapsed)
