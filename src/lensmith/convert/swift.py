"""ms-swift's names: swift/arguments/ (sft_args.py, rlhf_args.py, tuner_args.py, base_args/), swift/trainers/arguments.py.

modelscope/ms-swift 3602360a5 of 2026-08-22, version 4.6.0.dev0; `train_type` is what versions before 4 call
`tuner_type`. Environment variables of the command stand here as `env.NAME`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lensmith.convert import meaning
from lensmith.convert.nouns import SKIP, Noted, Rule, Table, Task, Without
from lensmith.convert.training import (
    ADVICE,
    COMPLETIONS_NOTE,
    GRPO_ADVICE,
    LENGTH_NOTE,
    SAMPLES_NOTE,
    TOWER_RATE_NOTE,
    grpo_rules,
    training_rules,
)

VERSION = "ms-swift 4.6.0.dev0 (3602360a5, 2026-08-22)"
STEP = 16
"""Samples that gradient_accumulation_steps is chosen for where it is left open (swift/trainers/arguments.py)."""
UNSET = {
    "data.image.max_tokens": "No image limit is set there (IMAGE_MAX_TOKEN_NUM is 16384 unless set); ours is 1280 "
    "(data.image.max_tokens). Raise it where small print matters.",
    "data.test": "Nothing is held out there; Lensmith holds out 5 % of the rows by image and asks them before and after. "
    "To train on all of them: data.test=null.",
    "log.report_to": "ms-swift writes for TensorBoard unless told otherwise; here that is log.report_to=[tensorboard].",
}


def _kind(kind: Any, older: Any) -> str:
    return str(older if older is not None else kind)


def _method(kind: Any, older: Any, bits: Any, quantiser: Any) -> Any:
    named = _kind(kind, older)
    if named not in ("lora", "full"):
        return Without(
            f"Lensmith has lora, qlora, lora_8bit and full, and no {named}; run.yaml says lora as it stands."
        )
    if bits and quantiser not in ("bnb", None):
        return Without(f"Lensmith quantises with bitsandbytes, not {quantiser}: set tune.method=qlora.")
    return meaning.quantisation(bits == 4, bits == 8, full=named == "full")


def _rate(rate: Any, kind: Any, older: Any) -> float:
    return rate if rate is not None else 1e-5 if _kind(kind, older) == "full" else 1e-4


def _rank(value: Any, kind: Any, older: Any) -> Any:
    return SKIP if _kind(kind, older) == "full" else value


def _real(value: Any, kind: Any, older: Any) -> Any:
    return _rank(float(value), kind, older)


def _component(part: str, frozen: bool, target: Any, kind: Any, older: Any) -> Any:
    if frozen:
        return "frozen"
    return "trained" if _kind(kind, older) == "full" else meaning.component(target, part)


def _language(frozen: bool, target: Any, kind: Any, older: Any) -> Any:
    if frozen:
        return "frozen"
    return SKIP if _kind(kind, older) == "full" else meaning.language(target)


def _part(part: str, target: Any, kind: Any, older: Any) -> Any:
    return SKIP if _kind(kind, older) == "full" else meaning.reaches(target, part)


def _tower_rate(own: Any, rate: Any, frozen: bool, target: Any, kind: Any, older: Any) -> Any:
    if _component("vision", frozen, target, kind, older) == "frozen":
        return SKIP
    return own if own is not None else Noted(_rate(rate, kind, older), TOWER_RATE_NOTE)


def _samples(batch: int, accumulation: Any, processes: int) -> int:
    chosen = accumulation or max(1, math.ceil(STEP / batch / processes))
    return meaning.samples(batch, chosen, processes)


def _completions(batch: int, accumulation: Any, processes: int, group: int) -> Any:
    return meaning.completions(_samples(batch, accumulation, processes), 1, group)


def _tokens(argument: Any, area: Any, tokens: Any) -> Any:
    """IMAGE_MAX_TOKEN_NUM wins over MAX_PIXELS (compat_qwen_vl_utils); the argument resizes before either."""
    found = [one for one in (meaning.image_tokens(argument), tokens or meaning.image_tokens(area)) if one is not SKIP]
    return min(found) if found else SKIP


def _rows(value: Any, hub: Any = False) -> Any:
    """`owner/name:subset#count`, or files, several of them in a list."""
    listed = value if isinstance(value, list) else [value]
    places, notes, lost = [], [], []
    for one in listed:
        place, _, count = str(one).partition("#")
        name, _, subset = place.partition(":")
        if place.startswith(("hf::", "ms::")):
            name, _, subset = place[4:].partition(":")
        if count:
            lost.append(f"{count} rows of {name} there; Lensmith takes all: use weight, or a smaller file.")
        if subset:
            lost.append(f"The subset {subset} of {name} cannot be named here: save it to a file.")
        if "." not in name.rpartition("/")[2] and not hub and not place.startswith("hf::"):
            notes.append(f"{name} was ModelScope's; here it is looked for on the Hugging Face Hub.")
        places.append(name)
    settled = places[0] if len(places) == 1 else [{"path": place} for place in places]
    return Noted(settled, " ".join(notes), " ".join(lost)) if notes or lost else settled


def _test(value: Any, share: Any) -> Any:
    if value:
        found = _rows(value)
        place = found.value if isinstance(found, Noted) else found
        return found if isinstance(place, str) else Without("Lensmith asks one file: set data.test to it.")
    return Noted(share, "Held out by image, so that no picture is in both.") if share else None


def _long(strategy: Any) -> Any:
    if strategy == "delete":
        return "drop"
    return Without("Text is never cut: data.on_long=shrink gives pictures of a long row fewer tokens; error and drop.")


def _rewards(names: Any, weights: Any, length: Any, cache: Any, most: int, ngram: int, penalty: float) -> Any:
    """swift/rewards/orm.py -> docs/rewards.md."""
    listed = names if isinstance(names, list) else [names]
    known = {
        "accuracy": {"name": "math_boxed", "missing": 0.0, "wrong": 0.0},
        "format": {"name": "format", "shape": "think_answer"},
        "repetition": {"name": "repetition", "ngram": ngram, "penalty": penalty},
        "soft_overlong": {"name": "length", "max_tokens": length or most, "cache_tokens": cache},
    }
    notes = {
        "accuracy": "accuracy also reads <answer> tags and compares with the column solution: "
        "have answers in \\boxed{}, and add column: solution where rows name it so.",
        "repetition": "repetition counts n-grams of tokens, there of words.",
    }
    lost = [name for name in listed if name not in known]
    kept = []
    for name, weight in zip(listed, weights or [1.0] * len(listed), strict=True):
        if name in known:
            kept.append({**known[name], **({"weight": float(weight)} if weight != 1 else {})})
    told = [notes[name] for name in listed if name in notes]
    missing = (
        f"There is no reward {', '.join(map(str, lost))}: write it as a function, docs/rewards.md." if lost else ""
    )
    if not kept:
        return Without(f"{missing} Until then grpo.rewards is math_boxed.")
    return Noted(kept, " ".join(told), missing) if told or missing else kept


KIND = {"tuner_type": "lora", "train_type": None}
TARGET = {"target_modules": ["all-linear"]}
RULES = (
    Rule({"model": None}, "model", meaning.model_name, assume=False),
    Rule({"adapters": None}, "tune.start_from", lambda value: value[0] if isinstance(value, list) else value, assume=False),
    Rule({"dataset": None, "use_hf": False}, "data.train", _rows, assume=False, beside=1),
    Rule({"val_dataset": None, "split_dataset_ratio": 0.0}, "data.test", _test, assume=False),
    Rule({"max_pixels": None, "env.MAX_PIXELS": None, "env.IMAGE_MAX_TOKEN_NUM": None}, "data.image.max_tokens", _tokens,
         "One token is 32 x 32 pixels.", assume=False),
    Rule({"env.MIN_PIXELS": None, "env.IMAGE_MIN_TOKEN_NUM": None}, "data.image.min_tokens",
         lambda area, tokens: tokens or meaning.image_tokens(area), "One token is 32 x 32 pixels.", assume=False),
    Rule({"env.FPS": None}, "data.video.fps", float, assume=False),
    Rule({"env.FPS_MAX_FRAMES": None}, "data.video.max_frames", assume=False),
    Rule({"max_length": None}, "pack.tokens", note=LENGTH_NOTE, assume=False),
    Rule({"truncation_strategy": None}, "data.on_long", _long, assume=False),
    Rule({**KIND, "quant_bits": None, "quant_method": None}, "tune.method", _method),
    Rule({"lora_rank": 8, **KIND}, "tune.rank", _rank, beside=2),
    Rule({"lora_alpha": 32, **KIND}, "tune.alpha", _real,
         "The scale is alpha / rank, as there.", beside=2),
    Rule({"lora_dropout": 0.05, **KIND}, "tune.dropout", _real, beside=2),
    Rule({"use_rslora": False}, "tune.rslora"),
    Rule({"use_dora": False}, "tune.dora"),
    Rule({"freeze_llm": False, **TARGET, **KIND}, "tune.language", _language, beside=2),
    Rule({**TARGET, **KIND}, "tune.attention", partial(_part, "attention"), beside=2),
    Rule({**TARGET, **KIND}, "tune.mlp", partial(_part, "mlp"), beside=2),
    Rule({"freeze_vit": True, **TARGET, **KIND}, "tune.vision", partial(_component, "vision"),
         beside=3),
    Rule({"freeze_aligner": True, **TARGET, **KIND}, "tune.merger", partial(_component, "merger"),
         "Merger and deepstack mergers, as there.", beside=3),
    Rule({"vit_lr": None, "learning_rate": None, "freeze_vit": True, **TARGET, **KIND}, "optim.vision_learning_rate",
         _tower_rate, beside=4),
    Rule({"aligner_lr": None}, "optim.merger_learning_rate", assume=False),
    Rule({"torch_dtype": None}, "precision",
         lambda dtype: {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, SKIP), assume=False),
    Rule({"gradient_checkpointing": True}, "memory.recompute", meaning.recompute),
    Rule({"early_stop_interval": None}, "eval.patience", note="Counts rounds of held-out questions.", assume=False),
)  # fmt: skip
OWN_ADVICE = {
    **{name: Without("Not needed.", matters=False) for name in (
        "load_from_cache_file", "dataset_num_proc", "lazy_tokenize", "streaming", "model_type", "task_type", "add_version",
        "tuner_backend", "create_checkpoint_symlink", "check_model", "load_args", "device_map", "experts_impl",
        "vit_gradient_checkpointing", "use_logits_to_keep", "template_backend", "dataset_shuffle", "async_generate",
        "log_entropy", "offload_optimizer", "offload_model", "sleep_level", "packing_length", "packing_num_proc",
        "padding_side", "ignore_args_error", "train_dataloader_shuffle", "env.CUDA_VISIBLE_DEVICES",
        "env.PYTORCH_CUDA_ALLOC_CONF", "env.OMP_NUM_THREADS", "env.PYTORCH_ALLOC_CONF")},
    "rlhf_type": Without("task: sft and grpo are what Lensmith trains.", matters=False),
    "packing": Without("Samples are always packed, and never see each other.", matters=False),
    "padding_free": Without("Nothing is padded.", matters=False),
    "attn_impl": Without("Chosen by the machine; `lensmith env` says which.", matters=False),
    "template": Without("The checkpoint's own chat template.", matters=False),
    "system": Without("Put a system turn into the rows, or name its column: data.columns.system."),
    "loss_scale": Without("All answers of a conversation are learned, each token alike."),
    "strict": Without("data.on_bad_row=error is the default.", matters=False),
    "columns": Without("Name columns with data.columns."),
    "interleave_prob": Without("Give files weights in data.train: how often each row is seen per epoch."),
    "custom_dataset_info": Without("Set data.train to the files."),
    "external_plugins": Without("Write rewards as functions, docs/rewards.md."),
    "norm_bbox": Without("Say how boxes are written: data.boxes.convention, docs/boxes.md."),
    "modules_to_save": Without("Only components train: tune.language, vision and merger; never the head alone."),
    "target_regex": Without("Say with tune.language, attention, mlp, vision and merger what is tuned."),
    "init_weights": Without("Adapters start at zero change, PEFT's default."),
    "lora_bias": Without("Biases are never trained beside adapters.", matters=False),
    "lorap_lr_ratio": Without("Both halves of an adapter have one rate."),
    "router_aux_loss_coef": Without("Lensmith trains the dense Qwen3-VL models."),
    "sequence_parallel_size": Without("A sequence stays on one GPU."),
    "freeze_parameters": Without("Components move whole: tune.language, vision and merger."),
    "freeze_parameters_ratio": Without("Components move whole: tune.language, vision and merger."),
    "trainable_parameters": Without("Components move whole: tune.language, vision and merger."),
    "bnb_4bit_compute_dtype": Without("The run's precision.", matters=False),
    "bnb_4bit_quant_type": Without("qlora is NF4.", same=("nf4",)),
    "bnb_4bit_use_double_quant": Without("Decided by tune.method=qlora.", matters=False),
    "optimizer": Without("Lensmith has AdamW: optim.name; parts have rates of their own."),
    "use_galore": Without("For full training in little memory: tune.method=full and optim.in_backward=true."),
    "model_name": Without("Rows about the model's own name are rows like others.", matters=False),
    "model_author": Without("Rows about the model's own name are rows like others.", matters=False),
    "env.VIDEO_MAX_PIXELS": Without("An area per frame there; ours bounds the whole video: data.video.max_tokens."),
    "env.VIDEO_MAX_TOKEN_NUM": Without("Per frame there; ours bounds the whole video: data.video.max_tokens."),
    "env.ROOT_IMAGE_DIR": Without("Set data.image_root to it."),
}  # fmt: skip


def swift_table(task: Task) -> Table:
    common = {"learning_rate": None, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "logging_steps": 5,
              "eval_strategy": "steps", "per_device_train_batch_size": 1, "gradient_accumulation_steps": None}  # fmt: skip
    rules = [rule for rule in training_rules(**common) if rule.ours != "optim.learning_rate"]
    rules.append(Rule({"learning_rate": None, **KIND}, "optim.learning_rate", _rate, beside=2))
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": None}
    advice = {**ADVICE, **OWN_ADVICE}
    if task == "grpo":
        group = {**batch, "env.NPROC_PER_NODE": 1, "num_generations": 8}
        shaped = {"reward_funcs": None, "reward_weights": None, "soft_max_length": None, "soft_cache_length": None,
                  "max_completion_length": 512, "repetition_n_grams": 3, "repetition_max_penalty": -1.0}  # fmt: skip
        changed = {"beta": 0.04, "loss_type": "grpo", "temperature": 0.9, "top_k": -1}
        rules += [rule for rule in grpo_rules(**changed) if rule.ours not in ("grpo.mask_truncated", "grpo.min_p")]
        rules += [
            Rule(group, "optim.effective_samples", _completions, COMPLETIONS_NOTE, beside=1),
            Rule(shaped, "grpo.rewards", _rewards, assume=False),
            Rule({"overlong_filter": False}, "grpo.mask_truncated"),
        ]
        advice |= GRPO_ADVICE
    else:
        rules.append(Rule({**batch, "env.NPROC_PER_NODE": 1}, "optim.effective_samples", _samples, SAMPLES_NOTE))
    every = (*RULES, *rules)
    ruled = {name for rule in every for name in rule.names}
    return Table("ms-swift", VERSION, every, {name: told for name, told in advice.items() if name not in ruled}, UNSET)
