"""Rules for the arguments that TRL, Unsloth, LLaMA-Factory and ms-swift take over from transformers and from GRPOConfig.

Names and defaults: transformers 5.23 TrainingArguments and trl 1.16 GRPOConfig, as installed; a tool's own defaults are
given where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lensmith.convert import meaning
from lensmith.convert.nouns import Noted, Reference, Rule, Without

TRAINING_DEFAULTS: Mapping[str, Any] = {
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": None,
    "fp16": None,
    "gradient_checkpointing": True,
    "seed": 42,
    "save_steps": 500,
    "save_strategy": "steps",
    "save_total_limit": None,
    "logging_steps": 500,
    "report_to": "none",
    "eval_steps": None,
    "eval_strategy": "no",
    "dataloader_num_workers": 0,
    "output_dir": None,
}
ADVICE: Mapping[str, Without] = {
    "adam_beta1": Without("AdamW's betas are 0.9 and 0.999, PyTorch's own.", same=(0.9,)),
    "adam_beta2": Without("AdamW's betas are 0.9 and 0.999, PyTorch's own.", same=(0.999,)),
    "adam_epsilon": Without("AdamW's epsilon is 1e-8, PyTorch's own.", same=(1e-8,)),
    "lr_scheduler_kwargs": Without("A schedule has no further settings: optim.schedule and optim.warmup."),
    "neftune_noise_alpha": Without("There is no noise on embeddings."),
    "label_smoothing_factor": Without("The loss is plain cross-entropy over answer tokens."),
    "torch_compile": Without("Kernels are chosen by the machine; `lensmith env` says which.", matters=False),
    "use_liger_kernel": Without("Fused kernels are used wherever they can be.", matters=False),
    "tf32": Without("Set by torch's defaults."),
    "gradient_checkpointing_kwargs": Without("Recompute is never reentrant.", matters=False),
    "per_device_eval_batch_size": Without("Held-out questions are answered in batches of eval.batch.", matters=False),
    "eval_accumulation_steps": Without("Held-out rows are answered, not scored by their loss.", matters=False),
    "logging_strategy": Without("metrics.jsonl has every step.", matters=False),
    "logging_first_step": Without("metrics.jsonl has every step.", matters=False),
    "logging_dir": Without("All of a run lies in its run folder.", matters=False),
    "run_name": Without("The run folder is the name: run.", matters=False),
    "load_best_model_at_end": Without("With eval.every_steps the best checkpoint is kept and named."),
    "metric_for_best_model": Without("The best checkpoint is the one with the best eval.metric."),
    "greater_is_better": Without("Each eval.metric knows which way is better.", matters=False),
    "save_only_model": Without("A checkpoint always holds what going on needs."),
    "save_safetensors": Without("Weights are always safetensors.", matters=False),
    "overwrite_output_dir": Without("An existing run folder is resumed, never overwritten."),
    "resume_from_checkpoint": Without("`lensmith train` on an existing run folder goes on from its newest checkpoint."),
    "push_to_hub": Without("`lensmith export RUN --to adapter --push OWNER/NAME` when the run is over."),
    "hub_model_id": Without("`lensmith export RUN --to adapter --push OWNER/NAME` when the run is over."),
    "hub_token": Without("Log in with `hf auth login`; a token does not belong into a file."),
    "remove_unused_columns": Without("Columns are never removed.", matters=False),
    "group_by_length": Without("Rows are packed by their length; none is padded.", matters=False),
    "train_sampling_strategy": Without("Rows are shuffled by the seed and packed.", matters=False),
    "data_seed": Without("One seed draws everything."),
    "dataloader_pin_memory": Without("Decided by the machine.", matters=False),
    "dataloader_persistent_workers": Without("Workers stay for the whole run.", matters=False),
    "dataloader_prefetch_factor": Without("Decided by the loader.", matters=False),
    "dataloader_drop_last": Without("Every row is seen once per epoch."),
    "ddp_timeout": Without("Set it with accelerate or torchrun."),
    "ddp_find_unused_parameters": Without("Not needed.", matters=False),
    "ddp_backend": Without("Set by torchrun and the machine.", matters=False),
    "deepspeed": Without("`torchrun -m lensmith train run.yaml` uses DDP; to need less memory, `lensmith plan` says what."),
    "fsdp": Without("`torchrun -m lensmith train run.yaml` uses DDP; to need less memory, `lensmith plan` says what."),
    "fsdp_config": Without("`torchrun -m lensmith train run.yaml` uses DDP; to need less memory, `lensmith plan` says what."),
    "do_train": Without("`lensmith train` trains.", matters=False),
    "do_eval": Without("Held-out rows are asked before and after: data.test.", matters=False),
    "do_predict": Without("`lensmith eval RUN` asks a finished run."),
    "auto_find_batch_size": Without("A pack that is too large for the GPU is cut by itself.", matters=False),
    "average_tokens_across_devices": Without("The loss is always divided by the tokens of the whole step.", matters=False),
    "torch_empty_cache_steps": Without("Not needed.", matters=False),
    "include_num_input_tokens_seen": Without("metrics.jsonl has the tokens of every step.", matters=False),
}  # fmt: skip
GRPO_ADVICE: Mapping[str, Without] = {
    "max_prompt_length": Without("Prompts are never cut; data.on_long says what happens to one that is too long."),
    "generation_batch_size": Without("All completions of a step are made for that step: optim.effective_samples."),
    "steps_per_generation": Without("Several steps on the same completions are grpo.iterations."),
    "repetition_penalty": Without("Sampling has none; the reward `repetition` judges it instead."),
    "generation_kwargs": Without("See grpo.temperature, top_p, top_k and min_p."),
    "vllm_tensor_parallel_size": Without("Beside the training vLLM is on one GPU; a server takes what it is started with.",
                                         same=(1, None)),
    "vllm_max_model_length": Without("Follows from the longest row and grpo.max_new_tokens.", matters=False),
    "vllm_enable_sleep_mode": Without("vLLM stays awake, in rollout.vllm_gpu_share of the GPU.", matters=False),
    "delta": Without("Ratios are clipped by grpo.epsilon and grpo.epsilon_high alone."),
    "log_completions": Without("completions.html in the run folder shows them; rollout.show_every_steps.", matters=False),
    "num_completions_to_print": Without("completions.html in the run folder shows them.", matters=False),
    "top_entropy_quantile": Without("Every token of a completion is learned from."),
    "sync_ref_model": Without("The reference is the model before training."),
    "disable_dropout": Without("Dropout is tune.dropout alone.", matters=False),
    "shuffle_dataset": Without("Rows are shuffled by the seed.", matters=False),
    "importance_sampling_correction": Without("Rollout and training share their weights.", matters=False),
}  # fmt: skip

SAMPLES_NOTE = "Samples per optimizer step, all GPUs together; how many share a forward pass follows from pack.tokens."
COMPLETIONS_NOTE = "Completions per optimizer step, all GPUs together."
TOWER_RATE_NOTE = "There the tower learns at the common rate; left open, ours would be a tenth of it."
LENGTH_NOTE = "The most tokens of one forward pass, so of one row too. Text is never cut: data.on_long decides."


def named(prefix: str, defaults: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Names with a prefix -> their defaults."""
    return {prefix + name: defaults[name] for name in names}


