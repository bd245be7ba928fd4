"""What got better: the same held-out questions to the model before and after training.

What is held out is decided here and in `prepare_data` alike, by the seed and by image, so a picture that was trained on
is never asked about.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lensmith.config.tree import Data, Eval, RunConfig
from lensmith.data.encode import Encoder
from lensmith.data.scan import Scan
from lensmith.errors import DataError, RunError
from lensmith.evals.degenerate import find_degenerate
from lensmith.evals.endpoint import Endpoint, answer_through_endpoint
from lensmith.evals.own_metrics import load_metric
from lensmith.evals.predict import Progress, check_answers, draw_samples, evaluate_model
from lensmith.evals.results import (
    EvalResult,
    compare_results,
    kept_columns,
    read_predictions,
    score_predictions,
    write_predictions,
)
from lensmith.evals.score import Score
from lensmith.model.adapters import find_tuned, load_tuned
from lensmith.model.load import choose_device, load_model, load_processor
from lensmith.rundir import STEP_NAME, RunDir
from lensmith.train.prepare import Prepared, Say, prepare_run, scan_one, scan_rows
from lensmith.train.ranks import rank, speaker
from lensmith.train.rounds import BestScore
from lensmith.train.sft import TrainResult, train_prepared
from lensmith.types import Sample

if TYPE_CHECKING:
    from lensmith.train.progress import TrainProgress


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One model, or one run before and after, on one list of questions."""

    before: EvalResult | None
    """None for a model that is not a run."""
    after: EvalResult
    predictions: Path | None
    """The answers behind `after`; None where there is no run folder to keep them in."""

    def sentences(self) -> list[str]:
        """For a person: scores with intervals, and what changed question by question."""
        told = [*_failures(self.after), *find_degenerate(self.after.predictions)]
        if self.before is None:
            return [f"{self.after.score} ({self.after.why})", *told]
        compared = compare_results(self.before, self.after)
        return [
            f"before training: {self.before.score}",
            f"after training:  {self.after.score} ({self.after.why})",
            compared.sentence,
            compared.difference_sentence,
            *told,
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "before": None if self.before is None else _score_json(self.before),
            "after": _score_json(self.after),
            "comparison": None if self.before is None else asdict(compare_results(self.before, self.after)),
            "predictions": None if self.predictions is None else str(self.predictions),
        }


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
        nothing: dict[str, Any] = dict.fromkeys(("before", "after", "comparison", "predictions"))
        scores = self.evaluated.to_json() if self.evaluated else nothing
        return {"run": str(self.run), **{name: getattr(self.trained, name) for name in names}, **scores}


def train_and_compare(
    config: RunConfig, *, say: Say, train_progress: TrainProgress | None = None, eval_progress: Progress | None = None
) -> Compared:
    """Train as `config` says; where data.test holds something out, ask it before and after.

    The answers before are kept in the run folder, so that a resumed run does not ask again. With several processes the
    first one asks.
    """
    say = speaker(say)
    _check_run(RunDir(config.run), config)
    _check_metric(config)
    prepared = prepare_run(config, say)
    if prepared.held_out is None or not len(prepared.held_out.rows) or rank() != 0:
        return Compared(_train(prepared, say=say, progress=train_progress), None)
    run, samples = prepared.run, _drawn_samples(prepared.held_out, config, say)
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
    evaluated = Evaluated(before, ask(trained.model, "after", eval_progress), run.predictions_path("after"))
    for sentence in (*evaluated.sentences(), *_better_before(run, evaluated.after.score)):
        say(sentence)
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


def evaluate_subject(subject: str, data: str | None = None, *, say: Say, progress: Progress | None = None) -> Evaluated:
    """Score a run before and after training, one of its checkpoints, or a model, on `data` or on what the run held out.

    Raises:
        RunError, DataError: there is nothing to ask.
    """
    run, tuned = find_run(subject)
    config = _subject_config(subject, data)
    _check_metric(config)
    loaded = load_model(config)
    for sentence in loaded.sentences:
        say(sentence)
    encoder = Encoder.from_processor(loaded.processor, config.data.image, config.data.video)
    samples = _held_out_samples(config, encoder, loaded.device, say)
    suffix = f"-{Path(data).stem}" if data else ""

    def ask(model: Any, keep: Path | None) -> EvalResult:
        return evaluate_model(model, encoder, loaded.processor, samples, config.eval, keep=keep, progress=progress)

    if not run.exists:
        evaluated = Evaluated(None, ask(loaded.model, None), None)
    else:
        name = "after" if tuned == run.path else tuned.name
        before, keep = (
            ask(loaded.model, run.predictions_path(f"before{suffix}")),
            run.predictions_path(f"{name}{suffix}"),
        )
        evaluated = Evaluated(before, ask(load_tuned(loaded.model, find_tuned(tuned)), keep), keep)
    for sentence in evaluated.sentences():
        say(sentence)
    return evaluated


