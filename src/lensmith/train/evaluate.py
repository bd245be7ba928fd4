"""What got better: the same held-out questions to the model before and after training.

What is held out is decided here and in `prepare_data` alike, by the seed and by image, so a picture that was trained on
is never asked about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lensmith.config.tree import Data, RunConfig
from lensmith.data.encode import Encoder
from lensmith.data.scan import hold_out, scan_source
from lensmith.data.source import open_source
from lensmith.errors import DataError, RunError
from lensmith.evals.predict import (
    EvalResult,
    Prediction,
    Progress,
    ask_model,
    compare_results,
    draw_samples,
    evaluate_model,
    read_predictions,
)
from lensmith.evals.score import guess_metric, score_answers
from lensmith.model.adapters import find_tuned, load_tuned
from lensmith.model.load import Loaded, load_model, load_processor
from lensmith.rundir import RunDir
from lensmith.train.sft import PACK_TOKENS, TrainResult, train_model
from lensmith.types import Sample

if TYPE_CHECKING:
    from lensmith.train.progress import TrainProgress

Say = Callable[[Any], None]


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
        if self.before is None:
            return [f"{self.after.score} ({self.after.why})"]
        compared = compare_results(self.before, self.after)
        return [
            f"before training: {self.before.score}",
            f"after training:  {self.after.score} ({self.after.why})",
            compared.sentence,
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "before": None if self.before is None else _score_json(self.before),
            "after": _score_json(self.after),
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
        scores = self.evaluated.to_json() if self.evaluated else {"before": None, "after": None, "predictions": None}
        return {"run": str(self.run), **{name: getattr(self.trained, name) for name in names}, **scores}


def train_and_compare(
    config: RunConfig, *, say: Say, train_progress: TrainProgress | None = None, eval_progress: Progress | None = None
) -> Compared:
    """Train as `config` says; where data.test holds something out, ask it before and after.

    The answers before are kept in the run folder, so that a resumed run does not ask again. With several processes the
    first one asks.
    """
    run, before, samples = RunDir(config.run), None, []
    asks = config.data.test is not None and os.environ.get("RANK", "0") == "0"
    if asks:
        _check_run(run, config)
        loaded = load_model(config)
        samples = held_out_samples(config, loaded, say)
        before = _answers_before(config, run, loaded, samples, eval_progress)
        say(f"Before training: {before.score}")
        del loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def ask_along(model: Any, step: int) -> None:
        keep = run.predictions_path(f"step-{step:06d}")
        result = _evaluate(config, model, trained_with, samples, keep=keep, progress=None)
        say(f"After step {step}: {result.score}")

    trained_with = load_processor(config.model)
    trained = train_model(config, say=say, progress=train_progress, during=ask_along if asks else None)
    if before is None:
        return Compared(trained, None)
    keep = run.predictions_path("after")
    after = _evaluate(config, trained.model, trained.processor, samples, keep=keep, progress=eval_progress)
    evaluated = Evaluated(before, after, keep)
    for sentence in evaluated.sentences():
        say(sentence)
    return Compared(trained, evaluated)


def evaluate_subject(subject: str, data: str | None = None, *, say: Say, progress: Progress | None = None) -> Evaluated:
    """Score a run before and after training, or a model, on `data` or on what the run held out.

    Raises:
        RunError, DataError: there is nothing to ask.
    """
    run = RunDir(subject)
    config = _subject_config(subject, data)
    loaded = load_model(config)
    for sentence in loaded.sentences:
        say(sentence)
    samples = held_out_samples(config, loaded, say)
    suffix = f"-{Path(data).stem}" if data else ""
    before, keep = None, None
    model: Any = loaded.model
    if run.exists:
        before = _evaluate(
            config, model, loaded.processor, samples, keep=run.predictions_path(f"before{suffix}"), progress=progress
        )
        model, keep = load_tuned(model, find_tuned(run.path)), run.predictions_path(f"after{suffix}")
    after = _evaluate(config, model, loaded.processor, samples, keep=keep, progress=progress)
    evaluated = Evaluated(before, after, keep)
    for sentence in evaluated.sentences():
        say(sentence)
    return evaluated


def ask_subject(subject: str, image: Path, question: str, *, say: Say) -> str:
    """One answer of a run's tuned model, or of a model, about one picture."""
    run = RunDir(subject)
    config = run.read_config() if run.exists else RunConfig(model=subject)
    if not image.is_file():
        raise DataError(f"{image}: no such picture, so there is nothing to ask about. Give the path of an image file.")
    loaded = load_model(config)
    model: Any = load_tuned(loaded.model, find_tuned(run.path)) if run.exists else loaded.model
    return ask_model(model, loaded.processor, image, question, budget=config.data.image)


def held_out_samples(config: RunConfig, loaded: Loaded, say: Say) -> list[Sample]:
    """The questions of data.test: a file's, or those that the share holds out of data.train; at most eval.samples."""
    share = isinstance(config.data.test, float)
    encoder = Encoder.from_processor(loaded.processor, config.data.image)
    source = open_source(config.data, encoder, which="train" if share else "test")
    scan = scan_source(
        source,
        budget_tokens=config.pack.tokens or PACK_TOKENS[loaded.device.type],
        on_long=config.data.on_long,
        on_bad_row=config.data.on_bad_row,
        seed=config.seed,
    )
    if isinstance(config.data.test, float):
        _, scan = hold_out(scan, config.data.test, config.seed)
    else:
        for sentence in (*source.sentences, *scan.sentences()):
            say(sentence)
    rows = np.unique(scan.rows).tolist()  # a weight above 1 repeats rows for training, not for asking
    drawn = draw_samples([scan.source.sample(row) for row in rows], config.eval.samples, config.seed)
    say(f"Asking {len(drawn)} of {len(rows)} held-out questions.")
    return drawn


def _subject_config(subject: str, data: str | None) -> RunConfig:
    run = RunDir(subject)
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


def _answers_before(
    config: RunConfig, run: RunDir, loaded: Loaded, samples: list[Sample], progress: Progress | None
) -> EvalResult:
    """The base model's answers; read back where an earlier start of this run asked the same questions."""
    keep = run.predictions_path("before")
    if keep.is_file() and run.latest_checkpoint() is not None:  # else the answers may be those of other settings
        kept = read_predictions(keep)
        if [(p.where, p.question, p.reference) for p in kept] == [(s.where, s.question, s.answer) for s in samples]:
            return _rescore(config, kept)
    run.path.mkdir(parents=True, exist_ok=True)
    return _evaluate(config, loaded.model, loaded.processor, samples, keep=keep, progress=progress)


def _evaluate(
    config: RunConfig,
    model: Any,
    processor: Any,
    samples: list[Sample],
    *,
    keep: Path | None,
    progress: Progress | None,
) -> EvalResult:
    encoder = Encoder.from_processor(processor, config.data.image)
    return evaluate_model(model, encoder, processor, samples, config.eval, keep=keep, progress=progress)


def _rescore(config: RunConfig, predictions: list[Prediction]) -> EvalResult:
    answers, references = [p.answer for p in predictions], [p.reference for p in predictions]
    metric, why = guess_metric(references)
    if config.eval.metric != "auto":
        metric, why = config.eval.metric, f"metric {config.eval.metric}: set by eval.metric"
    exact, normalised = (score_answers(answers, references, name) for name in ("exact", "normalised"))
    return EvalResult(metric, why, exact, normalised, tuple(predictions), eval_s=0.0)


def _score_json(result: EvalResult) -> dict[str, Any]:
    score = asdict(result.score)
    return {"accuracy": score.pop("value"), **score}
