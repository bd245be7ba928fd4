"""The adapter as plain PEFT and vLLM load it: PEFT's own names, nothing in its configuration that speaks of Lensmith.

What vLLM does with it was read in vllm/lora/{lora_model,peft_helper}.py and vllm/model_executor/models/qwen3_vl.py: names
in the file decide; `base_model.model.model.language_model.` is mapped to its own modules; DoRA and modules_to_save are
refused; modules of the tower and the mergers are left out with a warning unless --enable-tower-connector-lora is given.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.errors import ModelError
from lensmith.export.base import copy_processor
from lensmith.export.card import read_record, write_card
from lensmith.export.changes import read_changes
from lensmith.export.whole import write_record, written_whole
from lensmith.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS, find_tuned
from lensmith.model.components import component_of
from lensmith.model.load import local_folder
from lensmith.model.names import TINY
from lensmith.rundir import RunDir

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes: MaxLoRARanks in vllm/config/lora.py."""
AUTO_CLASS = {
    "base_model_class": "Qwen3VLForConditionalGeneration",
    "parent_library": "transformers.models.qwen3_vl.modeling_qwen3_vl",
}
KEPT_FIELDS = (
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
)
"""Fields that every PEFT knows; an older one stops at a field it does not, even where its value is null."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An exported adapter, and what plain libraries can and cannot do with it."""

    folder: Path
    base: str
    tuned: Path
    rank: int
    tower: bool
    """Whether it adapts the image tower or the mergers."""
    servable: bool
    """Whether vLLM can serve it beside its base."""
    notes: tuple[str, ...]

    def sentences(self) -> list[str]:
        return [f"Wrote the adapter of {self.base}: rank {self.rank}.", *self.notes]

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "tuned": str(self.tuned),
            "rank": self.rank,
            "tower": self.tower,
            "servable": self.servable,
            "notes": list(self.notes),
        }


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that holds this rank; None where there is none."""
    return next((known for known in VLLM_RANKS if known >= rank), None)


def export_adapter(run: RunDir, tuned: Path, out: Path) -> Adapter:
    """The adapter of a run or checkpoint, whole in `out`.

    Raises:
        ModelError: the run trained weights themselves and has no adapter.
        RunError: `out` holds something else, or the disk is full.
    """
    source, config = find_tuned(tuned), run.read_config()
    if not (source / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{source}: holds {TRAINED_WEIGHTS} and no {ADAPTER_CONFIG}, because this run trained weights themselves. "
            "Export the whole model: --to merged."
        )
    changes = read_changes(source)
    settings = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    adapted = {component_of(name) for name, change in changes.items() if change.kind != "trained"}
    also_trained = sorted({component_of(name) for name, change in changes.items() if change.kind == "trained"})
    notes = _limits(settings, sorted(adapted - {"language"}), also_trained, config.model)
    adapter = Adapter(
        folder=out,
        base=config.model,
        tuned=source,
        rank=settings["r"],
        tower=adapted != {"language"},
        servable=not settings.get("use_dora") and not also_trained and vllm_rank(settings["r"]) is not None,
        notes=tuple(notes),
    )
    with written_whole(out) as folder:
        shutil.copyfile(source / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        kept = {key: settings[key] for key in KEPT_FIELDS if key in settings}
        kept |= {"target_modules": _targets(changes), "auto_mapping": AUTO_CLASS}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        if also_trained:
            shutil.copyfile(source / TRAINED_WEIGHTS, folder / TRAINED_WEIGHTS)
        for name in TOKENIZER_FILES:
            if (file := local_folder(config.model) / name).is_file():
                shutil.copyfile(file, folder / name)
        copy_processor(run, config, folder)
        use = _use(config.model, trained=bool(also_trained))
        write_card(folder, read_record(run, source), library="peft", use=use, notes=notes)
        write_record(folder, {"to": "adapter"} | adapter.to_json())
    return adapter


def _targets(changes: dict[str, Any]) -> list[str]:
    """Which modules PEFT wraps, without a regular expression, which older vLLM cannot take apart.

    Last names where only the decoder is adapted (nothing else is called so), else full ones: the tower has a `proj` that
    is a convolution.
    """
    modules = [name.removesuffix(".weight") for name, change in changes.items() if change.kind != "trained"]
    if all(component_of(module) == "language" for module in modules):
        return sorted({module.rpartition(".")[2] for module in modules})
    return sorted(modules)


def _limits(settings: dict[str, Any], towers: list[str], trained: list[str], base: str) -> list[str]:
    """What others cannot do with this adapter, each with the way out."""
    notes = []
    if trained:
        notes.append(
            f"{' and '.join(trained)} trained weights of their own, which PEFT and vLLM do not look for: they are in "
            f"{TRAINED_WEIGHTS}, and README.md shows how to load them. For vLLM export --to merged."
        )
    if settings.get("use_dora"):
        notes.append("This is a DoRA adapter, which vLLM does not load. For vLLM export --to merged.")
    if towers:
        notes.append(
            f"It adapts {' and '.join(towers)}. vLLM takes that part only with --enable-tower-connector-lora; without the "
            "flag, and in versions that have none, it leaves it out with no more than a warning. --to merged needs no flag."
        )
    if vllm_rank(settings["r"]) is None:
        notes.append(f"Its rank is {settings['r']}, and vLLM serves at most {VLLM_RANKS[-1]}. Export --to merged.")
    if base == TINY:
        notes.append(f"{TINY} is inside the lensmith package: plain libraries need its folder instead of that name.")
    elif Path(base).is_absolute():
        notes.append(
            f"Its base is named by its folder here, {base}; set base_model_name_or_path where it is elsewhere."
        )
    return notes


def _use(base: str, *, trained: bool) -> str:
    name = Path(base).name if Path(base).is_absolute() else base
    lines = [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'base = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto", device_map="auto")',
    ]
    if trained:
        lines += [
            "from safetensors.torch import load_file",
            f'_, extra = base.load_state_dict(load_file("{TRAINED_WEIGHTS}"), strict=False)',
            "assert not extra",
        ]
    lines += [
        'model = PeftModel.from_pretrained(base, ".")  # this folder',
        'processor = AutoProcessor.from_pretrained(".")  # with the image limits of training',
        "```",
    ]
    return "\n".join(lines)
