"""YAML and JSON of LLaMA-Factory, of `trl sft --config` and of ms-swift (args.json): one flat mapping each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lensmith.config.yaml12 import parse_yaml
from lensmith.convert.llamafactory import resolve_datasets
from lensmith.convert.nouns import Argument, Found, Task, Tool
from lensmith.errors import ConfigError

SIGNS: Mapping[Tool, tuple[str, ...]] = {
    "llama-factory": ("finetuning_type", "cutoff_len", "template", "dataset_dir", "lora_target", "freeze_vision_tower"),
    "ms-swift": ("tuner_type", "train_type", "rlhf_type", "split_dataset_ratio", "freeze_vit", "freeze_aligner"),
    "trl": (
        "dataset_name",
        "use_peft",
        "lora_target_modules",
        "max_completion_length",
        "num_generations",
        "reward_funcs",
    ),
}
"""Names that only one of the tools has; most of them found wins."""
STAGES = {"sft": "supervised fine-tuning"}


def read_settings_file(path: Path, text: str, tool: Tool | None = None) -> Found:
    """What a file of settings says.

    Raises:
        ConfigError: it is no mapping, holds no name of the three tools, or trains in a way that Lensmith has not.
    """
    document = parse_yaml(text, str(path))
    if not isinstance(document.tree, dict):
        raise ConfigError(
            f"{path}: holds no settings but a {type(document.tree).__name__}. Give the file that training reads."
        )
    tree: dict[str, Any] = document.tree
    tool = tool or _tool_of(path, tree)
    arguments = [
        Argument(name, value, f"line {document.lines.get((name,), 1)}")
        for name, value in tree.items()
        if value is not None
    ]
    if tool == "llama-factory":
        stage = tree.get("stage", "sft")
        if str(stage) not in STAGES:
            raise ConfigError(
                f"{path}: stage={stage}; of LLaMA-Factory's stages Lensmith has sft alone (and GRPO, task=grpo)."
            )
        return Found(tool, "sft", resolve_datasets(arguments, path.parent))
    task: Task = "grpo" if tree.get("rlhf_type") == "grpo" or "num_generations" in tree else "sft"
    if tree.get("rlhf_type", "grpo") != "grpo":
        raise ConfigError(f"{path}: rlhf_type={tree['rlhf_type']}; of ms-swift's kinds Lensmith has grpo alone.")
    return Found(tool, task, tuple(arguments))


def _tool_of(path: Path, tree: Mapping[str, Any]) -> Tool:
    counts: dict[Tool, int] = {tool: sum(name in tree for name in names) for tool, names in SIGNS.items()}
    best: Tool = max(counts, key=lambda tool: counts[tool])
    if not counts[best]:
        if {"data", "tune", "optim"} & set(tree):
            raise ConfigError(
                f"{path}: these are Lensmith's own settings already. Start them with: lensmith train {path}"
            )
        seen = ", ".join(list(tree)[:5])
        raise ConfigError(
            f"{path}: settings of no tool that is known (LLaMA-Factory, ms-swift, TRL); it holds {seen or 'nothing'}. "
            "Say which with --from, if it is one of them."
        )
    return best


# `trl sft` takes the fields of ScriptArguments, ModelConfig and SFTConfig side by side; trl 1.16.0.
FLAT: Mapping[str, str] = {
    "model_name_or_path": "load.pretrained_model_name_or_path",
    "dtype": "load.dtype",
    "torch_dtype": "load.torch_dtype",
    "attn_implementation": "load.attn_implementation",
    "model_revision": "load.revision",
    "dataset_name": "data.path",
    "dataset_config": "data.name",
    "dataset_train_split": "data.split",
    "dataset_streaming": "data.streaming",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_task_type": "lora.task_type",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "use_peft": "lora.",
    "load_in_4bit": "quant.load_in_4bit",
    "load_in_8bit": "quant.load_in_8bit",
    "bnb_4bit_quant_type": "quant.bnb_4bit_quant_type",
    "use_bnb_nested_quant": "quant.bnb_4bit_use_double_quant",
    "reward_funcs": "trainer.reward_funcs",
}
FLAT_DEFAULTS: Mapping[str, Any] = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
"""ModelConfig's, which are not LoraConfig's."""


def with_calls(found: Found) -> Found:
    """A TRL command or config in the names of the calls that it fills, as scripts have them."""
    given = {argument.name: argument for argument in found.arguments}
    peft = given.get("use_peft")
    arguments = [argument for argument in found.arguments if argument.name != "use_peft" or argument.value is True]
    if peft and peft.value is True:
        missing = [name for name in FLAT_DEFAULTS if name not in given]
        arguments += [Argument(name, FLAT_DEFAULTS[name], "their default") for name in missing]
    renamed = [
        replace(argument, name=FLAT.get(argument.name, f"config.{argument.name}"), shown=argument.name)
        for argument in arguments
    ]
    return replace(found, arguments=tuple(_listed(renamed)))


def _listed(arguments: Sequence[Argument]) -> list[Argument]:
    """all-linear is one word in TRL, and a list in its command line."""
    return [
        replace(one, value="all-linear") if one.name == "lora.target_modules" and one.value == ["all-linear"] else one
        for one in arguments
    ]
