"""Supervised fine-tuning from a config to a tuned model: the walk, one stage after the other.

rows -> samples -> scan -> steps -> model -> self-check -> TRL's loop -> tuned weights in the run folder
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig

from lensmith.config.tree import RunConfig
from lensmith.data.images import write_policy
from lensmith.data.loader import choose_workers, step_loader
from lensmith.data.video import write_video_policy
from lensmith.errors import Interrupted
from lensmith.model.adapters import TUNED_FOLDER, save_tuned
from lensmith.model.components import learning_rates, parameter_groups
from lensmith.model.names import TINY
from lensmith.model.stock import stock_logprob
from lensmith.rundir import naming_full_disk
from lensmith.train.loop import collecting_afterwards
from lensmith.train.measure import own_optimizer
from lensmith.train.oom import MemoryGuard
from lensmith.train.prepare import Prepared, Say, check_first_packs, prepare_run
from lensmith.train.ranks import rank, speaker
from lensmith.train.recover import GradientGuard, StopOnInterrupt, interruptible
from lensmith.train.rounds import During, Rounds
from lensmith.train.trainer import SFTTrainer
from lensmith.types import StepStats

if TYPE_CHECKING:
    from lensmith.train.progress import TrainProgress

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
"""Our names to transformers'."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to. `train_s` is the time of the steps alone: no loading, no evaluation."""

    model: nn.Module
    processor: Any
    steps: int
    samples: int
    """In the steps taken now: a resumed run counts from its checkpoint."""
    train_s: float
    loss: float
    """Nats per learned token in the last logged step."""
    run: Path

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.train_s if self.train_s else 0.0


def train_model(
    config: RunConfig, *, say: Say | None = None, progress: TrainProgress | None = None, during: During | None = None
) -> TrainResult:
    """Fine-tune as `config` says; resumes where its run folder holds a checkpoint.

    `during(model, step)` is called every `eval.every_steps` steps on the first process; its time is not training time, and
    the score that it returns may end the run (see `lensmith.train.rounds`).

    Raises LensmithError children for whatever the user can mend; `Interrupted` after Ctrl-C, with everything saved.
    """
    say = speaker(say)
    return train_prepared(prepare_run(config, say), say=say, progress=progress, during=during)


def train_prepared(
    prepared: Prepared, *, say: Say, progress: TrainProgress | None = None, during: During | None = None
) -> TrainResult:
    """The self-check, the steps and the final save of a prepared run; see `train_model`."""
    config, run, total = prepared.config, prepared.run, len(prepared.plan.steps)
    if prepared.checkpoint is None and config.pack.check_packs and config.engine == "lensmith":
        say(check_first_packs(prepared))
    losses: list[float] = []

    def on_stats(stats: StepStats) -> None:
        losses.append(stats.loss)
        if rank() == 0:
            run.append_metrics(stats)
            if progress is not None:
                progress.update(stats, total)

    stop, rounds = StopOnInterrupt(), Rounds(during, config, run, say)
    trainer = _build_trainer(prepared, say, on_stats, [stop, rounds])
    train_s = take_steps(prepared, trainer, stop, rounds, say)
    taken = rounds.ended_at or total
    if (features := prepared.loaded.model.features) is not None:
        say(features.sentence())
    return TrainResult(
        model=trainer.tuned,
        processor=prepared.loaded.processor,
        steps=taken,
        samples=sum(map(len, prepared.plan.steps[prepared.steps_done : taken])),
        train_s=train_s,
        loss=losses[-1] if losses else float("nan"),
        run=run.path,
    )


def take_steps(prepared: Prepared, trainer: Any, stop: StopOnInterrupt, rounds: Rounds, say: Say) -> float:
    """All steps that are left, then the final save; returns the seconds of training alone.

    Raises Interrupted after Ctrl-C, with everything saved.
    """
    run, total = prepared.run, len(prepared.plan.steps)
    start = time.perf_counter()
    with naming_full_disk(run.path), collecting_afterwards():
        if prepared.steps_done >= total:
            say(f"All {total} steps are done already.")
            trainer._load_from_checkpoint(str(prepared.checkpoint))
        elif rounds.is_over(prepared.steps_done):
            rounds.ended_at = prepared.steps_done
            say(
                f"This run ended after step {prepared.steps_done} already: no round of questions was better (eval.patience)."
            )
        else:
            with interruptible(stop, say):
                trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
        train_s = time.perf_counter() - start - rounds.spent_s
        if stop.asked and rounds.ended_at is None and trainer.state.global_step < total:
            raise Interrupted(
                f"{run.path}: stopped after step {trainer.state.global_step} of {total} and saved. "
                f"To go on: lensmith train {run.config_path}"
            )
        if rounds.ended_at is not None and rounds.best is not None:
            trainer._load_from_checkpoint(str(run.checkpoint_path(rounds.best.step)))
        if rank() == 0:
            _save_final(prepared, trainer.tuned)
    return train_s


