"""What a person sees while a run goes on: a bar on a terminal, a plain line every few seconds anywhere else.

Always on stderr; stdout belongs to `--json`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from lensmith.types import StepStats

LINE_EVERY_S = 5.0
"""Between plain lines: often enough to see that it lives, seldom enough for a log file."""
HALF_LIFE_STEPS = 10
"""Speeds and the loss shown are exponential means; a step this long ago counts half."""


@runtime_checkable
class Rewarded(Protocol):
    """A step of GRPO; `lensmith.train.grpo_stats.GrpoStats`, which loads torch, is one."""

    reward: float
    reward_std: float
    completion_tokens: float
    zero_variance: float
    rollout_s: float
    rollout_tokens_per_s: float
    policy_s: float
    tokens: int


class TrainProgress:
    """Shows steps, time left, tokens/s, loss, memory and the share of time spent waiting for data.

    Of a GRPO step the reward with its spread within groups, the length of completions, tokens/s of rollout and policy, and
    the share of groups that teach nothing, in place of loss and waiting.

    `with TrainProgress() as progress: progress.update(stats, total_steps)` after each optimizer step.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(file=sys.stderr)
        self.clock = clock
        self.bar: Progress | None = None
        self.first: tuple[float, int] | None = None
        """Time before the first step seen and the steps taken by then: a resumed run does not start at 0."""
        self.said_at = -LINE_EVERY_S
        self.means: dict[str, float] = {}
        self.step = 0
        """The newest one shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def update(self, stats: StepStats, total_steps: int) -> None:
        """Show one more optimizer step of `total_steps`."""
        now = self.clock()
        if stats.step <= self.step:  # another run has begun, such as GRPO behind its warm-up
            self.first, self.means = None, {}
        self.step = stats.step
        self._blend(stats)
        if self.first is None:
            self.first = (now - stats.step_s, stats.step - 1)
        numbers = self.describe()
        if self.console.is_terminal:
            self._draw(stats.step, total_steps, numbers)
        elif now - self.said_at >= LINE_EVERY_S or stats.step == total_steps:
            self.said_at = now
            left = self._seconds_left(now, stats.step, total_steps)
            self.say(f"step {stats.step}/{total_steps}  {numbers}  {_clock_time(left)} left")

    def _draw(self, step: int, total_steps: int, numbers: str) -> None:
        """The bar comes with the first step and goes with the last, so that answering can have one of its own."""
        if self.bar is None:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self.console,
            )
            self.bar.add_task("train", total=total_steps, completed=step - 1, numbers=numbers)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=step, total=total_steps, numbers=numbers)
        if step >= total_steps:
            self._close()

    def _close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def describe(self) -> str:
        """The numbers of the latest steps in words and units."""
        means = self.means
        memory = [f"{means['peak_gib']:.1f} GiB"] if means["peak_gib"] else []
        if "reward" in means:
            parts = [
                f"reward {means['reward']:.3f} ± {means['reward_std']:.3f}",
                f"{means['completion_tokens']:,.0f} tokens long",
                f"rollout {means['rollout_tokens'] / means['rollout_s']:,.0f} tokens/s",
                f"policy {means['tokens'] / means['policy_s']:,.0f} tokens/s",
                f"no signal in {means['zero_variance']:.0%}",
                *memory,
            ]
            return "  ".join(parts)
        parts = [f"loss {means['loss']:.3f}", f"{means['tokens'] / means['step_s']:,.0f} tokens/s", *memory]
        parts.append(f"waiting for data {means['data_wait_s'] / means['step_s']:.0%}")
        return "  ".join(parts)

    def _blend(self, stats: StepStats) -> None:
        keep = 0.5 ** (1 / HALF_LIFE_STEPS) if self.means else 0.0
        new = _rewarded(stats) if isinstance(stats, Rewarded) else _supervised(stats)
        self.means = {name: keep * self.means.get(name, 0.0) + (1 - keep) * value for name, value in new.items()}
        self.means["peak_gib"] = stats.peak_gib

    def _seconds_left(self, now: float, step: int, total_steps: int) -> float:
        started_at, steps_before = self.first or (now, step)
        return (now - started_at) / max(step - steps_before, 1) * (total_steps - step)


# An interval of 0 s is below the clock's resolution; dividing by it says nothing.
LEAST_S = 1e-9


def _supervised(stats: StepStats) -> dict[str, float]:
    return {
        "loss": stats.loss,
        "tokens": stats.tokens,
        "step_s": max(stats.step_s, LEAST_S),
        "data_wait_s": stats.data_wait_s,
    }


def _rewarded(stats: Rewarded) -> dict[str, float]:
    return {
        "reward": stats.reward,
        "reward_std": stats.reward_std,
        "completion_tokens": stats.completion_tokens,
        "zero_variance": stats.zero_variance,
        "rollout_tokens": stats.rollout_tokens_per_s * stats.rollout_s,
        "rollout_s": max(stats.rollout_s, LEAST_S),
        "tokens": stats.tokens,
        "policy_s": max(stats.policy_s, LEAST_S),
    }


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class CountProgress:
    """A bar for work that is counted: `with CountProgress("answering") as answered: answered(done, total)`."""

    def __init__(
        self, what: str, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.what = what
        self.console = console or Console(file=sys.stderr)
        self.clock = clock
        self.bar: Progress | None = None
        self.said_at = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total`; the bar comes with the first call and goes with the last."""
        if self.console.is_terminal:
            if self.bar is None:
                self.bar = Progress(
                    TextColumn(self.what), MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(compact=True),
                    console=self.console, transient=True,
                )  # fmt: skip
                self.bar.add_task(self.what, total=total)
                self.bar.start()
            self.bar.update(self.bar.task_ids[0], completed=done, total=total)
            if done >= total:
                self._close()
        elif self.clock() - self.said_at >= LINE_EVERY_S:
            self.said_at = self.clock()
            self.console.print(f"{self.what} {done}/{total}", highlight=False, markup=False)

    def _close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
