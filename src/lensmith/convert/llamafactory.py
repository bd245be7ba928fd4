"""LLaMA-Factory's names: hparams/model_args.py, data_args.py, finetuning_args.py and training_args.py.

hiyouga/LLaMA-Factory ff6d4d12e of 2026-08-18, version 0.9.6.dev0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lensmith.convert import meaning
from lensmith.convert.nouns import SKIP, Argument, Noted, Rule, Table, Task, Without
from lensmith.convert.training import (
    ADVICE,
    LENGTH_NOTE,
    TOWER_RATE_NOTE,
    sample_rules,
    training_rules,
)

VERSION = "LLaMA-Factory 0.9.6.dev0 (ff6d4d12e, 2026-08-18)"
UNSET = {
    "data.test": "Nothing is held out there; Lensmith holds out 5 % of the rows by image and asks them before and after. "
    "To train on all of them: data.test=null.",
}
RATE = 5e-5


def resolve_datasets(arguments: Sequence[Argument], folder: Path) -> tuple[Argument, ...]:
    """Names of `dataset` and `eval_dataset` as the files or hub names that dataset_info.json gives them, where it is there."""
    known = {argument.name: argument.value for argument in arguments}
    place = Path(str(known.get("dataset_dir") or "data"))
    tables = [root / place / "dataset_info.json" for root in (folder, Path.cwd())]
    table = next((path for path in tables if path.is_file()), None)
    if table is None:
        return tuple(arguments)
    try:
        registered = json.loads(table.read_text(encoding="utf-8"))
    except ValueError:
        registered = None
    if not isinstance(registered, dict):
        return tuple(arguments)
    resolved = []
    for argument in arguments:
        if argument.name in ("dataset", "eval_dataset") and isinstance(argument.value, str):
            places = [_place(registered.get(name.strip()), table.parent) for name in argument.value.split(",")]
            if all(places):
                shown = f"{argument} = {argument.value}, in {table.name}"
                resolved.append(Argument(argument.name, places, argument.where, shown))
                continue
        resolved.append(argument)
    return tuple(resolved)


def _place(entry: Any, folder: Path) -> str | None:
    if not isinstance(entry, dict):
        return None
    if hub := entry.get("hf_hub_url"):
        return f"{hub}:{entry['split']}" if entry.get("split") else str(hub)
    return str(folder / entry["file_name"]) if entry.get("file_name") else None


def _rows(value: Any) -> Any:
    if isinstance(value, list):
        return value[0] if len(value) == 1 else [{"path": path} for path in value]
    return Without(f"Names in dataset_info.json, which is not here: set data.train to the file_name of {value}.")


def _test(value: Any, share: Any) -> Any:
    if value:
        return (
            value[0]
            if isinstance(value, list) and len(value) == 1
            else Without(f"Set data.test to the file of {value}.")
        )
    if not share:
        return None
    if share < 1:
        return Noted(share, "Held out by image, so that no picture is in both.")
    return Without(f"Ours is a share, not a number of rows: set data.test to {share} / rows.")


def _method(kind: str, bits: Any, quantiser: str) -> Any:
    if kind not in ("lora", "full"):
        return Without(f"Lensmith has lora, qlora, lora_8bit and full, and no {kind}; run.yaml says lora as it stands.")
    if bits and quantiser not in ("bnb", "bitsandbytes"):
        return Without(f"Lensmith quantises with bitsandbytes, not {quantiser}: set tune.method=qlora.")
    return meaning.quantisation(bits == 4, bits == 8, full=kind == "full")


def _state(kind: str, frozen: bool) -> str:
    return "frozen" if frozen else "trained" if kind == "full" else "adapted"


def _names(target: Any) -> Any:
    names = [name.strip() for name in str(target).split(",")] if isinstance(target, str) else target
    return "all" if names == ["all"] else names


def _language(frozen: bool, target: Any, kind: str) -> Any:
    if kind == "full" or frozen:
        return "frozen" if frozen else SKIP
    return meaning.language(_names(target))


def _part(kind: str, target: Any, part: str) -> Any:
    return SKIP if kind == "full" else meaning.reaches(_names(target), part)


def _vision(frozen: bool, target: Any, kind: str) -> Any:
    if kind == "full" or frozen:
        return _state(kind, frozen)
    return meaning.component(_names(target), "vision")


def _merger(frozen: bool, tower: bool, target: Any, kind: str) -> Any:
    if kind != "full" and not frozen and tower and _names(target) == "all":
        # `all` lists the leaf names of what may move; those of the merger are named like the tower's, which may not.
        return Noted("frozen", "With a frozen tower, lora_target=all reaches no module of the projector there either.")
    if kind == "full" or frozen:
        return _state(kind, frozen)
    return meaning.component(_names(target), "merger")


def _tower_rate(rate: float, frozen: bool, target: Any, kind: str) -> Any:
    return SKIP if _vision(frozen, target, kind) == "frozen" else rate


def _start(folder: Any, fresh: bool) -> Any:
    if fresh:
        return Without("Merge the adapter first (`lensmith export`), then train a new one on the merged model.")
    return folder.split(",")[-1].strip() if isinstance(folder, str) else SKIP


RULES = (
    Rule({"model_name_or_path": None}, "model", meaning.model_name, assume=False),
    Rule({"dataset": None}, "data.train", _rows, assume=False),
    Rule({"eval_dataset": None, "val_size": 0.0}, "data.test", _test, assume=False),
    Rule({"media_dir": None}, "data.image_root", assume=False),
    Rule({"image_max_pixels": 768 * 768}, "data.image.max_tokens", meaning.image_tokens, "One token is 32 x 32 pixels."),
    Rule({"image_min_pixels": 32 * 32}, "data.image.min_tokens", meaning.image_tokens, "One token is 32 x 32 pixels.",
         assume=False),
    Rule({"video_fps": 2.0}, "data.video.fps", float),
    Rule({"video_maxlen": 128}, "data.video.max_frames"),
    Rule({"cutoff_len": 2048}, "pack.tokens", note=LENGTH_NOTE, assume=False),
    Rule({"finetuning_type": "lora", "quantization_bit": None, "quantization_method": "bnb"}, "tune.method", _method),
    Rule({"lora_rank": 8, "finetuning_type": "lora"}, "tune.rank", lambda rank, kind: SKIP if kind == "full" else rank,
         beside=1),
    Rule({"lora_alpha": None}, "tune.alpha", lambda alpha: float(alpha) if alpha else SKIP,
         "The scale is alpha / rank, as there."),
    Rule({"lora_dropout": 0.0}, "tune.dropout", float, assume=False),
    Rule({"use_rslora": False}, "tune.rslora"),
    Rule({"use_dora": False}, "tune.dora"),
    Rule({"freeze_language_model": False, "lora_target": "all", "finetuning_type": "lora"}, "tune.language", _language,
         beside=1),
    Rule({"lora_target": "all", "finetuning_type": "lora"}, "tune.attention",
         lambda target, kind: _part(kind, target, "attention"), beside=1),
    Rule({"lora_target": "all", "finetuning_type": "lora"}, "tune.mlp",
         lambda target, kind: _part(kind, target, "mlp"), beside=1),
    Rule({"freeze_vision_tower": True, "lora_target": "all", "finetuning_type": "lora"}, "tune.vision", _vision,
         "The deepstack mergers belong to tune.merger here, to the tower there.", beside=2),
    Rule({"freeze_multi_modal_projector": True, "freeze_vision_tower": True, "lora_target": "all",
          "finetuning_type": "lora"}, "tune.merger", _merger, beside=3),
    Rule({"learning_rate": RATE, "freeze_vision_tower": True, "lora_target": "all", "finetuning_type": "lora"},
         "optim.vision_learning_rate", _tower_rate, TOWER_RATE_NOTE, beside=3),
    Rule({"adapter_name_or_path": None, "create_new_adapter": False}, "tune.start_from", _start, assume=False),
    Rule({"disable_gradient_checkpointing": False, "use_unsloth_gc": False}, "memory.recompute",
         lambda off, _: meaning.recompute(not off)),
    Rule({"use_unsloth_gc": False}, "memory.offload", lambda on: "inputs" if on else SKIP),
    Rule({"pure_bf16": False}, "precision", lambda pure: "bf16" if pure else SKIP, assume=False),
    Rule({"early_stopping_steps": None}, "eval.patience", note="Counts rounds of held-out questions.", assume=False),
    *training_rules(learning_rate=RATE),
    *sample_rules(),
)  # fmt: skip
NOT_NEEDED = (
    "stage", "do_train", "template", "trust_remote_code", "use_fast_tokenizer", "low_cpu_mem_usage", "flash_attn",
    "preprocessing_num_workers", "preprocessing_batch_size", "overwrite_cache", "tokenized_path", "dataset_dir",
    "streaming", "buffer_size", "packing", "neat_packing", "plot_loss", "enable_liger_kernel", "use_unsloth",
    "upcast_layernorm", "upcast_lmhead_output", "ignore_pad_token_for_loss", "quantization_type", "double_quantization",
    "include_effective_tokens_per_second", "use_reentrant_gc", "print_param_status", "cache_dir", "use_kv_cache",
    "data_shared_file_system", "gradient_checkpointing", "infer_backend", "disable_shuffling",
)  # fmt: skip
SAID = {
    "stage": "`task`: sft and grpo are what Lensmith trains.",
    "template": "The checkpoint's own chat template.",
    "flash_attn": "Chosen by the machine; `lensmith env` says which.",
    "packing": "Samples are always packed, and never see each other.",
    "neat_packing": "Samples are always packed, and never see each other.",
    "streaming": "Rows are never read into memory.",
    "plot_loss": "The page of the run shows the curve.",
    "gradient_checkpointing": "disable_gradient_checkpointing decides there.",
}
OWN_ADVICE = {
    **{
        name: Without(SAID.get(name, "Not needed."), matters=False)
        for name in NOT_NEEDED
        if name != "disable_shuffling"
    },
    "disable_shuffling": Without("Rows are shuffled by the seed."),
    "max_samples": Without("Every row counts: make a smaller file, or weigh files in data.train."),
    "mix_strategy": Without("Give files weights in data.train."),
    "interleave_probs": Without("Give files weights in data.train: how often each row is seen per epoch."),
    "train_on_prompt": Without("Only answers are learned."),
    "mask_history": Without("All answers of a conversation are learned."),
    "default_system": Without("Put a system turn into the rows, or name its column: data.columns.system."),
    "enable_thinking": Without("data.reasoning says whether thoughts are learned."),
    "preserve_thinking": Without("data.reasoning says whether thoughts are learned."),
    "tool_format": Without("Tool calls are not trained."),
    "additional_target": Without("Only components train: tune.language, vision and merger; never the head alone."),
    "loraplus_lr_ratio": Without("Both halves of an adapter have one rate."),
    "pissa_init": Without("Adapters start at zero change, PEFT's default."),
    "use_galore": Without("For full training in little memory: tune.method=full and optim.in_backward=true."),
    "use_apollo": Without("For full training in little memory: tune.method=full and optim.in_backward=true."),
    "use_badam": Without("For full training in little memory: tune.method=full and optim.in_backward=true."),
    "use_muon": Without("Lensmith has AdamW: optim.name."),
    "use_adam_mini": Without("Lensmith has AdamW: optim.name."),
    "use_dft_loss": Without("The loss is plain cross-entropy over answer tokens."),
    "freeze_trainable_layers": Without("Components move whole: tune.language, vision and merger."),
    "freeze_trainable_modules": Without("Components move whole: tune.language, vision and merger."),
    "compute_accuracy": Without("Held-out rows are answered and scored: eval.metric."),
    "predict_with_generate": Without("Held-out rows are answered and scored: eval.metric.", matters=False),
    "video_max_pixels": Without("An area per frame there; ours bounds the whole video: data.video.max_tokens."),
    "video_min_pixels": Without("An area per frame there; the checkpoint's own minimum here."),
    "image_do_pan_and_scan": Without("Pictures are seen whole.", matters=False),
    "crop_to_patches": Without("Pictures are seen whole.", matters=False),
    "use_swanlab": Without("There is no logger swanlab; metrics.jsonl has every step."),
    "resize_vocab": Without("The vocabulary is the checkpoint's own."),
    "rope_scaling": Without("The checkpoint's own positions."),
    "hf_hub_token": Without("Log in with `hf auth login`; a token does not belong into a file."),
    "export_dir": Without("`lensmith export RUN --to merged`."),
    "moe_aux_loss_coef": Without("Lensmith trains the dense Qwen3-VL models."),
}


def llamafactory_table(_: Task) -> Table:
    ruled = {name for rule in RULES for name in rule.names}
    advice = {name: told for name, told in {**ADVICE, **OWN_ADVICE}.items() if name not in ruled}
    return Table("llama-factory", VERSION, RULES, advice, UNSET)
