"""The gate: seven checks of one run, each model loaded once and one at a time.

tuned files  ──> health ──> inputs ──> merge ──> changed
as trained   ──> logits, blind, answers
plain base   ──> logits ──> + adapter: reload, logits ──> merged in memory: logits
merged       ──> logits: agree ──> answers: metric
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lensmith.errors import LensmithError, ModelError
from lensmith.evals.predict import EvalResult, Progress, answer_samples, evaluate_model
from lensmith.export.merge import merge_run
from lensmith.export.verify.agree import Logits, check_agree, distance, read_logits
from lensmith.export.verify.answers import LEAST_QUESTIONS, check_blind, check_metric
from lensmith.export.verify.check import NAMES, Check, Verified, not_run
from lensmith.export.verify.inputs import check_inputs
from lensmith.export.verify.reload import load_plain, reload_tuned
from lensmith.export.verify.served import Served, judge_served, open_endpoint
from lensmith.export.verify.subject import Say, Subject, is_dequantised, open_subject, stored_dtype
from lensmith.export.verify.tensors import (
    check_changed,
    check_health,
    check_promised,
    check_readable,
)
from lensmith.model.adapters import ADAPTER_CONFIG, find_tuned, load_tuned
from lensmith.model.load import load_model
from lensmith.model.quant import BITS
from lensmith.model.stream import FileShards
from lensmith.rundir import RunDir, find_run, naming_full_disk
from lensmith.train.evaluate import eval_settings

QUESTIONS = 64
"""Held-out questions that adapter and merged model are asked, at most."""
PROCESSOR_FILE = "processor_config.json"


def verify_run(
    path: str | Path,
    *,
    merged: Path | None = None,
    questions: int = QUESTIONS,
    endpoint: str | None = None,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> Verified:
    """Ask a run, or one of its checkpoints, the seven questions.

    Args:
        merged: a merged model to verify; None makes one in a temporary folder in the run's.
        questions: held-out questions to ask adapter and merged model, at most.
        endpoint: address of an OpenAI-compatible server of the merged model, to be asked as well.

    Raises:
        LensmithError: there is no run, or nothing in it to verify.
    """
    run, place = find_run(path)
    run = RunDir.open(run.path)
    check_readable(tuned := find_tuned(place))
    if merged is not None:
        _check_merged(merged)
    server = None if endpoint is None else open_endpoint(endpoint)
    subject = open_subject(run, tuned, questions, server, say, progress)
    with _merged_folder(subject, run, merged) as folder:
        _check_files(subject, folder)
        adapter = _ask_trained(subject)
        base = _ask_plain(subject)
        _ask_merged(subject, folder, base, adapter)
    assert set(subject.checks) == set(NAMES), "each check has a verdict"
    return Verified(run.path, tuple(subject.watch.stamp(subject.checks[name]) for name in NAMES))


def _check_merged(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no merged model there, because there is no config.json in it. Give the folder that "
            "`lensmith export --to merged` wrote, or leave --merged out to have one made for the time of the checks."
        )
    FileShards(folder)  # all files of its index are there


@contextmanager
def _merged_folder(subject: Subject, run: RunDir, given: Path | None) -> Iterator[Path | None]:
    """The folder of the merged model; None, with `changed` failed, where it cannot be made."""
    if given is not None:
        yield given
        return
    promised = None
    if not subject.stored_in_four_bits:
        promised = check_promised(
            FileShards(subject.base), subject.tuned, subject.config.tune, tied=subject.tied, also=subject.inherited()
        )
    if promised is not None:
        subject.settle(promised)
        yield None
        return
    with naming_full_disk(run.path), tempfile.TemporaryDirectory(dir=run.path, prefix=".verify-") as place:
        folder: Path | None = Path(place) / "merged"
        subject.say("Merging into a temporary folder.")
        try:
            with subject.watch.running("changed"):
                merge_run(run, subject.tuned, folder)
        except ModelError as fault:
            subject.settle(Check("changed", False, None, 0, "the tuned weights cannot be merged", str(fault)))
            folder = None
        yield folder


def _check_files(subject: Subject, merged: Path | None) -> None:
    """health, inputs and changed: no model is loaded."""
    watch, base = subject.watch, FileShards(subject.base)
    with watch.running("health"):
        subject.settle(check_health(base, subject.tuned))
    with watch.running("inputs"):
        folders = [folder for folder in (subject.tuned, merged) if folder and (folder / PROCESSOR_FILE).is_file()]
        if not folders:
            subject.settle(
                not_run("inputs", f"Not run: {subject.tuned} holds no processor, only a finished run's folder does.")
            )
        else:
            subject.settle(check_inputs(folders, subject.encoder, subject.samples, subject.origin))
    if merged is None:
        return
    subject.say("Comparing the merged model with the base, tensor by tensor.")
    with watch.running("changed"):
        if subject.stored_in_four_bits:
            subject.settle(
                not_run("changed", "Not run: the base is stored in 4 bits, whose tensors no 16-bit model shares.")
            )
        else:
            check = check_changed(
                base,
                FileShards(merged),
                subject.tuned,
                subject.config.tune,
                tied=subject.tied,
                also=subject.inherited(),
                into_dequantised=is_dequantised(merged),
            )
            subject.settle(check)


def _ask_trained(subject: Subject) -> EvalResult | None:
    """The model as it was trained: its logits, blind, and its answers."""
    subject.say("Loading the model as it was trained.")
    loaded = load_model(subject.config, device=subject.device, processor=subject.processor)
    try:
        model = load_tuned(loaded.model, subject.tuned).eval()
    except LensmithError as fault:
        for name in ("blind", "metric"):
            subject.settle(not_run(name, f"Not run: {fault}"))
        return None
    with subject.watch.running("agree"):
        subject.forms["as trained"] = read_logits(model, subject.encoder, subject.prompts)
    subject.say("Asking with right, wrong and grey pictures.")
    with subject.watch.running("blind"):
        subject.settle(check_blind(model, subject.material, subject.config.seed))
    with subject.watch.running("metric"):
        return _answers(subject, model)


def _answers(subject: Subject, model: Any) -> EvalResult | None:
    """Answers to held-out questions; None, with `metric` not run, where there are too few of them."""
    asked = subject.material.asked(subject.questions, subject.config.seed)
    if len(asked) < LEAST_QUESTIONS:
        why = (
            subject.material.why if subject.material.source is None else f"{len(asked)} held-out questions with answers"
        )
        subject.settle(
            not_run("metric", f"Not run: {why}, and {LEAST_QUESTIONS} are the fewest that can tell a difference.")
        )
        return None
    subject.say(f"Asking {len(asked)} held-out questions.")
    return evaluate_model(
        model, subject.encoder, subject.processor, asked, eval_settings(subject.config), progress=subject.progress
    )


def _ask_plain(subject: Subject) -> Logits:
    """The base in plain transformers; with the tuned weights in plain PEFT; and merged by PEFT."""
    _let_go()
    subject.say("Loading the base in plain transformers, and the tuned weights with plain PEFT.")
    with subject.watch.running("reload"):
        model = load_plain(subject.base, device=subject.device, dtype=subject.dtype)
    with subject.watch.running("agree"):
        base = read_logits(model, subject.encoder, subject.prompts)
        if subject.endpoint is not None:
            subject.base_answers = _say_to_prompts(subject, model)
    with subject.watch.running("reload"):
        model, check = reload_tuned(model, subject.tuned)
        subject.settle(check)
    if model is None:
        return base
    with subject.watch.running("agree"):
        subject.forms["adapter"] = read_logits(model, subject.encoder, subject.prompts)
        if (subject.tuned / ADAPTER_CONFIG).is_file():
            model = model.merge_and_unload()
            subject.forms["merged in memory"] = read_logits(model, subject.encoder, subject.prompts)
    return base


def _ask_merged(subject: Subject, folder: Path | None, base: Logits, adapter: EvalResult | None) -> None:
    """The merged model as it lies on disk: agree and metric."""
    if folder is None:
        for name in ("agree", "metric"):
            subject.settle(not_run(name, "Not run: there is no merged model."))
        return
    _let_go()
    subject.say("Loading the merged model from disk.")
    with subject.watch.running("agree"):
        model = load_plain(folder, device=subject.device, dtype=subject.dtype)
        subject.forms["from disk"] = read_logits(model, subject.encoder, subject.prompts)
        check = _judge_logits(subject, base, folder, _ask_server(subject, model))
        subject.settle(check)
    if adapter is not None:
        with subject.watch.running("metric"):
            merged = _answers(subject, model)
            assert merged is not None, "the adapter was asked the same questions"
            subject.settle(check_metric(adapter, merged))


def _ask_server(subject: Subject, model: Any) -> Served | None:
    """What the server says to the image prompts, held against the merged model and the base; None without a server."""
    if subject.endpoint is None:
        return None
    subject.say(f"Asking {subject.endpoint.url}.")
    answers = subject.endpoint.ask(subject.samples, subject.encoder, max_new_tokens=subject.config.eval.max_new_tokens)
    return judge_served(subject.endpoint, answers, merged=_say_to_prompts(subject, model), base=subject.base_answers)


def _say_to_prompts(subject: Subject, model: Any) -> list[str]:
    """Greedy answers to the image prompts."""
    settings = subject.config.eval
    predictions = answer_samples(
        model,
        subject.encoder,
        subject.processor,
        subject.samples,
        max_new_tokens=settings.max_new_tokens,
        batch=settings.batch,
    )
    return [prediction.answer for prediction in predictions]


def _judge_logits(subject: Subject, base: Logits, folder: Path, served: Served | None) -> Check:
    """Like with like: after training on weights in few bits, only a merge into those weights equals the trained model."""
    forms, remarks = dict(subject.forms), []
    if is_dequantised(folder):
        first, apart = "as trained", [form for form in ("adapter", "merged in memory") if form in forms]
    else:
        first, apart = "adapter", ["as trained"] if subject.few_bits else []
    if first not in forms:
        return not_run(
            "agree", "Not run: the tuned weights could not be loaded, so there is nothing to hold it against."
        )
    if apart and set(apart) <= set(forms):
        gap = distance(forms[apart[0]], forms[first])
        bits = BITS[subject.config.tune.method]
        remarks.append(f"the base in {bits} bits, which was trained beside, and in 16 bits are {gap:.2g} apart")
    ordered = {first: forms[first]} | {form: logits for form, logits in forms.items() if form not in (first, *apart)}
    return check_agree(
        base,
        ordered,
        dtypes=(stored_dtype(folder), subject.dtype),
        prompts=subject.origin,
        remarks=remarks,
        served=served,
    )


def _let_go() -> None:
    """Give the memory of the model before back; models hold cycles, so that the count of references is not enough."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
