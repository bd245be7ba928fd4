"""A model card from what the run recorded: no figure in it that is not in the run folder, no path of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.config.tree import RunConfig
from lensmith.config.write import config_diff, write_value
from lensmith.errors import DataError
from lensmith.evals.predict import EvalResult, compare_results, read_predictions, score_predictions
from lensmith.model.load import local_folder
from lensmith.model.names import KNOWN_NAMES, TINY
from lensmith.rundir import STEP_NAME, RunDir
from lensmith.types import counted

QWEN_LICENCE = "apache-2.0"
"""Of the dense Qwen3-VL checkpoints, by their model cards, and of the embedded model."""
_PATHS = re.compile(r"(?<![\w:/])(?:[A-Za-z]:\\|/)[^\s\"',\]}]+")


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a run folder says of the weights that are exported."""

    run: RunDir
    config: RunConfig
    step: int | None
    """Optimizer steps behind the weights; None where the run recorded none."""
    before: EvalResult | None
    after: EvalResult | None

    @property
    def name(self) -> str:
        """What to call the model: the run folder's own name."""
        return self.run.path.resolve().name

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The metrics of the steps behind the weights."""
        return [stats for stats in self.run.read_metrics() if self.step is None or stats["step"] <= self.step]


def read_record(run: RunDir, tuned: Path) -> Recorded:
    """`tuned`: the folder the weights come from, which tells the step where it is a checkpoint's."""
    config = run.read_config()
    step = next((int(name[1]) for part in tuned.parts[::-1] if (name := STEP_NAME.fullmatch(part))), None)
    metrics = run.read_metrics()
    last = metrics[-1]["step"] if metrics else None
    asked = "after" if step in (None, last) else f"step-{step:06d}"
    return Recorded(
        run, config, last if step is None else step, _scores(run, config, "before"), _scores(run, config, asked)
    )


def _scores(run: RunDir, config: RunConfig, name: str) -> EvalResult | None:
    path = run.predictions_path(name)
    if not path.is_file():
        return None
    try:
        return score_predictions(read_predictions(path), config.eval)
    except DataError:  # an empty file: nothing was asked
        return None


def write_card(folder: Path, recorded: Recorded, *, library: str, use: str, notes: list[str]) -> None:
    """README.md in `folder`. `use`: Markdown that tells how to load what is in the folder."""
    text = "\n".join([*_front(recorded, library), *_body(recorded, notes), "## How to use it", "", use.strip(), ""])
    (folder / "README.md").write_text(text, encoding="utf-8")


def _front(recorded: Recorded, library: str) -> Iterator[str]:
    """The YAML that the Hub reads."""
    yield "---"
    if licence := base_licence(recorded.config.model):
        yield f"license: {licence}"
    if not Path(recorded.config.model).is_absolute():
        yield f"base_model: {recorded.config.model}"
    yield f"library_name: {library}"
    yield "pipeline_tag: image-text-to-text"
    yield "tags: [qwen3_vl, lensmith]"
    yield "---"
    yield ""


def base_licence(model: str) -> str | None:
    """The licence of the base by its name or its own card; None where neither tells."""
    if model in KNOWN_NAMES or model == TINY:
        return QWEN_LICENCE
    card = local_folder(model) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^license:\s*[\"']?([\w.-]+)", text, re.MULTILINE)
    return found[1] if found else None


def _body(recorded: Recorded, notes: list[str]) -> Iterator[str]:
    config, run = recorded.config, recorded.run
    yield f"# {recorded.name}"
    yield ""
    base = Path(config.model).name if Path(config.model).is_absolute() else config.model
    task = "supervised fine-tuning" if config.task == "sft" else "reinforcement learning from rewards (GRPO)"
    yield f"{base} after {task} with Lensmith, method `{config.tune.method}`."
    licence = base_licence(config.model)
    told = f"`{licence}`, and binds this model too" if licence else "not stated where it could be read: look it up"
    yield f"The base's licence is {told}."
    yield ""
    yield from (f"- {_without_paths(note)}" for note in notes)
    yield from [""] if notes else []
    yield "## Scores"
    yield ""
    yield from _scored(recorded)
    yield ""
    yield "## Training"
    yield ""
    yield from _trained(recorded)
    yield ""
    yield "Settings that differ from Lensmith's defaults:"
    yield ""
    yield "```yaml"
    yield from (f"{path}: {_without_paths(write_value(value))}" for path, value in config_diff(config).items())
    yield "```"
    yield ""
    versions = run.read_environment().get("versions", {})
    yield "Versions: " + ", ".join(f"{name} {versions[name]}" for name in versions if versions[name]) + "."
    yield ""


def _scored(recorded: Recorded) -> Iterator[str]:
    before, after = recorded.before, recorded.after
    if after is None:
        yield "The run asked no held-out questions of these weights, so there are no scores."
        return
    yield "| | held-out questions right, with 95 % interval |"
    yield "|---|---|"
    if before is not None:
        yield f"| base | {before.score} |"
    yield f"| this model | {after.score} |"
    yield ""
    yield f"{after.why[:1].upper()}{after.why[1:]}."
    if before is not None and len(before.predictions) == len(after.predictions):
        yield compare_results(before, after).sentence


def _trained(recorded: Recorded) -> Iterator[str]:
    steps, config = recorded.steps, recorded.config
    if not steps:
        yield "The run folder records no steps."
        return
    seconds, samples = sum(stats["step_s"] for stats in steps), sum(stats["samples"] for stats in steps)
    tokens = sum(stats.get("tokens", 0) for stats in steps)
    data = config.data.train
    names = [source.path for source in data] if isinstance(data, list) else [data] if data else []
    yield f"- Data: {', '.join(f'`{Path(name).name}`' for name in names) or 'not recorded'}"
    asked = f"; {counted(recorded.after.score.n, 'held-out question')}" if recorded.after else ""
    yield f"- {len(steps):,} steps, {samples:,} samples, {tokens:,} tokens{asked}"
    first, last = (f"{stats['loss']:.3f}" for stats in (steps[0], steps[-1]))
    yield f"- Loss of the first and the last step: {first}, {last}"
    gpus = recorded.run.read_environment().get("gpus", [])
    machine = ", ".join(gpu["name"] for gpu in gpus) if gpus else "a CPU"
    peak = max((stats["peak_gib"] for stats in steps), default=0)
    memory = f", {peak:.1f} GiB of GPU memory at most" if peak else ""
    yield f"- Cost: {seconds:,.0f} s of training on {machine}{memory}"


def _without_paths(text: str) -> str:
    """Absolute paths as their last part: a card is for others."""
    return _PATHS.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("/\\"))[-1], text)
