"""The commented run.yaml that `lensmith init` writes: the settings a first run thinks about, and no others."""

from __future__ import annotations

from pathlib import Path

from lensmith.config.schema import read_value
from lensmith.config.tree import RunConfig
from lensmith.config.write import render_yaml

FIRST_SETTINGS = (
    "model",
    "data.train",
    "data.test",
    "data.image.max_tokens",
    "tune.method",
    "tune.language",
    "tune.vision",
    "tune.rank",
    "optim.learning_rate",
    "optim.epochs",
    "optim.effective_samples",
    "eval.metric",
    "run",
)
NOTES = {
    "model": "The tiny one runs anywhere and only shows that all is well; for real work name a real one.",
}


def write_starter(data: str) -> str:
    """Text of a run.yaml for one data file; every value is a default except data.train and run."""
    defaults = RunConfig()
    values = {path: read_value(defaults, path) for path in FIRST_SETTINGS}
    values |= {"data.train": data, "run": str(Path("runs") / (Path(data).stem or "sft"))}
    head = (
        "# A fine-tuning run of Lensmith. Start it with:  lensmith train run.yaml\n"
        "# Change one setting for once:  lensmith train run.yaml tune.rank=32\n"
        "# Every other setting with its default:  lensmith config\n\n"
    )
    return head + render_yaml(values, notes=NOTES)
