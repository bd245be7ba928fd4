"""TRL's SFTTrainer over packs: the loop, callbacks, loggers, mixed precision, DDP and resume are TRL's and transformers'.

One batch of the loader is one optimizer step (`StepPacks`): however many packs it takes, their losses are sums divided
once by the learned tokens of the whole step. What is overridden is pinned by tests/reference/test_trainer.py, which runs
the stock trainer beside this one in float64.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer import sft_trainer
from trl.trainer.sft_config import SFTConfig

from lensmith.data.loader import StepPacks
from lensmith.model.adapters import TUNED_FOLDER, kept_values, restore_tuned, save_tuned
from lensmith.rundir import RunDir
from lensmith.train.oom import MemoryGuard
from lensmith.train.ranks import sum_gradients
from lensmith.train.recover import GradientGuard
from lensmith.train.rounded import RoundedAdamW
from lensmith.types import Pack, StepStats

GIB = 2**30


class SFTTrainer(sft_trainer.SFTTrainer):
    """See the module. `groups` are the optimizer's parameter groups, each with its own `lr`."""

    def __init__(
        self,
        *,
        model: Any,
        args: SFTConfig,
        processor: Any,
        loader: DataLoader[StepPacks],
        groups: Sequence[dict[str, Any]],
        run: RunDir,
        guard: GradientGuard,
        memory: MemoryGuard,
        on_stats: Callable[[StepStats], None],
        callbacks: Sequence[TrainerCallback] = (),
        own_optimizer: RoundedAdamW | None = None,
    ) -> None:
        # TRL wants a Dataset and looks for images in its first row; ours are read by the loader, this one only counts.
        rows = Dataset.from_dict({"images": list(range(len(loader)))})
        with kept_values(model):
            super().__init__(
                model=model, args=args, train_dataset=rows, processing_class=processor, callbacks=list(callbacks)
            )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.loader, self.groups, self.run_dir = loader, groups, run
        self.guard, self.memory, self.on_stats = guard, memory, on_stats
        self.own_optimizer = own_optimizer
        self._meter = _Meter()

    @property
    def tuned(self) -> nn.Module:
        """The model without DDP's wrapper, with PEFT's."""
        return self.model  # type: ignore[return-value]

    # --- data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[StepPacks]:
        return self.loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[StepPacks], num_batches: int, device: torch.device
    ) -> tuple[list[StepPacks], None]:
        start = time.perf_counter()
        step = next(epoch_iterator)
        self._meter.begin(step, waited_s=time.perf_counter() - start)
        self.guard.wheres = tuple(where for pack in step.packs for where in pack.wheres)
        return [step], None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # --- one optimizer step -------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: StepPacks, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if not model.training:  # a walk over all modules, at every step
            model.train()
        total = self.memory.take_step(
            self.state.global_step + 1,
            inputs.packs,
            take_pack=functools.partial(self._take_pack, model, inputs.learned_tokens),
            drop_gradients=functools.partial(self.tuned.zero_grad, set_to_none=True),
        )
        sum_gradients(self.tuned.parameters())
        return total * self.accelerator.num_processes  # transformers logs the mean over processes

    def _take_pack(self, model: nn.Module, learned_tokens: int, pack: Pack) -> Tensor:
        """One pack forward and backward; returns its share of the step's loss."""
        with self.accelerator.no_sync(model):  # see lensmith.train.ranks
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, pack, num_items_in_batch=learned_tokens)
            self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss(  # type: ignore[override]  packs instead of a dict of tensors
        self, model: nn.Module, inputs: Pack, return_outputs: bool = False, num_items_in_batch: int = 1
    ) -> Tensor:
        return -model(pack=inputs).sum() / num_items_in_batch

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.own_optimizer
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class([dict(group) for group in self.groups], **settings)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        if self.own_optimizer is not None and self.own_optimizer.in_backward:
            norm = self.own_optimizer.grad_norm()
            self.guard.after_moving(norm, self.state.global_step + 1)
            return norm
        self.guard.before_clipping(self.tuned, self.state.global_step + 1)
        norm = super()._clip_grad_norm(model)
        self.guard.after_clipping(self.tuned, norm, self.state.global_step + 1, scaled=self.args.fp16)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            stats = self._meter.stats(logs, self.state.global_step)
            self.on_stats(stats)
            logs |= {"tokens_per_s": stats.tokens / stats.step_s, "data_wait_s": stats.data_wait_s}
        super().log(logs, start_time)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A whole checkpoint or none, under the names that transformers' resume looks for."""
        if self.args.should_save:
            step, keep = self.state.global_step, self.args.save_total_limit or 1
            with self.run_dir.save_checkpoint(step, keep) as folder:
                self.save_model(str(folder), _internal_call=True)
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None, "_save_checkpoint always says where"
        save_tuned(self.tuned, Path(output_dir) / TUNED_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_tuned(self.tuned, Path(resume_from_checkpoint))


class _Meter:
    """Counts what happened since the last logged step."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.samples = self.tokens = self.learned_tokens = 0
        self.waited_s, self.started = 0.0, time.perf_counter()

    def begin(self, step: StepPacks, *, waited_s: float) -> None:
        self.samples += step.samples
        self.tokens += sum(pack.num_tokens for pack in step.packs)
        self.learned_tokens += step.learned_tokens
        self.waited_s += waited_s

    def stats(self, logs: dict[str, float], step: int) -> StepStats:
        stats = StepStats(
            step=step,
            loss=float(logs["loss"]),
            grad_norm=float(logs.get("grad_norm", float("nan"))),
            learning_rate=float(logs["learning_rate"]),
            samples=self.samples,
            tokens=self.tokens,
            learned_tokens=self.learned_tokens,
            step_s=time.perf_counter() - self.started,
            data_wait_s=self.waited_s,
            peak_gib=torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0,
        )
        self._reset()
        return stats
