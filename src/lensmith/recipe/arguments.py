"""SFTConfig and GRPOConfig: what TRL's and Unsloth's arguments amount to as settings of a RunConfig."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from lensmith.convert.meaning import server_address
from lensmith.errors import ConfigError
from lensmith.model.load import Loaded
from lensmith.recipe.keywords import Keyword, read_keywords
from lensmith.recipe.model import recompute_settings
from lensmith.recipe.names_training import GRPO, GRPO_RENAMED, SFT, TRAINING_RENAMED
from lensmith.recipe.session import Settings, Wanted, free_settings, pixels_to_tokens
from lensmith.recipe.speech import say_once
from lensmith.train.ranks import world_size

OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
MOST_WARMUP = 0.99
"""Share of the steps; a warm-up as long as the run would never reach the learning rate."""
ELSEWHERE = "docs/recipe.md lists what is understood; other arguments of TRL have no counterpart here, so remove it."


class Arguments:
    """What SFTConfig and GRPOConfig have in common: given values, and the defaults of home for the others."""

    call: ClassVar[str]
    known: ClassVar[Mapping[str, Keyword]]
    renamed: ClassVar[Mapping[str, str]]

    def __init__(self, output_dir: str | Path | None = None, **keywords: Any) -> None:
        """
        Raises:
            ConfigError: a keyword is unknown or cannot be honoured.
        """
        given = keywords if output_dir is None else {"output_dir": output_dir, **keywords}
        vars(self)["given"] = read_keywords(self.call, given, self.known, self.renamed, elsewhere=ELSEWHERE)

    def __getattr__(self, name: str) -> Any:
        today = self.renamed.get(name, name)
        if name.startswith("_") or today not in self.known:
            raise AttributeError(f"{self.call} has no {name}")
        return self.given.get(today, self.known[today].theirs)

    def __setattr__(self, name: str, value: Any) -> None:
        self.given.update(read_keywords(self.call, {name: value}, self.known, self.renamed, elsewhere=ELSEWHERE))

    def __repr__(self) -> str:
        return f"{self.call}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"

    def wanted(self, name: str, value: Any) -> Wanted:
        return Wanted(value, f"{self.call}({name}=)")

    @property
    def samples_per_step(self) -> int:
        """Samples, or with GRPO completions, of one optimizer step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size()


class SFTConfig(Arguments):
    """TRL's arguments of fine-tuning, as docs/recipe.md lists them."""

    call, known, renamed = "SFTConfig", SFT, TRAINING_RENAMED


class GRPOConfig(Arguments):
    """TRL's arguments of GRPO, as docs/recipe.md lists them."""

    call, known, renamed = "GRPOConfig", GRPO, GRPO_RENAMED

    @property
    def samples_per_step(self) -> int:
        asked, group = super().samples_per_step, self.num_generations
        filled = math.ceil(asked / group) * group
        if filled != asked:
            say_once(
                f"A step of {asked} completions is filled up to {filled}: whole groups of num_generations={group}."
            )
        return filled


