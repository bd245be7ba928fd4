"""What our trainers have in common: parameter groups, clipping under guard, and checkpoints in the run folder.

A mixin in front of one of TRL's trainers; each method does one job and is pinned by the reference tests of both trainers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME

from lensmith.model.adapters import TUNED_FOLDER, restore_tuned, save_tuned
from lensmith.rundir import RunDir
from lensmith.train.oom import MemoryGuard
from lensmith.train.recover import GradientGuard
from lensmith.train.rounded import RoundedAdamW

_Base: Any = object
"""Whatever trainer of TRL's stands behind the mixin."""

GIB = 2**30


@contextmanager
def collecting_afterwards() -> Iterator[None]:
    """Objects frozen by `RunFolderLoop._settle` can be collected again afterwards; at its end Python would call them leaks."""
    try:
        yield
    finally:
        gc.unfreeze()


class _EveryStep(TrainerCallback):
    """Has `log` called after each step, which transformers would do every `logging_steps`."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_log = True


class RunFolderLoop(_Base):
    """See the module. `groups` are the optimizer's parameter groups, each with its own `lr`."""

    groups: Sequence[dict[str, Any]]
    run_dir: RunDir
    guard: GradientGuard
    memory: MemoryGuard
    own_optimizer: RoundedAdamW | None

    def _settle(
        self,
        *,
        groups: Sequence[dict[str, Any]],
        run: RunDir,
        guard: GradientGuard,
        memory: MemoryGuard,
        own_optimizer: RoundedAdamW | None,
    ) -> None:
        """To be called once TRL's constructor is done."""
        # Model, data and libraries are here to stay: a full collection that walks over them takes a tenth of a second.
        gc.collect()
        gc.freeze()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_EveryStep())
        self.groups, self.run_dir, self.guard, self.memory = groups, run, guard, memory
        self.own_optimizer = own_optimizer

    @property
    def tuned(self) -> nn.Module:
        """The model without DDP's wrapper, with PEFT's."""
        return self.model  # type: ignore[return-value]

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def tells_loggers(self, logs: dict[str, float]) -> bool:
        """metrics.jsonl has every step; the loggers hear of every log.every_steps-th, of the last, and of what is no step."""
        step = self.state.global_step
        return "loss" not in logs or step % self.args.logging_steps == 0 or step == self.state.max_steps

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
