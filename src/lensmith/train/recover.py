"""What a run survives: a step that is not finite, and Ctrl-C.

A non-finite loss makes every gradient non-finite, so one look at the gradient norm per step covers both. Such a step is
skipped and its rows are named; three in a row stop the run, because then the data is not to blame.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl

from lensmith.errors import RunError
from lensmith.model.components import gradient_norms, untouched_sentences
from lensmith.types import Component

MOST_SKIPPED_STEPS = 3
NAMED_ROWS = 5


class GradientGuard:
    """Sees every gradient before the optimizer does."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.wheres: tuple[str, ...] = ()
        """Rows of the step under way; set by the trainer."""
        self.component_norms: dict[Component, float] = {}
        """Gradient norm per component at the first step."""
        self.skipped_in_a_row = 0

    def before_clipping(self, model: nn.Module, step: int) -> None:
        """After the first backward pass: one norm per component, and a sentence for each that got nothing."""
        if self.component_norms:
            return
        self.component_norms = gradient_norms(model)
        shares = ", ".join(f"{name} {norm:.3g}" for name, norm in self.component_norms.items())
        self.say(f"Gradient norm in step {step}: {shares}.")
        for sentence in untouched_sentences(self.component_norms):
            self.say(sentence)

    def after_clipping(self, model: nn.Module, norm: Tensor | float | None, step: int, *, scaled: bool) -> None:
        """Skip the step where the norm is not finite. Raises RunError at the third in a row.

        With a loss scaler (fp16) an overflow now and then is how it finds its scale, and the scaler skips by itself.
        """
        if norm is None or torch.isfinite(torch.as_tensor(norm)):
            self.skipped_in_a_row = 0
            return
        if scaled:
            return
        model.zero_grad(set_to_none=True)  # an optimizer leaves parameters without gradient alone
        self.skipped_in_a_row += 1
        rows = ", ".join(self.wheres[:NAMED_ROWS])
        more = f" and {len(self.wheres) - NAMED_ROWS} more" if len(self.wheres) > NAMED_ROWS else ""
        self.say(f"Step {step} skipped: loss or gradient is not finite. Its rows: {rows}{more}.")
        if self.skipped_in_a_row >= MOST_SKIPPED_STEPS:
            raise RunError(
                f"Step {step}: {self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, the last "
                f"with {rows}{more}. Lower optim.learning_rate, or set precision=fp32 to see whether the numbers "
                "overflow; the last checkpoint is from before."
            )

    def after_moving(self, norm: Tensor | None, step: int) -> None:
        """For steps taken inside the backward pass. Raises RunError where the norm is not finite: the weights have moved."""
        if norm is not None and not torch.isfinite(norm):
            raise RunError(
                f"Step {step}: loss or gradient is not finite, and with optim.in_backward=true the weights have moved "
                f"already. Its rows: {', '.join(self.wheres[:NAMED_ROWS])}. Go on from the last checkpoint with a lower "
                "optim.learning_rate, or with optim.in_backward=false, which skips such steps."
            )


class StopOnInterrupt(TrainerCallback):
    """Ends training with a checkpoint after the step under way, once `asked` is set."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


@contextmanager
def interruptible(stop: StopOnInterrupt, say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C asks for a stop after this step; the second one stops at once, without saving."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        say("Stopping after this step and saving; press Ctrl-C again to stop at once without saving.")

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: whoever runs us there handles its own signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
