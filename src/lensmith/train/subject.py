"""Evaluating what is there already: a run, one of its checkpoints, a model, or whatever a server serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lensmith.config.tree import Data, RunConfig
from lensmith.data.encode import Encoder
from lensmith.errors import DataError, RunError
from lensmith.evals.breakdown import check_grouping
from lensmith.evals.endpoint import Endpoint, answer_through_endpoint
from lensmith.evals.predict import Progress, answer_probe, check_answers, evaluate_model
from lensmith.evals.probe import ProbeResult, probe_questions
from lensmith.evals.report import Evaluated, write_report
from lensmith.evals.results import EvalResult, score_predictions, write_predictions
from lensmith.model.adapters import find_tuned, load_tuned
from lensmith.model.load import choose_device, load_model, load_processor
from lensmith.rundir import RunDir, find_run
from lensmith.train.evaluate import check_metric, drawn_samples, eval_settings
from lensmith.train.prepare import Say, scan_one, scan_rows
from lensmith.types import Sample


@dataclass(frozen=True, slots=True)
class Show:
    """What is told besides the score."""

    by: tuple[str, ...] = ()
    """Columns to break the score down by."""
    probe: bool = True
    """Whether base and tuned are asked the general questions of `lensmith.evals.probe`."""
    html: bool = True
    page: Path | None = None
    """None for one in the run folder; a model that is no run has no page unless one is named."""

    def page_for(self, run: RunDir, name: str) -> Path | None:
        """Where the page of an evaluation of that name goes; None for none."""
        own = run.eval_page_path.with_stem(name) if run.exists else None
        return (self.page or own) if self.html else None

    def check(self, samples: Sequence[Sample]) -> None:
        """Before anything is asked. Raises DataError for a column that no row has."""
        for by in self.by:
            check_grouping(by, [sample.columns for sample in samples])


def evaluate_subject(
    subject: str, data: str | None = None, *, show: Show | None = None, say: Say, progress: Progress | None = None
) -> Evaluated:
    """Score a run before and after training, one of its checkpoints, or a model, on `data` or on what the run held out.

    Raises:
        RunError, DataError: there is nothing to ask.
    """
    show = show or Show()
    run, tuned = find_run(subject)
    config = _subject_config(subject, data)
    settings = eval_settings(config)
    check_metric(config)
    loaded = load_model(config)
    for sentence in loaded.sentences:
        say(sentence)
    encoder = Encoder.from_processor(loaded.processor, config.data.image, config.data.video)
    samples = _held_out_samples(config, encoder, loaded.device, say)
    show.check(samples)
    suffix = f"-{Path(data).stem}" if data else ""
    questions = probe_questions() if show.probe and run.exists else ()

    def ask(model: Any, name: str) -> tuple[EvalResult, tuple[str, ...]]:
        keep = run.predictions_path(f"{name}{suffix}") if run.exists else None
        scored = evaluate_model(model, encoder, loaded.processor, samples, settings, keep=keep, progress=progress)
        return scored, answer_probe(model, encoder, loaded.processor, questions, batch=settings.batch)

    page = show.page_for(run, f"eval{suffix}")
    if not run.exists:
        evaluated = Evaluated(None, ask(loaded.model, "")[0], None, show.by, page=page)
    else:
        before, remembered = ask(loaded.model, "before")
        name = "after" if tuned == run.path else tuned.name
        after, left = ask(load_tuned(loaded.model, find_tuned(tuned)), name)
        probe = ProbeResult(questions, remembered, left) if questions else None
        evaluated = Evaluated(before, after, run.predictions_path(f"{name}{suffix}"), show.by, probe, page)
    return _told(evaluated, samples, subject, say)


def evaluate_endpoint(
    subject: str,
    endpoint: Endpoint,
    data: str | None = None,
    *,
    show: Show | None = None,
    say: Say,
    progress: Progress | None = None,
) -> Evaluated:
    """Score what a server answers to the questions of a run, or of `data`, with the pixels and the metric of that run.

    Raises:
        EndpointError: it does not answer.
        RunError, DataError: there is nothing to ask.
    """
    show = show or Show()
    run, _ = find_run(subject)
    config = _subject_config(subject, data)
    check_metric(config)
    encoder = Encoder.from_processor(load_processor(config.model), config.data.image, config.data.video)
    samples = _held_out_samples(config, encoder, choose_device(), say)
    show.check(samples)
    check_answers(samples)
    tokens = config.eval.max_new_tokens
    started = time.perf_counter()
    predictions = answer_through_endpoint(endpoint, samples, encoder, max_new_tokens=tokens, say=say, progress=progress)
    keep = run.predictions_path(f"endpoint-{Path(data).stem}" if data else "endpoint") if run.exists else None
    if keep is not None:
        write_predictions(predictions, keep)
    scored = score_predictions(predictions, eval_settings(config), eval_s=time.perf_counter() - started)
    evaluated = Evaluated(None, scored, keep, show.by, page=show.page_for(run, "eval-endpoint"))
    return _told(evaluated, samples, subject, say)


def _told(evaluated: Evaluated, samples: Sequence[Sample], subject: str, say: Say) -> Evaluated:
    """Everything said, and the page written where one is wanted."""
    for sentence in evaluated.sentences():
        say(sentence)
    if (table := evaluated.table()) is not None:
        say("")
        say(table)
    if evaluated.page is not None:
        write_report(evaluated, samples, title=f"{subject}: what it answers")
        what = "Gains and losses" if evaluated.before else "Answers"
        say(f"\n{what} with their pictures: {evaluated.page}")
    return evaluated


def _held_out_samples(config: RunConfig, encoder: Encoder, device: torch.device, say: Say) -> list[Sample]:
    """The questions of data.test: a file's, or those that the share holds out of data.train."""
    if isinstance(config.data.test, str):
        scan = scan_one(config, encoder, device, "test", say)
    else:
        _, scan = scan_rows(config, encoder, device, lambda _: None)
    assert scan is not None, "_subject_config refuses data.test=null"
    return drawn_samples(scan, config, say)


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
