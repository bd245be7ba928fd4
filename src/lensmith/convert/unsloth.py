"""Unsloth's names: FastVisionModel, its collator, and what it changes of TRL's defaults.

unslothai/unsloth 015bdef0d9 of 2026-08-22: unsloth/models/loader.py, vision.py (get_peft_model) and rl.py (defaults of
the patched configs); unsloth_zoo 2026.8.13 vision_utils.py (the collator).
"""

from __future__ import annotations

from typing import Any

from lensmith.convert import meaning
from lensmith.convert.nouns import SKIP, Noted, Rule, Table, Task, Without
from lensmith.convert.training import (
    ADVICE,
    GRPO_ADVICE,
    LENGTH_NOTE,
    TOWER_RATE_NOTE,
    completion_rules,
    grpo_rules,
    own_rewards,
    sample_rules,
    training_rules,
)
from lensmith.convert.trl import (
    CONFIG_ADVICE,
    DATA_ADVICE,
    DATA_RULES,
    LORA_ADVICE,
    OTHER_ADVICE,
    SFT_ADVICE,
    WIRING,
    first_length,
    lora_rules,
)

VERSION = "unsloth 015bdef0d9 (2026-08-22), unsloth_zoo 2026.8.13"
RATE = 5e-5
GRPO_PICTURES = (
    "Pictures that the script resizes itself are not resized here: data.image.max_tokens (1280 tokens of 32 x 32 pixels) "
    "bounds them, and they keep their shape."
)
OLDER = Without("An older place for max_seq_length: set pack.tokens.")
UNSET = {
    "data.image.max_tokens": "Unsloth's collator reduces pictures to 512 pixels unless told otherwise (resize='min'); "
    "Lensmith keeps up to 1280 tokens of 32 x 32 pixels (data.image.max_tokens).",
    "data.test": "Nothing is held out there; Lensmith holds out 5 % of the rows by image and asks them before and after. "
    "To train on all of them: data.test=null.",
}


def _method(four: bool, eight: bool, full: bool) -> Any:
    found = meaning.quantisation(four and not eight, eight, full=full)
    if found == "qlora":
        return Noted("qlora", "The decoder in 4 bits; the image tower stays in 16 unless tune.quantise_vision=true.")
    return found


def _language(moves: bool, attention: bool, mlp: bool, target: Any, full: bool) -> Any:
    if full:
        return SKIP
    found = meaning.language("all" if target is None else target)
    return "frozen" if not (moves and (attention or mlp)) else found


def _part(moves: bool, target: Any, part: str) -> Any:
    if not moves:
        return False
    return True if target is None else meaning.reaches(target, part)


def _vision(moves: bool, target: Any, full: bool) -> Any:
    if full:
        return "trained"
    found = meaning.component("all" if target is None else target, "vision")
    return "frozen" if not moves else found


def _tower_rate(rate: float, moves: bool, target: Any, full: bool) -> Any:
    return SKIP if _vision(moves, target, full) == "frozen" else rate


def _resize(value: Any) -> Any:
    if value == "min":
        return Noted(1280, UNSET["data.image.max_tokens"])
    if value == "max":
        return SKIP
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    return Noted(
        meaning.image_tokens(sides[0] * sides[1]), "An area: pictures keep their shape. One token is 32 x 32 pixels."
    )


def completions(batch: int, accumulation: int, group: int) -> Any:
    """Unsloth raises the batch to a group where a step does not hold whole ones (rl.py, num_generations)."""
    if (batch * accumulation) % group:
        return Noted(group * accumulation, f"Unsloth too makes the batch of {batch} a group of {group}.")
    return batch * accumulation


def _recompute(loading: Any, adapting: Any, training: Any) -> Any:
    return meaning.recompute(adapting and loading and training is not False)


def _offload(loading: Any, adapting: Any) -> Any:
    return meaning.offload("unsloth" if "unsloth" in (loading, adapting) and loading and adapting else None)