def training_rules(prefix: str = "", **changed: Any) -> tuple[Rule, ...]:
    """For what is called TrainingArguments, with the defaults that a tool changes."""
    known = {**TRAINING_DEFAULTS, **changed}

    def one(
        ours: str, *names: str, translate: Any = None, note: str = "", assume: bool = True, beside: int = 0
    ) -> Rule:
        return Rule(named(prefix, known, *names), ours, translate or (lambda value: value), note, assume, beside)

    return (
        one("optim.epochs", "num_train_epochs", "max_steps", translate=meaning.epochs, beside=1),
        one("optim.steps", "max_steps", translate=meaning.steps, assume=False),
        one("optim.learning_rate", "learning_rate"),
        one("optim.schedule", "lr_scheduler_type", translate=meaning.schedule),
        one("optim.warmup", "warmup_ratio", "warmup_steps", "max_steps", translate=meaning.warmup, beside=1),
        one("optim.name", "optim", translate=meaning.optimizer),
        one("optim.weight_decay", "weight_decay"),
        one("optim.max_grad_norm", "max_grad_norm", translate=meaning.clip),
        one("precision", "bf16", "fp16", translate=meaning.precision, assume=False),
        one("seed", "seed", note="Draws other numbers than there.", assume=False),
        one("save.every_steps", "save_steps", "save_strategy", translate=meaning.save_steps, assume=False),
        one("save.keep", "save_total_limit", note="The best checkpoint stays besides.", assume=False),
        one("log.every_steps", "logging_steps", "report_to", translate=meaning.log_steps, assume=False, beside=1),
        one("log.report_to", "report_to", translate=meaning.loggers, assume=False),
        one("eval.every_steps", "eval_steps", "eval_strategy", translate=meaning.eval_steps,
            note="Held-out rows are answered and scored, not only their loss.", assume=False),
        one("data.workers", "dataloader_num_workers", assume=False),
        one("run", "output_dir", note="An existing folder is resumed.", assume=False),
    )  # fmt: skip