def training_settings(args: Arguments, loaded: Loaded, *, num_rows: int, evaluates: bool) -> Settings:
    """The settings that the arguments amount to.

    Args:
        num_rows: of the training data, from which the number of steps follows.
        evaluates: whether there are rows to ask.

    Raises:
        ConfigError: a value has no counterpart.
    """
    samples, given = args.samples_per_step, args.given
    prompts = samples // args.num_generations if isinstance(args, GRPOConfig) else samples
    per_epoch = math.ceil(num_rows / prompts)
    total = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    settings: Settings = {
        "run": args.wanted("output_dir", str(args.output_dir)),
        "optim.effective_samples": args.wanted("per_device_train_batch_size", samples),
        "optim.learning_rate": args.wanted("learning_rate", args.learning_rate),
        "optim.weight_decay": args.wanted("weight_decay", args.weight_decay),
        "optim.max_grad_norm": args.wanted("max_grad_norm", args.max_grad_norm or None),
        "optim.schedule": args.wanted("lr_scheduler_type", _choice(args, "lr_scheduler_type", SCHEDULES)),
        "optim.warmup": args.wanted("warmup_steps", _share(args.warmup_steps, total)),
        "log.every_steps": args.wanted("logging_steps", args.logging_steps),
        "log.report_to": args.wanted("report_to", _loggers(args)),
    }
    if args.max_steps > 0:
        settings["optim.steps"] = args.wanted("max_steps", args.max_steps)
    else:
        settings["optim.epochs"] = args.wanted("num_train_epochs", args.num_train_epochs)
    if "seed" in given:
        settings["seed"] = args.wanted("seed", given["seed"])
    for setting in (
        _optimizer(args, loaded),
        _saving(args, total),
        _memory(args),
        _rows(args),
        _asking(args, per_epoch, evaluates),
    ):
        settings |= setting
    if isinstance(args, GRPOConfig):
        settings |= _grpo(args)
    for sentence in precision_remarks(args, loaded):
        say_once(sentence)
    return settings | free_settings(args.call, given.get("settings"))


def _choice(args: Arguments, name: str, choices: Mapping[str, str]) -> str:
    value = getattr(args, name)
    value = getattr(value, "value", value)  # transformers has enums for these
    if value not in choices:
        raise ConfigError(f"{args.call}: {name} is {value!r}, but must be one of {', '.join(choices)}.")
    return choices[value]


def _share(steps: float, total: int) -> float:
    """Of the steps: below 1 it is one already."""
    return steps if steps < 1 else min(MOST_WARMUP, steps / total)


def _loggers(args: Arguments) -> list[str]:
    value = args.report_to
    names = [value] if isinstance(value, str) else list(value or ())
    if "all" in names:
        raise ConfigError(
            f'{args.call}: report_to is "all"; name the loggers you mean: tensorboard, wandb, trackio, or "none".'
        )
    return [name for name in names if name != "none"]


def _optimizer(args: Arguments, loaded: Loaded) -> Settings:
    if "optim" not in args.given:
        return {}
    name = _choice(args, "optim", OPTIMIZERS)
    if name != "adamw" and loaded.device.type == "cpu":
        say_once(f"optim={args.optim}: there is no GPU here, so AdamW keeps its states in 32 bits.")
        name = "adamw"
    return {"optim.name": args.wanted("optim", name)}


def _saving(args: Arguments, total: int) -> Settings:
    settings: Settings = {}
    if args.save_total_limit is not None:
        settings["save.keep"] = args.wanted("save_total_limit", args.save_total_limit)
    strategy = _choice(args, "save_strategy", {name: name for name in ("steps", "epoch", "no")})
    if strategy == "no":
        settings["save.every_steps"] = args.wanted("save_strategy", total)
    elif strategy == "steps" and "save_steps" in args.given:
        every = args.save_steps if args.save_steps >= 1 else max(1, round(args.save_steps * total))
        settings["save.every_steps"] = args.wanted("save_steps", int(every))
    return settings


def _memory(args: Arguments) -> Settings:
    """The model says how much is recomputed; here only where it was asked otherwise."""
    if args.given.get("gradient_checkpointing", True):
        return {}
    settings = recompute_settings(args.call, False)
    return {path: args.wanted("gradient_checkpointing", wanted.value) for path, wanted in settings.items()}


def _rows(args: Arguments) -> Settings:
    settings: Settings = {}
    if args.given.get("max_length") is not None:
        settings["pack.tokens"] = args.wanted("max_length", args.max_length)
    if "dataloader_num_workers" in args.given:
        settings["data.workers"] = args.wanted("dataloader_num_workers", args.dataloader_num_workers)
    for name, path in (("max_pixels", "data.image.max_tokens"), ("min_pixels", "data.image.min_tokens")):
        if args.given.get(name) is not None:
            settings[path] = pixels_to_tokens(args.call, name, args.given[name])
    return settings