def evaluate_endpoint(
    subject: str, endpoint: Endpoint, data: str | None = None, *, say: Say, progress: Progress | None = None
) -> Evaluated:
    """Score what a server answers to the questions of a run, or of `data`, with the pixels and the metric of that run.

    Raises:
        EndpointError: it does not answer.
        RunError, DataError: there is nothing to ask.
    """
    run, _ = find_run(subject)
    config = _subject_config(subject, data)
    encoder = Encoder.from_processor(load_processor(config.model), config.data.image, config.data.video)
    samples = _held_out_samples(config, encoder, choose_device(), say)
    check_answers(samples)
    tokens = config.eval.max_new_tokens
    started = time.perf_counter()
    predictions = answer_through_endpoint(endpoint, samples, encoder, max_new_tokens=tokens, say=say, progress=progress)
    keep = run.predictions_path(f"endpoint-{Path(data).stem}" if data else "endpoint") if run.exists else None
    if keep is not None:
        write_predictions(predictions, keep)
    scored = score_predictions(predictions, config.eval, eval_s=time.perf_counter() - started)
    evaluated = Evaluated(None, scored, keep)
    for sentence in evaluated.sentences():
        say(sentence)
    return evaluated


def find_run(subject: str | Path) -> tuple[RunDir, Path]:
    """The run that `subject` is, or whose checkpoint it is, and the folder that holds the tuned weights meant."""
    path = Path(subject)
    if STEP_NAME.fullmatch(path.name) and path.is_dir() and RunDir(path.parent.parent).exists:
        return RunDir(path.parent.parent), path
    return RunDir(path), path


def _held_out_samples(config: RunConfig, encoder: Encoder, device: torch.device, say: Say) -> list[Sample]:
    """The questions of data.test: a file's, or those that the share holds out of data.train."""
    if isinstance(config.data.test, str):
        scan = scan_one(config, encoder, device, "test", say)
    else:
        _, scan = scan_rows(config, encoder, device, lambda _: None)
    assert scan is not None, "_subject_config refuses data.test=null"
    return _drawn_samples(scan, config, say)


def _drawn_samples(scan: Scan, config: RunConfig, say: Say) -> list[Sample]:
    """At most eval.samples of the scan's rows, read."""
    rows = np.unique(scan.rows).tolist()  # a weight above 1 repeats rows for training, not for asking
    drawn = draw_samples(rows, config.eval.samples, config.seed)
    say(f"Asking {len(drawn):,} of {len(rows):,} held-out questions.")
    return [scan.source.sample(row) for row in drawn]


def _subject_config(subject: str, data: str | None) -> RunConfig:
    run, _ = find_run(subject)
    if run.exists:
        config = run.read_config()
        if data is not None:
            config = config.model_copy(update={"data": config.data.model_copy(update={"test": data})})
        if config.data.test is None:
            raise RunError(
                f"{subject}: this run held nothing out (data.test is null), so there are 0 questions to ask. "
                f"Give a file of them: lensmith eval {subject} test.jsonl"
            )
        return config
    if data is None:
        raise DataError(
            f"{subject}: not a run folder, and no data file is given, so there are 0 questions to ask. "
            f"Give a file of them: lensmith eval {subject} test.jsonl"
        )
    return RunConfig(model=subject, data=Data(test=data))


def _check_run(run: RunDir, config: RunConfig) -> None:
    """Before answers are written into the folder of another run; `train_model` tells what may differ."""
    run.check_free()
    if run.exists:
        run.check_same(config)


def _failures(result: EvalResult) -> list[str]:
    """What the metric could not judge, as a sentence where there is any."""
    return [] if result.failure is None else [result.failure]


def _check_metric(config: RunConfig) -> None:
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


def _score_json(result: EvalResult) -> dict[str, Any]:
    score = asdict(result.score)
    return {"accuracy": score.pop("value"), **score}