LOAD_RULES = (
    Rule({"load.model_name": "unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit"}, "model", meaning.model_name, assume=False),
    Rule({"load.load_in_4bit": True, "load.load_in_8bit": False, "load.full_finetuning": False}, "tune.method", _method),
    Rule({"load.dtype": None}, "precision",
         lambda dtype: {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}.get(
             getattr(dtype, "name", str(dtype)), SKIP), assume=False),
    Rule({"load.use_gradient_checkpointing": "unsloth", "lora.use_gradient_checkpointing": "unsloth",
          "config.gradient_checkpointing": True}, "memory.recompute", _recompute),
    Rule({"load.use_gradient_checkpointing": "unsloth", "lora.use_gradient_checkpointing": "unsloth"},
         "memory.offload", _offload, "Layer inputs wait in host memory, as there.", assume=False),
)  # fmt: skip
PEFT_RULES = (
    *lora_rules(rank=16, alpha=16),
    Rule({"lora.finetune_language_layers": True, "lora.finetune_attention_modules": True,
          "lora.finetune_mlp_modules": True, "lora.target_modules": None, "load.full_finetuning": False},
         "tune.language", _language, beside=4),
    Rule({"lora.finetune_attention_modules": True, "lora.target_modules": None}, "tune.attention",
         lambda moves, target: _part(moves, target, "attention"), "Of the decoder; there of the tower too."),
    Rule({"lora.finetune_mlp_modules": True, "lora.target_modules": None}, "tune.mlp",
         lambda moves, target: _part(moves, target, "mlp"), "Of the decoder; there of the tower too."),
    Rule({"lora.finetune_vision_layers": True, "lora.target_modules": None, "load.full_finetuning": False},
         "tune.vision", _vision, "The mergers stay frozen, as there: tune.merger.", beside=2),
    Rule({"config.learning_rate": RATE, "lora.finetune_vision_layers": True, "lora.target_modules": None,
          "load.full_finetuning": False}, "optim.vision_learning_rate", _tower_rate, TOWER_RATE_NOTE, beside=3),
    Rule({"lora.random_state": 3407}, "seed", note="Draws other numbers than there.", assume=False),
)  # fmt: skip
LENGTH_RULE = Rule(
    {"load.max_seq_length": 2048, "config.max_seq_length": None, "config.max_length": None},
    "pack.tokens",
    lambda loaded, older, newer: first_length(loaded if loaded != 2048 else None, older, newer, loaded),
    LENGTH_NOTE,
    assume=False,
)
UNSLOTH_ADVICE = {
    **{f"load.{name}": Without("Not needed.", matters=False) for name in (
        "device_map", "fix_tokenizer", "fullgraph", "trust_remote_code", "use_exact_model_name", "auto_model",
        "return_logits", "disable_log_stats", "unsloth_force_compile", "random_state", "unsloth_tiled_mlp",
        "load_in_16bit", "resize_model_vocab")},
    "load.token": Without("Log in with `hf auth login`; a token does not belong into a file."),
    "load.revision": Without("Give a local folder to hold a model at a revision."),
    "load.rope_scaling": Without("The checkpoint's own positions."),
    "load.fast_inference": Without("The built-in engine shares a prompt and its pictures; rollout.engine=vllm is vLLM."),
    "load.gpu_memory_utilization": Without("Goes with rollout.engine=vllm: rollout.vllm_gpu_share.", matters=False),
    "load.float8_kv_cache": Without("Keys and values are in 16 bits.", matters=False),
    "load.max_lora_rank": Without("tune.rank is the only rank.", matters=False),
    "load.load_in_fp8": Without("Weights are in 16, 8 or 4 bits: tune.method."),
    "load.float32_mixed_precision": Without("Adapters are fp32 in any case.", matters=False),
    "load.offload_embedding": Without("Set memory.embedding=host where memory is short."),
    "load.qat_scheme": Without("There is no quantisation-aware training."),
    "load.text_only": Without("Lensmith trains the whole model, with pictures."),
    "lora.finetune_last_n_layers": Without("Adapters go into all layers of a component."),
    "lora.max_seq_length": Without("Without effect in Unsloth as well; pack.tokens.", matters=False),
    "lora.temporary_location": Without("Not needed.", matters=False),
    "lora.qat_scheme": Without("There is no quantisation-aware training."),
    "collator.max_seq_length": Without("Text is never cut: pack.tokens and data.on_long."),
    "collator.train_on_responses_only": Without("Only answers are learned.", matters=False),
    "collator.completion_only_loss": Without("Only answers are learned.", matters=False),
    "collator.instruction_part": Without("Only answers are learned; the chat template says where they are.", matters=False),
    "collator.response_part": Without("Only answers are learned; the chat template says where they are.", matters=False),
    "collator.last_response_only": Without("All answers of a conversation are learned."),
    "collator.formatting_func": Without("Name the columns with data.columns, or write rows with `messages`."),
    "collator.force_match": Without("Not needed.", matters=False),
    "collator.num_proc": Without("See data.workers.", matters=False),
    "collator.pad_to_multiple_of": Without("Nothing is padded.", matters=False),
    "collator.snap_to_patch_size": Without("Sides are always whole tokens.", matters=False),
    "collator.resize_dimension": Without("data.image.max_tokens bounds the area; pictures keep their shape."),
}  # fmt: skip


def unsloth_table(task: Task) -> Table:
    changed = {"learning_rate": RATE, "optim": "adamw_8bit", "weight_decay": 0.001, "warmup_steps": 0.1,
               "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # fmt: skip
    unruled = {"gradient_checkpointing"}
    common = (*LOAD_RULES, *PEFT_RULES, *DATA_RULES, LENGTH_RULE, *training_rules("config.", **changed),
              Rule({"collator.resize": "min"}, "data.image.max_tokens", _resize, assume=False))  # fmt: skip
    advice = {f"config.{name}": told for name, told in ADVICE.items() if name not in unruled} | CONFIG_ADVICE
    advice |= {name: told for name, told in OTHER_ADVICE.items() if name.startswith(("trainer.", "responses."))}
    advice |= LORA_ADVICE | DATA_ADVICE | UNSLOTH_ADVICE | {"trainer.model": WIRING, "trainer.max_seq_length": OLDER}
    if task == "sft":
        return Table("unsloth", VERSION, (*common, *sample_rules("config.", **changed)), advice | SFT_ADVICE, UNSET)
    rules = (
        *common, *completion_rules("config.", completions, **changed),
        *grpo_rules("config.", beta=0.001, loss_type="bnpo"),
        Rule({"trainer.reward_funcs": None, "config.reward_weights": None}, "grpo.rewards", own_rewards, assume=False),
    )  # fmt: skip
    unset = UNSET | {"data.image.max_tokens": GRPO_PICTURES}
    return Table(
        "unsloth", VERSION, rules, advice | {f"config.{name}": told for name, told in GRPO_ADVICE.items()}, unset
    )