def _asking(args: Arguments, per_epoch: int, evaluates: bool) -> Settings:
    strategy = _choice(args, "eval_strategy", {name: name for name in ("no", "steps", "epoch")})
    if strategy == "no":
        return {}
    if not evaluates:
        raise ConfigError(
            f'{args.call}: eval_strategy is "{strategy}", but there is no eval_dataset to ask. Give one, or "no".'
        )
    every = per_epoch if strategy == "epoch" else args.eval_steps or args.logging_steps
    return {"eval.every_steps": args.wanted("eval_steps", every)}


def _scale(value: Any) -> Any:
    return {True: "group", False: "none"}.get(value, value) if isinstance(value, bool) else value


GRPO_SETTINGS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "max_completion_length": ("grpo.max_new_tokens", lambda value: value),
    "temperature": ("grpo.temperature", lambda value: value),
    "top_p": ("grpo.top_p", lambda value: None if value == 1 else value),
    "top_k": ("grpo.top_k", lambda value: None if value in (None, 0, -1) else value),
    "min_p": ("grpo.min_p", lambda value: value or None),
    "beta": ("grpo.beta", lambda value: value),
    "num_iterations": ("grpo.iterations", lambda value: value),
    "epsilon": ("grpo.epsilon", lambda value: value),
    "epsilon_high": ("grpo.epsilon_high", lambda value: value),
    "loss_type": ("grpo.loss", lambda value: value),
    "importance_sampling_level": ("grpo.importance", lambda value: value),
    "scale_rewards": ("grpo.scale_rewards", _scale),
    "mask_truncated_completions": ("grpo.mask_truncated", lambda value: value),
}
"""Keyword -> setting, and its value there. Only what was given: the others have Lensmith's defaults, which are TRL's."""


def _grpo(args: GRPOConfig) -> Settings:
    settings = {
        path: args.wanted(name, read(args.given[name]))
        for name, (path, read) in GRPO_SETTINGS.items()
        if name in args.given
    }
    return {
        "task": Wanted("grpo", "GRPOTrainer"),
        "grpo.group": args.wanted("num_generations", args.num_generations),
        **settings,
        **_vllm(args),
    }


BESIDE = ("vllm_gpu_memory_utilization",)
SERVED = ("vllm_server_base_url", "vllm_server_host", "vllm_server_port")
"""Keywords that speak of vLLM in this process, and of a server."""


def _vllm(args: GRPOConfig) -> Settings:
    """Only where vLLM is asked for; of the other keywords about it those that have a say in that mode."""
    mode = _choice(args, "vllm_mode", {name: name for name in ("colocate", "server")}) if args.use_vllm else None
    says = {None: (), "colocate": ("vllm_mode", *BESIDE), "server": ("vllm_mode", *SERVED)}[mode]
    if idle := [name for name in ("vllm_mode", *BESIDE, *SERVED) if name in args.given and name not in says]:
        why = "use_vllm is not True" if mode is None else f'vllm_mode is "{mode}"'
        say_once(f"{args.call}: without effect here: {', '.join(idle)} ({why}).")
    if mode is None:
        return {}
    settings: Settings = {
        "rollout.engine": args.wanted("use_vllm", "vllm"),
        "rollout.vllm_mode": args.wanted("vllm_mode", mode),
    }
    if mode == "server":
        address = args.vllm_server_base_url or server_address(args.vllm_server_host, args.vllm_server_port)
        settings["rollout.vllm_server"] = args.wanted("vllm_server_base_url", address)
    elif "vllm_gpu_memory_utilization" in args.given:
        share = args.vllm_gpu_memory_utilization
        settings["rollout.vllm_gpu_share"] = args.wanted("vllm_gpu_memory_utilization", share)
    return settings


def precision_remarks(args: Arguments, loaded: Loaded) -> list[str]:
    """bf16=True and fp16=True against the type that the model was loaded in."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if getattr(args, name) and loaded.dtype is not dtype:
            kept = str(loaded.dtype).removeprefix("torch.")
            why = "there is no GPU here" if loaded.device.type == "cpu" else "the model was loaded otherwise"
            return [f"{name}=True: {why}, so training computes in {kept}."]
    return []
