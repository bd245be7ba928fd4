"""What got better: the same held-out questions to the model before and after training.

What is held out is decided here and in `prepare_data` alike, by the seed and by image, so a picture that was trained on
is never asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.config.tree import Eval, RunConfig
from lensmith.data.scan import Scan
from lensmith.evals.own_metrics import load_metric
from lensmith.evals.predict import Progress, draw_samples, evaluate_model
from lensmith.evals.report import Evaluated, write_report
from lensmith.evals.results import (
    EvalResult,
    kept_columns,
    read_predictions,
    score_predictions,
)
from lensmith.evals.score import Score
from lensmith.rundir import RunDir
from lensmith.train.prepare import Given, Prepared, Say, prepare_run
from lensmith.train.ranks import rank, speaker
from lensmith.train.rounds import BestScore
from lensmith.train.sft import TrainResult, train_prepared
from lensmith.types import Sample

if TYPE_CHECKING:
    from lensmith.train.progress import TrainProgress


@dataclass(frozen=True, slots=True)
class Compared:
    """A training run and, where something was held out, what got better."""

    trained: TrainResult
    evaluated: Evaluated | None

    @property
    def run(self) -> Path:
        return self.trained.run

    def to_json(self) -> dict[str, Any]:
        """What `lensmith train --json` ends with."""
        names = ("steps", "samples", "train_s", "samples_per_s", "loss")
        nothing: dict[str, Any] = dict.fromkeys(
            ("before", "after", "comparison", "breakdown", "probe", "predictions", "page")
        )
        scores = self.evaluated.to_json() if self.evaluated else nothing
        return {"run": str(self.run), **{name: getattr(self.trained, name) for name in names}, **scores}


def train_and_compare(
    config: RunConfig,
    *,
    say: Say,
    train_progress: TrainProgress | None = None,
    eval_progress: Progress | None = None,
    given: Given | None = None,
) -> Compared:
    """Train as `config` says; where data.test holds something out, ask it before and after.

    The answers before are kept in the run folder, so that a resumed run does not ask again. With several processes the
    first one asks. `given`: what is loaded already.
    """
    say = speaker(say)
    _check_run(RunDir(config.run), config)
    check_metric(config)
    prepared = prepare_run(config, say, given=given)
    if prepared.held_out is None or not len(prepared.held_out.rows) or rank() != 0:
        return Compared(_train(prepared, say=say, progress=train_progress), None)
    run, samples = prepared.run, drawn_samples(prepared.held_out, config, say)
    settings = eval_settings(config)

    def ask(model: Any, name: str, progress: Progress | None = None) -> EvalResult:
        keep = run.predictions_path(name)
        return evaluate_model(
            model, prepared.encoder, prepared.loaded.processor, samples, settings, keep=keep, progress=progress
        )

    before = _kept_answers(settings, run, samples) or ask(prepared.model, "before", eval_progress)
    for sentence in (f"Before training: {before.score}", *_failures(before)):
        say(sentence)
    trained = _train(
        prepared,
        say=say,
        progress=train_progress,
        during=lambda model, step: _told(say, step, ask(model, f"step-{step:06d}").score),
    )
    after = ask(trained.model, "after", eval_progress)
    evaluated = Evaluated(before, after, run.predictions_path("after"), page=run.eval_page_path)
    write_report(evaluated, samples, title=f"{run.path.name}: before and after training")
    for sentence in (*evaluated.sentences(), *_better_before(run, evaluated.after.score)):
        say(sentence)
    say(f"Gains and losses with their pictures: {evaluated.page}")
    return Compared(trained, evaluated)


def _told(say: Say, step: int, score: Score) -> Score:
    say(f"After step {step}: {score}")
    return score


def _better_before(run: RunDir, score: Score) -> list[str]:
    """An offer to go back, where a round of questions on the way did better than the end."""
    kept = run.read_best()
    if kept is None or "metric" not in kept or not (best := BestScore(**kept)).beats(score):
        return []
    checkpoint = run.checkpoint_path(best.step)
    return [
        f"The end scores {score.value:.1%}; after step {best.step} it was {best.score:.1%}, and that checkpoint is kept: "
        f"{checkpoint}. lensmith eval, verify and export take it as they take a run. The same questions chose it, so part of "
        "its lead is chance; eval.patience ends a run there by itself."
    ]


def eval_settings(config: RunConfig) -> Eval:
    """The settings of the evaluation, where eval.metric=auto takes what the rewards compare."""
    boxed = config.task == "grpo" and "math_boxed" in map(_reward_name, config.grpo.rewards)
    return config.eval.model_copy(update={"metric": "boxed"}) if boxed and config.eval.metric == "auto" else config.eval


def _reward_name(spec: str | dict[str, Any]) -> Any:
    return spec if isinstance(spec, str) else spec.get("name")


def _train(prepared: Prepared, **more: Any) -> TrainResult:
    if prepared.config.task == "sft":
        return train_prepared(prepared, **more)
    from lensmith.train.grpo import train_grpo

    return train_grpo(prepared, **more)


def drawn_samples(scan: Scan, config: RunConfig, say: Say) -> list[Sample]:
    """At most eval.samples of the scan's rows, read."""
    rows = np.unique(scan.rows).tolist()  # a weight above 1 repeats rows for training, not for asking
    drawn = draw_samples(rows, config.eval.samples, config.seed)
    say(f"Asking {len(drawn):,} of {len(rows):,} held-out questions.")
    return [scan.source.sample(row) for row in drawn]


def _check_run(run: RunDir, config: RunConfig) -> None:
    """Before answers are written into the folder of another run; `train_model` tells what may differ."""
    run.check_free()
    if run.exists:
        run.check_same(config)


def _failures(result: EvalResult) -> list[str]:
    """What the metric could not judge, as a sentence where there is any."""
    return [] if result.failure is None else [result.failure]


def check_metric(config: RunConfig) -> None:
    """Before anything is loaded or trained: a metric that does not exist is known now."""
    if config.eval.metric != "auto":
        load_metric(config.eval.metric)


def _kept_answers(settings: Eval, run: RunDir, samples: list[Sample]) -> EvalResult | None:
    """The base model's answers, where an earlier start of this run asked it the same questions."""
    kept_path = run.predictions_path("before")
    if not kept_path.is_file() or run.latest_checkpoint() is None:  # else they may be answers of other settings
        return None
    kept = read_predictions(kept_path)
    # Answers of an older version came without columns, and would be judged otherwise than those after training.
    known = [(p.where, p.question, p.reference, set(p.columns)) for p in kept]
    if known != [(s.where, s.question, s.answer, set(kept_columns(s.columns))) for s in samples]:
        return None
    return score_predictions(kept, settings)
