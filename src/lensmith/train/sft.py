"""Supervised fine-tuning from a config to a tuned model: the walk, one stage after the other.

rows -> samples -> scan -> steps -> model -> self-check -> TRL's loop -> tuned weights in the run folder
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn
from transformers import TrainerCallback, TrainerControl
from trl.trainer.sft_config import SFTConfig

from lensmith.config.tree import RunConfig
from lensmith.data.encode import Encoder
from lensmith.data.images import write_policy
from lensmith.data.loader import StepDataset, StepPlan, choose_workers, plan_steps, step_loader
from lensmith.data.scan import hold_out, scan_source
from lensmith.data.source import open_source
from lensmith.errors import Interrupted, ModelError
from lensmith.model.adapters import TUNED_FOLDER, check_tune, prepare_trainable, save_tuned
from lensmith.model.components import census_table, learning_rates, parameter_groups, take_census
from lensmith.model.load import Loaded, load_model
from lensmith.model.versions import check_versions, environment
from lensmith.rundir import RunDir, checkpoint_step, naming_full_disk
from lensmith.train.recover import GradientGuard, StopOnInterrupt, interruptible
from lensmith.train.selfcheck import check_packs
from lensmith.train.trainer import SFTTrainer
from lensmith.types import StepStats

if TYPE_CHECKING:
    from lensmith.train.progress import TrainProgress

PACK_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Tokens per pack where the config leaves it open. On a GPU large matrix products; on a CPU what stays near its cache."""

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
"""Our names to transformers'."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to. `train_s` is the time of the steps alone: no loading, no evaluation."""

    model: nn.Module
    processor: Any
    steps: int
    samples: int
    train_s: float
    loss: float
    """Nats per learned token in the last step."""
    run: Path

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.train_s if self.train_s else 0.0


def train_model(
    config: RunConfig,
    *,
    say: Callable[[Any], None] | None = None,
    progress: TrainProgress | None = None,
    during: Callable[[Any, int], None] | None = None,
) -> TrainResult:
    """Fine-tune as `config` says; resumes where its run folder holds a checkpoint.

    `during(model, step)` is called every `eval.every_steps` steps on the first process; its time is not training time.

    Raises LensmithError children for whatever the user can mend; `Interrupted` after Ctrl-C, with everything saved.
    """
    say = _speaker(say)
    check_versions()
    check_tune(config.tune)
    _refuse_data_parallel()
    run = RunDir(config.run)
    resume = _open_run(run, config, say)
    loaded = load_model(config, device=_local_device())
    for sentence in loaded.sentences:
        say(sentence)
    share_prefix = _shares_prefix(config, say)
    plan, dataset = prepare_data(config, loaded, share_prefix=share_prefix, say=say)
    model = prepare_trainable(loaded.model, config.tune, seed=config.seed)
    say(census_table(take_census(model)))
    if resume is None and config.pack.check_packs:
        say(_check_first_packs(model, dataset, config, share_prefix))
    with naming_full_disk(run.path):
        return _run_steps(config, run, loaded, model, plan, dataset, resume, say, progress, during)


# --- before the first step ----------------------------------------------------------------------------------------------


def prepare_data(
    config: RunConfig, loaded: Loaded, *, share_prefix: bool, say: Callable[[str], None]
) -> tuple[StepPlan, StepDataset]:
    """Read every row once, decide which train in which step, and say so."""
    encoder = Encoder.from_processor(loaded.processor, config.data.image)
    source = open_source(config.data, encoder, which="train")
    for sentence in source.sentences:
        say(sentence)
    budget = config.pack.tokens or PACK_TOKENS[loaded.device.type]
    scan = scan_source(
        source,
        budget_tokens=budget,
        on_long=config.data.on_long,
        on_bad_row=config.data.on_bad_row,
        seed=config.seed,
    )
    for sentence in scan.sentences():
        say(sentence)
    if isinstance(config.data.test, float):
        scan, held_out = hold_out(scan, config.data.test, config.seed)
        say(f"Held out {len(held_out.rows)} samples by image; {len(scan.rows)} train.")
    world = _world()
    plan = plan_steps(
        scan,
        effective_samples=config.optim.effective_samples,
        seed=config.seed,
        epochs=config.optim.epochs,
        steps=config.optim.steps,
        share_prefix=share_prefix,
        world=world,
    )
    dataset = StepDataset(
        scan,
        plan,
        encoder.geometry,
        image_token_id=loaded.model.config.image_token_id,
        budget_tokens=budget,
        share_prefix=share_prefix,
        together=config.pack.together,
        rank=_rank(),
        world=world,
    )
    say(
        f"{len(plan.steps)} steps of {config.optim.effective_samples} samples, {plan.per_epoch} an epoch, in packs of at "
        f"most {budget} tokens; the first step is {len(dataset.members(0))} packs."
    )
    return plan, dataset


