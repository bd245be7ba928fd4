"""The gate: seven checks of one run, each model loaded once and one at a time.

tuned files  ──> health ──> inputs ──> merge ──> changed
as trained   ──> logits, blind, answers
plain base   ──> logits ──> + adapter: reload, logits ──> merged in memory: logits
merged       ──> logits: agree ──> answers: metric
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lensmith.config.tree import RunConfig
from lensmith.data.encode import Encoder
from lensmith.errors import LensmithError, ModelError
from lensmith.evals.predict import EvalResult, Progress, evaluate_model
from lensmith.export.merge import merge_run
from lensmith.export.verify.agree import Logits, check_agree, distance, read_logits
from lensmith.export.verify.answers import LEAST_QUESTIONS, check_blind, check_metric
from lensmith.export.verify.check import NAMES, Check, Name, Stopwatch, Verified, not_run
from lensmith.export.verify.inputs import check_inputs
from lensmith.export.verify.material import Material, find_material, image_prompts
from lensmith.export.verify.reload import load_plain, reload_tuned
from lensmith.export.verify.tensors import (
    check_changed,
    check_health,
    check_promised,
    check_readable,
    tensor_names,
)
from lensmith.export.whole import RECORD
from lensmith.model.adapters import ADAPTER_CONFIG, TRAINED_WEIGHTS, find_tuned, load_tuned
from lensmith.model.load import choose_device, choose_precision, load_model, load_processor, local_folder
from lensmith.model.names import read_architecture
from lensmith.model.quant import BITS, is_quantised_checkpoint
from lensmith.model.stream import FileShards
from lensmith.rundir import RunDir, naming_full_disk
from lensmith.train.evaluate import eval_settings, find_run
from lensmith.types import Encoded, Sample

QUESTIONS = 64
"""Held-out questions that adapter and merged model are asked, at most."""
PROCESSOR_FILE = "processor_config.json"

Say = Callable[[Any], None]


@dataclass(slots=True)
class Gate:
    """What the checks share while they run."""

    config: RunConfig
    tuned: Path
    base: Path
    tied: bool
    """Whether the head is the embedding."""
    stored_in_four_bits: bool
    """The base on disk."""
    device: torch.device
    dtype: torch.dtype
    encoder: Encoder
    processor: Any
    material: Material
    samples: list[Sample]
    """PROMPTS image prompts."""
    origin: str
    """Where those are from."""
    questions: int
    say: Say
    progress: Progress | None
    watch: Stopwatch = field(default_factory=Stopwatch)
    checks: dict[Name, Check] = field(default_factory=dict)
    forms: dict[str, Logits] = field(default_factory=dict)

    def settle(self, check: Check) -> None:
        """Keep a verdict."""
        self.checks[check.name] = check

    @property
    def prompts(self) -> list[Encoded]:
        """The image prompts with their answers, where they have some: what follows a question is compared too."""
        encode = self.encoder
        return [encode.encode(one) if one.answer else encode.encode_prompt(one) for one in self.samples]

    @property
    def few_bits(self) -> bool:
        """Whether the run kept weights of the base in few bits, so that its adapter corrected their rounding as well."""
        return self.config.tune.method in BITS


def verify_run(
    subject: str | Path,
    *,
    merged: Path | None = None,
    questions: int = QUESTIONS,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> Verified:
    """Ask a run, or one of its checkpoints, the seven questions.

    Args:
        merged: a merged model to verify; None makes one in a temporary folder in the run's.
        questions: held-out questions to ask adapter and merged model, at most.

    Raises:
        LensmithError: there is no run, or nothing in it to verify.
    """
    run, place = find_run(subject)
    run = RunDir.open(run.path)
    check_readable(tuned := find_tuned(place))
    gate = _open_gate(run, tuned, questions, say, progress)
    with _merged_folder(gate, run, merged) as folder:
        _check_files(gate, folder)
        adapter = _ask_trained(gate)
        base = _ask_plain(gate)
        _ask_merged(gate, folder, base, adapter)
    assert set(gate.checks) == set(NAMES), "each check has a verdict"
    return Verified(run.path, tuple(gate.watch.stamp(gate.checks[name]) for name in NAMES))


def _open_gate(run: RunDir, tuned: Path, questions: int, say: Say, progress: Progress | None) -> Gate:
    config, device = run.read_config(), choose_device()
    architecture = read_architecture(config.model)
    processor = load_processor(config.model)
    encoder = Encoder.from_processor(processor, config.data.image, config.data.video)
    say(f"Verifying {tuned}, tuned from {config.model}.")
    material = find_material(config, encoder, device)
    samples, origin = image_prompts(material, config.seed)
    return Gate(
        config=config,
        tuned=tuned,
        base=local_folder(config.model),
        tied=bool(architecture.tie_word_embeddings),
        stored_in_four_bits=is_quantised_checkpoint(architecture),
        device=device,
        dtype=choose_precision(config.precision, device),
        encoder=encoder,
        processor=processor,
        material=material,
        samples=samples,
        origin=origin,
        questions=questions,
        say=say,
        progress=progress,
    )


@contextmanager
def _merged_folder(gate: Gate, run: RunDir, given: Path | None) -> Iterator[Path | None]:
    """The folder of the merged model; None, with `changed` failed, where it cannot be made."""
    if given is not None:
        if not (given / "config.json").is_file():
            raise ModelError(
                f"{given}: no merged model there, because there is no config.json in it. Give the folder that "
                "`lensmith export --to merged` wrote, or leave --merged out to have one made for the time of the checks."
            )
        yield given
        return
    promised = None
    if not gate.stored_in_four_bits:
        promised = check_promised(FileShards(gate.base), gate.tuned, gate.config.tune, tied=gate.tied)
    if promised is not None:
        gate.settle(promised)
        yield None
        return
    with naming_full_disk(run.path), tempfile.TemporaryDirectory(dir=run.path, prefix=".verify-") as place:
        folder: Path | None = Path(place) / "merged"
        gate.say("Merging into a temporary folder.")
        try:
            with gate.watch.running("changed"):
                merge_run(run, gate.tuned, folder)
        except ModelError as fault:
            gate.settle(Check("changed", False, None, 0, "the tuned weights cannot be merged", str(fault)))
            folder = None
        yield folder


def _check_files(gate: Gate, merged: Path | None) -> None:
    """health, inputs and changed: no model is loaded."""
    watch, base = gate.watch, FileShards(gate.base)
    with watch.running("health"):
        gate.settle(check_health(base, gate.tuned))
    with watch.running("inputs"):
        folders = [folder for folder in (gate.tuned, merged) if folder and (folder / PROCESSOR_FILE).is_file()]
        if not folders:
            gate.settle(
                not_run("inputs", f"Not run: {gate.tuned} holds no processor, only a finished run's folder does.")
            )
        else:
            gate.settle(check_inputs(folders, gate.encoder, gate.samples, gate.origin))
    if merged is None:
        return
    gate.say("Comparing the merged model with the base, tensor by tensor.")
    with watch.running("changed"):
        if gate.stored_in_four_bits:
            gate.settle(
                not_run("changed", "Not run: the base is stored in 4 bits, whose tensors no 16-bit model shares.")
            )
        else:
            check = check_changed(
                base,
                FileShards(merged),
                gate.tuned,
                gate.config.tune,
                tied=gate.tied,
                also=_inherited(gate.config),
                into_dequantised=_is_dequantised(merged),
            )
            gate.settle(check)


def _inherited(config: RunConfig) -> tuple[str, ...]:
    """Tensors that the run that this one went on from had trained itself."""
    if config.tune.start_from is None:
        return ()
    file = find_tuned(Path(config.tune.start_from)) / TRAINED_WEIGHTS
    return tuple(tensor_names(file))


def _ask_trained(gate: Gate) -> EvalResult | None:
    """The model as it was trained: its logits, blind, and its answers."""
    gate.say("Loading the model as it was trained.")
    loaded = load_model(gate.config, device=gate.device, processor=gate.processor)
    try:
        model = load_tuned(loaded.model, gate.tuned).eval()
    except LensmithError as fault:
        for name in ("blind", "metric"):
            gate.settle(not_run(name, f"Not run: {fault}"))
        return None
    with gate.watch.running("agree"):
        gate.forms["as trained"] = read_logits(model, gate.encoder, gate.prompts)
    gate.say("Asking with right, wrong and grey pictures.")
    with gate.watch.running("blind"):
        gate.settle(check_blind(model, gate.material, gate.config.seed))
    with gate.watch.running("metric"):
        return _answers(gate, model)


def _answers(gate: Gate, model: Any) -> EvalResult | None:
    """Answers to held-out questions; None, with `metric` not run, where there are too few of them."""
    asked = gate.material.asked(gate.questions, gate.config.seed)
    if len(asked) < LEAST_QUESTIONS:
        why = gate.material.why if gate.material.source is None else f"{len(asked)} held-out questions with answers"
        gate.settle(
            not_run("metric", f"Not run: {why}, and {LEAST_QUESTIONS} are the fewest that can tell a difference.")
        )
        return None
    gate.say(f"Asking {len(asked)} held-out questions.")
    return evaluate_model(
        model, gate.encoder, gate.processor, asked, eval_settings(gate.config), progress=gate.progress
    )


def _ask_plain(gate: Gate) -> Logits:
    """The base in plain transformers; with the tuned weights in plain PEFT; and merged by PEFT."""
    _let_go()
    gate.say("Loading the base in plain transformers, and the tuned weights with plain PEFT.")
    with gate.watch.running("reload"):
        model = load_plain(gate.base, device=gate.device, dtype=gate.dtype)
    with gate.watch.running("agree"):
        base = read_logits(model, gate.encoder, gate.prompts)
    with gate.watch.running("reload"):
        model, check = reload_tuned(model, gate.tuned)
        gate.settle(check)
    if model is None:
        return base
    with gate.watch.running("agree"):
        gate.forms["adapter"] = read_logits(model, gate.encoder, gate.prompts)
        if (gate.tuned / ADAPTER_CONFIG).is_file():
            model = model.merge_and_unload()
            gate.forms["merged in memory"] = read_logits(model, gate.encoder, gate.prompts)
    return base


def _ask_merged(gate: Gate, folder: Path | None, base: Logits, adapter: EvalResult | None) -> None:
    """The merged model as it lies on disk: agree and metric."""
    if folder is None:
        for name in ("agree", "metric"):
            gate.settle(not_run(name, "Not run: there is no merged model."))
        return
    _let_go()
    gate.say("Loading the merged model from disk.")
    with gate.watch.running("agree"):
        model = load_plain(folder, device=gate.device, dtype=gate.dtype)
        gate.forms["reloaded"] = read_logits(model, gate.encoder, gate.prompts)
        check = _judge_logits(gate, base, folder)
        if check.ok is False and (inherited := _inherited(gate.config)):
            earlier = (
                f" This run went on from {gate.config.tune.start_from}, which had trained {len(inherited)} tensors itself; the "
                "merged model has them and the tuned folder alone does not, so ship the merged one."
            )
            check = replace(check, fix=check.fix + earlier)
        gate.settle(check)
    if adapter is not None:
        with gate.watch.running("metric"):
            merged = _answers(gate, model)
            assert merged is not None, "the adapter was asked the same questions"
            gate.settle(check_metric(adapter, merged))


def _judge_logits(gate: Gate, base: Logits, folder: Path) -> Check:
    """Like with like: after training on weights in few bits, only a merge into those weights equals the trained model."""
    forms, remark = dict(gate.forms), ""
    if _is_dequantised(folder):
        first, apart = "as trained", [form for form in ("adapter", "merged in memory") if form in forms]
    else:
        first, apart = "adapter", ["as trained"] if gate.few_bits else []
    if first not in forms:
        return not_run(
            "agree", "Not run: the tuned weights could not be loaded, so there is nothing to hold it against."
        )
    if apart and set(apart) <= set(forms):
        gap = distance(forms[apart[0]], forms[first])
        remark = f"; between the base in {BITS[gate.config.tune.method]} bits and in 16 bits lie {gap:.2g}"
    ordered = {first: forms[first]} | {form: logits for form, logits in forms.items() if form not in (first, *apart)}
    return check_agree(base, ordered, dtypes=(_stored_dtype(folder), gate.dtype), prompts=gate.origin, remark=remark)


def _is_dequantised(folder: Path) -> bool:
    """Whether the merged model was made from the base as 4-bit storage rounds it, as its export wrote down."""
    record = folder / RECORD
    return record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("into") == "nf4-dequantised"


def _stored_dtype(folder: Path) -> torch.dtype:
    """The coarsest floating type of a model folder's weights."""
    shards = FileShards(folder)
    found = {shards.get(name).dtype for name in shards.names()}
    return max((dtype for dtype in found if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)


def _let_go() -> None:
    """Give the memory of the model before back; models hold cycles, so that the count of references is not enough."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