def sample_rules(prefix: str = "", **changed: Any) -> tuple[Rule, ...]:
    """optim.effective_samples of fine-tuning."""
    known = {**TRAINING_DEFAULTS, **changed}
    names = named(prefix, known, "per_device_train_batch_size", "gradient_accumulation_steps")
    return (Rule(names, "optim.effective_samples", meaning.samples, SAMPLES_NOTE),)


def grpo_rules(prefix: str = "", **changed: Any) -> tuple[Rule, ...]:
    """For GRPOConfig, without the batch and the rewards."""
    known = {
        "num_generations": 8, "max_completion_length": 512, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None,
        "beta": 0.0, "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": None, "num_iterations": 1,
        "scale_rewards": "group", "importance_sampling_level": "token", "mask_truncated_completions": False, **changed,
    }  # fmt: skip

    def one(ours: str, name: str, translate: Any = None, note: str = "") -> Rule:
        return Rule({prefix + name: known[name]}, ours, translate or (lambda value: value), note)

    return (
        one("grpo.group", "num_generations"),
        one("grpo.max_new_tokens", "max_completion_length"),
        one("grpo.temperature", "temperature"),
        one("grpo.top_p", "top_p", meaning.open_share),
        one("grpo.top_k", "top_k", meaning.open_count),
        one("grpo.min_p", "min_p"),
        one("grpo.loss", "loss_type"),
        one("grpo.importance", "importance_sampling_level"),
        one("grpo.scale_rewards", "scale_rewards", scale_of),
        one("grpo.epsilon", "epsilon"),
        one("grpo.epsilon_high", "epsilon_high"),
        one("grpo.beta", "beta", note="The reference is the model as the run found it."),
        one("grpo.iterations", "num_iterations"),
        one("grpo.mask_truncated", "mask_truncated_completions"),
        *vllm_rules(prefix),
    )


def vllm_rules(prefix: str = "") -> tuple[Rule, ...]:
    """What writes the completions; only what is written there, because defaults of tools differ."""
    use, mode = {prefix + "use_vllm": False}, {prefix + "vllm_mode": "colocate"}
    share = {prefix + "vllm_gpu_memory_utilization": 0.3}
    server = {
        prefix + "vllm_server_base_url": None,
        prefix + "vllm_server_host": "0.0.0.0",
        prefix + "vllm_server_port": 8000,
    }
    return (
        Rule(use, "rollout.engine", meaning.rollout_engine, assume=False),
        Rule(mode | use, "rollout.vllm_mode", meaning.vllm_mode, assume=False, beside=1),
        Rule(share | mode | use, "rollout.vllm_gpu_share", meaning.vllm_share, assume=False, beside=2),
        Rule(server | mode | use, "rollout.vllm_server", meaning.vllm_server, assume=False, beside=2),
    )


def completion_rules(prefix: str = "", translate: Any = meaning.completions, **changed: Any) -> tuple[Rule, ...]:
    """optim.effective_samples of GRPO, where TRL's batch counts completions as well."""
    known = {**TRAINING_DEFAULTS, "num_generations": 8, **changed}
    names = named(prefix, known, "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    return (Rule(names, "optim.effective_samples", translate, COMPLETIONS_NOTE, beside=1),)


def scale_of(value: Any) -> Any:
    """True and False are what TRL had before it had words."""
    return {True: "group", False: "none"}.get(value, value)


def own_rewards(functions: Any, weights: Sequence[float] | None) -> Any:
    """TRL's reward functions, which take and return what ours do, as functions of a file of their own."""
    listed = functions if isinstance(functions, list) else [functions]
    if not all(isinstance(one, Reference) for one in listed):
        return Without(
            "A reward model: Lensmith's rewards are functions. Set grpo.rewards; docs/rewards.md lists them."
        )
    places = [f"rewards.py:{one.name.rpartition('.')[2]}" for one in listed]
    entries: list[Any] = list(places)
    if weights:
        entries = [{"name": place, "weight": weight} for place, weight in zip(places, weights, strict=True)]
    moved = [f"{one.name} ({one.where})" for one in listed if one.where]
    fetched = [one.name for one in listed if not one.where]
    told = f"Copy {', '.join(moved)} with what they need into rewards.py. " if moved else ""
    told += f"Import {', '.join(fetched)} in rewards.py. " if fetched else ""
    return Noted(entries, told + "They are called as TRL calls them; never run the script itself as a reward file.")
