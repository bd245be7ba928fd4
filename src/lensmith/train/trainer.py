"""TRL's SFTTrainer over packs: the loop, callbacks, loggers, mixed precision, DDP and resume are TRL's and transformers'.

One batch of the loader is one optimizer step (`StepPacks`): however many packs it takes, their losses are sums divided
once by the learned tokens of the whole step. What is overridden is pinned by tests/reference/test_trainer.py, which runs
the stock trainer beside this one in float64.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl.trainer import sft_trainer
from trl.trainer.sft_config import SFTConfig

from lensmith.data.loader import StepPacks
from lensmith.model.adapters import kept_values
from lensmith.rundir import RunDir
from lensmith.train.loop import GIB, RunFolderLoop
from lensmith.train.oom import MemoryGuard
from lensmith.train.ranks import sum_gradients
from lensmith.train.recover import GradientGuard
from lensmith.train.rounded import RoundedAdamW
from lensmith.types import Pack, StepStats


class SFTTrainer(RunFolderLoop, sft_trainer.SFTTrainer):
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
        score: Callable[[Any, Pack], Tensor] | None = None,
    ) -> None:
        """`score`: what sums up to the log-probability of a pack's learned tokens, where the model takes no packs."""
        # TRL wants a Dataset and looks for images in its first row; ours are read by the loader, this one only counts.
        rows = Dataset.from_dict({"images": list(range(len(loader)))})
        with kept_values(model):
            super().__init__(
                model=model, args=args, train_dataset=rows, processing_class=processor, callbacks=list(callbacks)
            )
        self._settle(groups=groups, run=run, guard=guard, memory=memory, own_optimizer=own_optimizer)
        self.loader, self.on_stats = loader, on_stats
        self._score = score or (lambda model, pack: model(pack=pack))
        self._meter = _Meter()

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
        return -self._score(model, inputs).sum() / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            stats = self._meter.stats(logs, self.state.global_step)
            self.on_stats(stats)
            logs |= {"tokens_per_s": stats.tokens / stats.step_s, "data_wait_s": stats.data_wait_s}
        if self.tells_loggers(logs):
            super().log(logs, start_time)


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