def _shares_prefix(config: RunConfig, say: Callable[[str], None]) -> bool:
    if config.pack.share_prefix and config.tune.dropout:
        say(
            f"Prefix sharing is off because tune.dropout is {config.tune.dropout:g}: questions about one image would get "
            "one dropout mask for its tokens instead of one each. Set tune.dropout=0 to have it back."
        )
        return False
    return config.pack.share_prefix


def _check_first_packs(model: nn.Module, dataset: StepDataset, config: RunConfig, share_prefix: bool) -> str:
    wanted = itertools.islice(_first_packs(dataset), config.pack.check_packs)
    checked = check_packs(
        model,
        [[dataset.encoded(sample) for sample in members] for members in wanted],
        dataset.geometry,
        image_token_id=dataset.image_token_id,
        share_prefix=share_prefix,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return checked.sentence()


def _first_packs(dataset: StepDataset) -> Iterator[Int[np.ndarray, " samples"]]:
    """Samples of each pack, from the first step on."""
    for step in range(len(dataset)):
        yield from dataset.members(step)


def _open_run(run: RunDir, config: RunConfig, say: Callable[[str], None]) -> Path | None:
    """Start or reopen the run folder; returns the checkpoint to go on from."""
    if run.exists:
        for sentence in run.check_same(config):
            say(sentence)
    checkpoint = run.latest_checkpoint()
    if _rank() == 0:
        run.start(config, environment())
        run.truncate_metrics(checkpoint_step(checkpoint) if checkpoint else 0)
    say(f"Going on from {checkpoint}." if checkpoint else f"Run folder: {run.path}.")
    return checkpoint


# --- the steps ----------------------------------------------------------------------------------------------------------


def _run_steps(
    config: RunConfig,
    run: RunDir,
    loaded: Loaded,
    model: Any,
    plan: StepPlan,
    dataset: StepDataset,
    resume: Path | None,
    say: Callable[[str], None],
    progress: TrainProgress | None,
    during: Callable[[Any, int], None] | None,
) -> TrainResult:
    total, last = len(plan.steps), {"loss": float("nan")}

    def on_stats(stats: StepStats) -> None:
        last["loss"] = stats.loss
        if _rank() == 0:
            run.append_metrics(stats)
        if progress is not None and _rank() == 0:
            progress.update(stats, total)

    loaded.model.recompute = config.memory.recompute
    gpu = loaded.device.type == "cuda"
    workers = choose_workers(config.data.workers, gpu=gpu)
    stop, pause = StopOnInterrupt(), Pause(during if _rank() == 0 else None, config.eval.every_steps)
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(config, plan, loaded),
        processor=loaded.processor,
        loader=step_loader(dataset, workers=workers, pin_memory=gpu),
        groups=parameter_groups(model, config.optim, config.tune.method),
        run=run,
        guard=GradientGuard(say),
        on_stats=on_stats,
        callbacks=[stop, pause],
    )
    done = checkpoint_step(resume) if resume else 0
    start = time.perf_counter()
    if done >= total:
        say(f"All {total} steps are done already.")
        trainer._load_from_checkpoint(str(resume))
    else:
        with interruptible(stop, say):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    train_s = time.perf_counter() - start - pause.spent_s
    if stop.asked and trainer.state.global_step < total:
        raise Interrupted(
            f"{run.path}: stopped after step {trainer.state.global_step} of {total} and saved. "
            f"To go on: lensmith train {run.config_path}"
        )
    if _rank() == 0:
        _save_final(run, trainer.tuned, loaded, config)
    return TrainResult(
        model=trainer.tuned,
        processor=loaded.processor,
        steps=total,
        samples=sum(map(len, plan.steps[done:])),
        train_s=train_s,
        loss=last["loss"],
        run=run.path,
    )