def _build_trainer(
    prepared: Prepared, say: Say, on_stats: Callable[[StepStats], None], callbacks: list[TrainerCallback]
) -> SFTTrainer:
    config, loaded = prepared.config, prepared.loaded
    gpu = loaded.device.type == "cuda"
    return SFTTrainer(
        model=prepared.model,
        args=training_arguments(prepared),
        processor=loaded.processor,
        loader=step_loader(prepared.dataset, workers=choose_workers(config.data.workers, gpu=gpu), pin_memory=gpu),
        groups=parameter_groups(prepared.model, config.optim, config.tune.method),
        run=prepared.run,
        guard=GradientGuard(say),
        memory=MemoryGuard(
            loaded.model,
            prepared.run,
            say,
            budget_tokens=prepared.dataset.budget_tokens,
            in_backward=config.optim.in_backward,
            ours=config.engine == "lensmith",
        ),
        on_stats=on_stats,
        callbacks=callbacks,
        own_optimizer=own_optimizer(prepared.model, config),
        score=stock_logprob if config.engine == "unsloth" else None,
    )


def _save_final(prepared: Prepared, model: nn.Module) -> None:
    """Tuned weights, and a processor that resizes and takes frames as training did, so that serving sees the same pixels."""
    processor, folder = prepared.loaded.processor, prepared.run.path / TUNED_FOLDER
    write_policy(processor, prepared.encoder.min_tokens, prepared.encoder.max_tokens)
    if prepared.encoder.video is not None:
        write_video_policy(processor, prepared.encoder.video)
    save_tuned(model, folder)
    processor.save_pretrained(str(folder))


def training_arguments(prepared: Prepared) -> SFTConfig:
    """Our settings in transformers' words."""
    tune = prepared.config.tune
    return SFTConfig(
        **common_arguments(prepared),
        per_device_train_batch_size=1,
        max_length=None,  # text is never cut
        average_tokens_across_devices=False,  # our count is the whole step's already
        ddp_find_unused_parameters=tune.vision != "frozen" or tune.merger != "frozen",
    )


def common_arguments(prepared: Prepared) -> dict[str, Any]:
    """Arguments of transformers' TrainingArguments that every task sets the same way."""
    config, loaded, total = prepared.config, prepared.loaded, len(prepared.plan.steps)
    optim, gpu = config.optim, loaded.device.type == "cuda"
    name = optim.name or ("adamw_8bit" if gpu and loaded.name != TINY else "adamw")
    warmup_steps = round(optim.warmup * total)
    constant = "constant_with_warmup" if warmup_steps else "constant"
    if "tensorboard" in config.log.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(config.run / "tensorboard"))
    return {
        "output_dir": str(config.run),
        "max_steps": total,
        "gradient_accumulation_steps": 1,
        "learning_rate": learning_rates(optim, config.tune.method)["language"],
        "lr_scheduler_type": constant if optim.schedule == "constant" else optim.schedule,
        "warmup_steps": warmup_steps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm or float("inf"),
        "optim": OPTIMIZERS[name],
        "logging_steps": config.log.every_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": min(total, config.save.every_steps or prepared.plan.per_epoch),
        "save_total_limit": config.save.keep,
        "report_to": list(config.log.report_to) or "none",
        "run_name": config.run.name,
        "seed": config.seed,
        "use_cpu": not gpu,
        # Weights are in their final type already; autocast would only add casts. Unsloth counts on it for fp32 adapters.
        "bf16": config.engine == "unsloth" and loaded.dtype == torch.bfloat16,
        "fp16": loaded.dtype == torch.float16,
        "gradient_checkpointing": False,  # the engine does its own
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
