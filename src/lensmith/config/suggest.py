"""The setting somebody meant: near spellings, names at home elsewhere in the tree, and names from other tools."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from lensmith.config.schema import list_sections, list_settings

# Names that people bring along from transformers, TRL, PEFT, Unsloth, LLaMA-Factory and ms-swift.
FOREIGN: Mapping[str, str] = {
    "base_model": "model",
    "batch_size": "optim.effective_samples",
    "bf16": "precision",
    "cutoff_len": "pack.tokens",
    "dataloader_num_workers": "data.workers",
    "dataset": "data.train",
    "dataset_path": "data.train",
    "eval_dataset": "data.test",
    "evaluation": "eval",
    "eval_steps": "eval.every_steps",
    "finetune_attention_modules": "tune.attention",
    "finetune_language_layers": "tune.language",
    "finetune_mlp_modules": "tune.mlp",
    "finetune_vision_layers": "tune.vision",
    "fp16": "precision",
    "freeze_aligner": "tune.merger",
    "freeze_llm": "tune.language",
    "freeze_vision_tower": "tune.vision",
    "freeze_vit": "tune.vision",
    "gradient_accumulation_steps": "optim.effective_samples",
    "gradient_checkpointing": "memory.recompute",
    "image_folder": "data.image_root",
    "load_in_4bit": "tune.method",
    "logging_steps": "log.every_steps",
    "lora_alpha": "tune.alpha",
    "lora_dropout": "tune.dropout",
    "lora_r": "tune.rank",
    "lora_rank": "tune.rank",
    "lr": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "max_length": "pack.tokens",
    "max_pixels": "data.image.max_tokens",
    "max_seq_length": "pack.tokens",
    "max_steps": "optim.steps",
    "min_pixels": "data.image.min_tokens",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_epochs": "optim.epochs",
    "num_train_epochs": "optim.epochs",
    "num_workers": "data.workers",
    "optimizer": "optim.name",
    "output_dir": "run",
    "packing": "pack.tokens",
    "per_device_train_batch_size": "optim.effective_samples",
    "r": "tune.rank",
    "save_steps": "save.every_steps",
    "save_total_limit": "save.keep",
    "torch_dtype": "precision",
    "train_type": "tune.method",
    "use_dora": "tune.dora",
    "use_rslora": "tune.rslora",
    "val_size": "data.test",
    "training": "optim",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
}
ALSO: Mapping[str, str] = {
    "batch_size": " (samples per optimizer step; how many share a forward pass follows from pack.tokens)",
    "per_device_train_batch_size": " (samples per optimizer step; how many share a forward pass follows from pack.tokens)",
    "gradient_accumulation_steps": " (samples per optimizer step, over all packs)",
    "load_in_4bit": " (qlora is the one in 4 bits)",
    "max_pixels": " (1 token is 32 x 32 = 1024 pixels)",
    "min_pixels": " (1 token is 32 x 32 = 1024 pixels)",
    "max_length": " (the token budget of one pack; text is never cut)",
    "max_seq_length": " (the token budget of one pack; text is never cut)",
    "cutoff_len": " (the token budget of one pack; text is never cut)",
    "packing": " (packing is always on)",
    "warmup_steps": " (a share of the steps)",
}
NEAR = 0.75
"""difflib's ratio from which a spelling counts as near; at its default of 0.6 `rank` and `packing` already meet."""
MOST = 2
"""Names suggested at once; more is a list to read, which `lensmith config` prints better."""


def suggest_settings(path: str) -> str:
    """A question naming the settings that an unknown dotted path may mean, with a note; empty if none comes near."""
    leaf = path.rpartition(".")[2].replace("-", "_").lower()
    known = {setting.path: setting.leaf for setting in list_settings()}
    sections = {section: section.rpartition(".")[2] for section in list_sections() if section}
    places = [*known.items(), *sections.items()]
    found = [FOREIGN[leaf]] if leaf in FOREIGN else [place for place, name in places if name == leaf]
    found = found or difflib.get_close_matches(path, dict(places), n=1, cutoff=NEAR)
    near_leaves = difflib.get_close_matches(leaf, {name for _, name in places}, n=1, cutoff=NEAR)
    found = found or [place for place, name in places if name in near_leaves]
    found = [place for place in dict.fromkeys(found) if place != path][:MOST]
    return f"Did you mean {' or '.join(found)}?{ALSO.get(leaf, '')}" if found else ""


def suggest_choice(value: object, choices: Sequence[str]) -> str:
    """A question naming the choice nearest to a wrong one; empty if none comes near."""
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    return f"Did you mean {near[0]}?" if near else ""