def _save_final(run: RunDir, model: Any, loaded: Loaded, config: RunConfig) -> None:
    """Tuned weights, and a processor with the image policy that training used, so that serving sees the same pixels."""
    encoder = Encoder.from_processor(loaded.processor, config.data.image)
    write_policy(loaded.processor, encoder.min_tokens, encoder.max_tokens)
    save_tuned(model, run.path / TUNED_FOLDER)
    loaded.processor.save_pretrained(str(run.path / TUNED_FOLDER))


def training_arguments(config: RunConfig, plan: StepPlan, loaded: Loaded) -> SFTConfig:
    """Our settings in transformers' words."""
    optim, total, gpu = config.optim, len(plan.steps), loaded.device.type == "cuda"
    name = optim.name or ("adamw_8bit" if gpu and loaded.name != "lensmith/tiny" else "adamw")
    warmup_steps = round(optim.warmup * total)
    constant = "constant_with_warmup" if warmup_steps else "constant"
    if "tensorboard" in config.log.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(config.run / "tensorboard"))
    return SFTConfig(
        output_dir=str(config.run),
        max_steps=total,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=learning_rates(optim, config.tune.method)["language"],
        lr_scheduler_type=constant if optim.schedule == "constant" else optim.schedule,
        warmup_steps=warmup_steps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm or float("inf"),
        optim="adamw_torch_fused" if gpu and name == "adamw" else OPTIMIZERS[name],
        logging_steps=config.log.every_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=min(total, config.save.every_steps or plan.per_epoch),
        save_total_limit=config.save.keep,
        report_to=list(config.log.report_to) or "none",
        run_name=config.run.name,
        seed=config.seed,
        use_cpu=not gpu,
        bf16=False,  # weights are in their final type already; autocast would only add casts
        fp16=loaded.dtype == torch.float16,
        gradient_checkpointing=False,  # the engine does its own
        max_length=None,  # text is never cut
        remove_unused_columns=False,
        disable_tqdm=True,
        average_tokens_across_devices=False,  # our count is the whole step's already
        ddp_find_unused_parameters=config.tune.vision != "frozen" or config.tune.merger != "frozen",
    )


class Pause(TrainerCallback):
    """Calls `during(model, step)` every so many steps, and keeps the time that takes."""

    def __init__(self, during: Callable[[Any, int], None] | None, every_steps: int | None) -> None:
        self.during, self.every_steps, self.spent_s = during, every_steps, 0.0

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, model: Any = None, **_: Any) -> None:
        last = state.global_step == state.max_steps  # the evaluation after training asks then
        if self.during and self.every_steps and state.global_step % self.every_steps == 0 and not last:
            start = time.perf_counter()
            self.during(model, state.global_step)
            self.spent_s += time.perf_counter() - start


# --- processes ----------------------------------------------------------------------------------------------------------


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _speaker(say: Callable[[Any], None] | None) -> Callable[[Any], None]:
    """One process speaks for all."""
    return say if say is not None and _rank() == 0 else lambda _: None


def _refuse_data_parallel() -> None:
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise ModelError(
            f"{torch.cuda.device_count()} GPUs are visible to one process, which transformers would train with "
            "nn.DataParallel; packs cannot be scattered like that. Use all of them with `torchrun --nproc-per-node="
            f"{torch.cuda.device_count()} -m lensmith train ...`, or one with CUDA_VISIBLE_DEVICES=0."
        )
