"""What got better: the same held-out questions to the model before and after training.

What is held out is decided here and in `prepare_data` alike, by the seed and by image, so a picture that was trained on
is never asked about.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.config.tree import Data, Eval, RunConfig
from lensmith.data.encode import Encoder
from lensmith.data.scan import Scan
from lensmith.errors import DataError, RunError
from lensmith.evals.predict import (
    EvalResult,
    Progress,
    ask_model,
    compare_results,
    draw_samples,
    evaluate_model,
    read_predictions,
    score_predictions,
)
from lensmith.model.adapters import find_tuned, load_tuned
from lensmith.model.load import Loaded, load_model
from lensmith.rundir import STEP_NAME, RunDir
from lensmith.train.prepare import Prepared, Say, prepare_run, scan_one, scan_rows
from lensmith.train.ranks import rank, speaker
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
    say = speaker(say)
    _check_run(RunDir(config.run), config)
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
    say(f"Before training: {before.score}")
    trained = _train(
        prepared,
        say=say,
        progress=train_progress,
        during=lambda model, step: say(f"After step {step}: {ask(model, f'step-{step:06d}').score}"),
    )
    evaluated = Evaluated(before, ask(trained.model, "after", eval_progress), run.predictions_path("after"))
    for sentence in evaluated.sentences():
        say(sentence)
    return Compared(trained, evaluated)


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
    loaded = load_model(config)
    for sentence in loaded.sentences:
        say(sentence)
    encoder = Encoder.from_processor(loaded.processor, config.data.image, config.data.video)
    samples = _held_out_samples(config, encoder, loaded, say)
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


def ask_subject(subject: str, image: Path, question: str, *, say: Say) -> str:
    """One answer of a run's tuned model, of one of its checkpoints, or of a model, about one picture."""
    run, tuned = find_run(subject)
    config = run.read_config() if run.exists else RunConfig(model=subject)
    if not image.is_file():
        raise DataError(f"{image}: no such picture, so there is nothing to ask about. Give the path of an image file.")
    loaded = load_model(config)
    model: Any = load_tuned(loaded.model, find_tuned(tuned)) if run.exists else loaded.model
    return ask_model(model, loaded.processor, image, question, budget=config.data.image)


def find_run(subject: str | Path) -> tuple[RunDir, Path]:
    """The run that `subject` is, or whose checkpoint it is, and the folder that holds the tuned weights meant."""
    path = Path(subject)
    if STEP_NAME.fullmatch(path.name) and path.is_dir() and RunDir(path.parent.parent).exists:
        return RunDir(path.parent.parent), path
    return RunDir(path), path


def _held_out_samples(config: RunConfig, encoder: Encoder, loaded: Loaded, say: Say) -> list[Sample]:
    """The questions of data.test: a file's, or those that the share holds out of data.train."""
    if isinstance(config.data.test, str):
        scan = scan_one(config, encoder, loaded.device, "test", say)
    else:
        _, scan = scan_rows(config, encoder, loaded.device, lambda _: None)
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


def _kept_answers(settings: Eval, run: RunDir, samples: list[Sample]) -> EvalResult | None:
    """The base model's answers, where an earlier start of this run asked it the same questions."""
    kept_path = run.predictions_path("before")
    if not kept_path.is_file() or run.latest_checkpoint() is None:  # else they may be answers of other settings
        return None
    kept = read_predictions(kept_path)
    if [(p.where, p.question, p.reference) for p in kept] != [(s.where, s.question, s.answer) for s in samples]:
        return None
    return score_predictions(kept, settings)


def _score_json(result: EvalResult) -> dict[str, Any]:
    score = asdict(result.score)
    return {"accuracy": score.pop("value"), **score}
