"""What a GRPO step did and cost: one line of metrics.jsonl, and the batch behind it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lensmith.data.groups import Prompt
from lensmith.evals.text_metrics import repeated_share
from lensmith.model.decode import Completion
from lensmith.train.rollout import RolloutCost
from lensmith.types import Pack, StepStats

if TYPE_CHECKING:
    from lensmith.train.rewards import RewardFailure, RewardTable

GIB = 2**30
REPEATED_TOKENS = 4
"""Of the runs of tokens whose repetition is counted."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Completions that were generated together, and how they were judged; one entry per completion."""

    step: int
    prompts: tuple[Prompt, ...]
    completions: tuple[Completion, ...]
    table: RewardTable
    advantages: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GrpoStats(StepStats):
    """What one GRPO step did; `samples` are completions, `tokens` those of its packs, `loss` TRL's."""

    reward: float
    """Weighted sum of all rewards, mean over the step's completions."""
    reward_std: float
    rewards: Mapping[str, float | None]
    """Mean of each reward; None where it judged nothing."""
    zero_variance: float
    """Share of groups whose rewards are all equal: they teach nothing."""
    entropy: float | None
    """Nats per token of the policy; None where nothing was computed."""
    kl: float | None
    """Divergence from the model before training, with grpo.beta."""
    clipped: float | None
    """Share of ratios that were clipped."""
    completion_tokens: float
    """Mean length."""
    truncated: float
    """Share of completions that max_new_tokens cut off."""
    repetition: float
    """Share of four-token sequences that stood in the same completion before."""
    rollout_s: float
    policy_s: float
    """Forward and backward over the packs."""
    rollout_tokens_per_s: float
    policy_tokens_per_s: float
    logprob_gap: float | None
    """Mean distance, in nats, of log-probabilities at rollout and in training; None where no fresh completion was learned, no
    number where vLLM told none for some token."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Completions that a reward failed on, by its name; empty where none did."""
    stale: bool = False
    """Whether vLLM wrote the completions with other weights than those that train."""
    left_out: float | None = None
    """Share of completions that TRL leaves out of the loss because vLLM and training find them too differently likely."""


class GrpoMeter:
    """Collects what happens in a step."""

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self.samples = self.tokens = self.learned_tokens = 0
        self.lengths: list[int] = []
        self.repeated: list[float] = []
        self.cut = 0
        self.policy_s, self.started = 0.0, time.perf_counter()
        self._gaps: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._failures: dict[str, int] = {}
        self._stale, self._left_out = False, None

    def judged(self, failures: Mapping[str, RewardFailure]) -> None:
        """What went wrong while a batch was judged."""
        for name, failure in failures.items():
            self._failures[name] = self._failures.get(name, 0) + failure.count

    def compare(self, trained: Tensor, sampled: Tensor) -> None:
        """Log-probabilities of the same tokens, [rows, tokens], 0 where there is none. Nothing waits for the device."""
        self._gaps.append((trained - sampled.to(trained.dtype)).abs().sum())
        self._counts.append((sampled != 0).sum())

    def answered(self, *, stale: bool, left_out: Tensor) -> None:
        """What there is to know of completions by vLLM besides their log-probabilities."""
        self._stale, self._left_out = stale, left_out

    def after_step(
        self, packs: Sequence[Pack], batch: Mapping[str, Any], completions: Sequence[Completion], *, seconds: float
    ) -> None:
        rows = [completions[row] for row in batch["row"].tolist()]
        self.samples += len(rows)
        self.tokens += sum(pack.num_tokens for pack in packs)
        self.learned_tokens += sum(len(completion.ids) for completion in rows)
        self.lengths += [len(completion.ids) for completion in rows]
        self.repeated += [repeated_share(completion.ids, REPEATED_TOKENS) for completion in rows]
        self.cut += sum(not completion.stopped for completion in rows)
        self.policy_s += seconds

    def stats(
        self, logs: Mapping[str, float], metrics: Mapping[str, Sequence[float]], rollout: RolloutCost, step: int
    ) -> GrpoStats:
        """The step's numbers; `metrics` are TRL's. Counting starts anew."""
        mean = lambda name: _mean(metrics.get(name, ()))  # noqa: E731
        prefix, suffix = "rewards/", "/mean"
        counts = int(sum(count.item() for count in self._counts))
        found = GrpoStats(
            step=step,
            loss=float(logs["loss"]),
            grad_norm=float(logs.get("grad_norm", float("nan"))),
            learning_rate=float(logs["learning_rate"]),
            samples=self.samples,
            tokens=self.tokens,
            learned_tokens=self.learned_tokens,
            step_s=time.perf_counter() - self.started,
            data_wait_s=0.0,
            peak_gib=torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0,
            reward=mean("reward") or 0.0,
            reward_std=mean("reward_std") or 0.0,
            rewards={
                name.removeprefix(prefix).removesuffix(suffix): mean(name)
                for name in metrics
                if name.startswith(prefix) and name.endswith(suffix)
            },
            zero_variance=mean("frac_reward_zero_std") or 0.0,
            entropy=mean("entropy"),
            kl=mean("kl"),
            clipped=mean("clip_ratio/region_mean"),
            completion_tokens=statistics.mean(self.lengths) if self.lengths else 0.0,
            truncated=self.cut / max(1, len(self.lengths)),
            repetition=_mean(self.repeated) or 0.0,
            rollout_s=rollout.seconds,
            policy_s=self.policy_s,
            rollout_tokens_per_s=rollout.tokens / rollout.seconds if rollout.seconds else 0.0,
            policy_tokens_per_s=self.tokens / self.policy_s if self.policy_s else 0.0,
            logprob_gap=sum(gap.item() for gap in self._gaps) / counts if counts else None,
            failures=self._failures,
            stale=self._stale,
            left_out=None if self._left_out is None else float(self._left_out),
        )
        self._start_anew()
        return found


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]  # NaN: a reward that judged nothing
    return statistics.mean(known) if known else None
