"""What goes wrong in reinforcement learning while every number still looks like a number; said once, when it begins.

Each alarm looks at a few steps in a row, since single steps of a few completions say little.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lensmith.config.tree import Grpo

if TYPE_CHECKING:
    from lensmith.train.grpo_stats import GrpoStats

IN_A_ROW = 5
"""Steps that an alarm looks at."""
LOW_ENTROPY, ENTROPY_SHARE = 0.05, 0.1
"""Nats per token under which a policy says nearly always the same, and the share of what it had at first."""
SHORT_SHARE = 0.2
"""Share of the first steps' length under which answers have collapsed."""
MOST_TRUNCATED = 0.5
MOST_REPEATED = 0.5
"""Share of four-token sequences that stood in the same completion before."""
COLLAPSE = ("entropy", "length", "repetition")
"""Alarms after which more steps mend nothing, as a rule; an earlier checkpoint does."""
LOGPROB_GAP = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Nats between rollout and training, mean over tokens. Two bf16 passes in a different order are 0.03 to 0.05 apart."""
MOST_LEFT_OUT = 0.5
"""Share of completions that TRL's correction of vLLM's log-probabilities may leave out of the loss."""


class Alarms:
    """Looks at every step; `look` returns what there is to say."""

    def __init__(self, settings: Grpo, dtype: torch.dtype, *, vllm: bool = False) -> None:
        """`vllm`: whether it writes the completions."""
        self._settings, self._most_gap, self._vllm = settings, LOGPROB_GAP[dtype], vllm
        self._agreed = False
        """Whether rollout and training have found completions equally likely at some step."""
        self._recent: deque[GrpoStats] = deque(maxlen=IN_A_ROW)
        self._first: list[GrpoStats] = []
        self._ringing: set[str] = set()
        self._rang: list[str] = []

    def look(self, stats: GrpoStats) -> list[str]:
        """Sentences about what has begun to go wrong with this step."""
        self._recent.append(stats)
        if len(self._first) < IN_A_ROW:
            self._first.append(stats)
        sentences = []
        alarms = self._alarms(stats)
        self._agreed |= stats.logprob_gap is not None and stats.logprob_gap <= self._most_gap
        for name, (rings, sentence) in alarms.items():
            if rings and name not in self._ringing:
                self._rang.append(name)
                sentences.append(f"Step {stats.step}: {sentence}")
            (self._ringing.add if rings else self._ringing.discard)(name)
        return sentences

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Alarms of a collapse that rang at any step so far."""
        return tuple(name for name in COLLAPSE if name in self._rang)

    def _alarms(self, stats: GrpoStats) -> dict[str, tuple[bool, str]]:
        gap = stats.logprob_gap or 0.0
        return {
            "no signal": (
                self._all(lambda step: step.zero_variance == 1.0),
                f"all completions of every group got the same reward {IN_A_ROW} steps in a row, so nothing is learned. Take "
                "easier or harder rows, more completions (grpo.group), or a reward with steps between.",
            ),
            "entropy": (
                self._all(lambda step: step.entropy is not None and step.entropy < self._least_entropy()),
                f"entropy fell to {stats.entropy or 0:.3f} nats a token: the policy hardly tries anything any more. Lower "
                "optim.learning_rate, raise grpo.beta or grpo.epsilon_high, or stop at an earlier checkpoint.",
            ),
            "length": (
                self._all(lambda step: step.completion_tokens < SHORT_SHARE * self._mean_length()),
                f"completions have shrunk to {stats.completion_tokens:.0f} tokens from {self._mean_length():.0f}. A reward may "
                "like short answers; look at the completions.",
            ),
            "truncation": (
                self._all(lambda step: step.truncated > MOST_TRUNCATED),
                f"{stats.truncated:.0%} of the completions were cut off at {self._settings.max_new_tokens} tokens. Raise "
                "grpo.max_new_tokens, or add the reward `length`.",
            ),
            "repetition": (
                self._all(lambda step: step.repetition > MOST_REPEATED),
                f"{stats.repetition:.0%} of what completions say, they have said before. Add the reward `repetition`, or go "
                "back to an earlier checkpoint.",
            ),
            "logprobs": (
                not gap <= self._most_gap,  # vLLM may tell what is not a number
                f"log-probabilities at rollout and in training are {gap:.3g} nats apart, more than {self._most_gap:g}: what is "
                f"learned from is not what was sampled. {self._why_apart()}Please report this with the output of "
                "`lensmith env`.",
            ),
            "stale weights": (
                stats.stale,
                "stale rollout weights: vLLM wrote these completions with other weights than those that train, so they are not "
                "the policy's. Stop, set rollout.engine=builtin, and please report this with the output of `lensmith env`.",
            ),
            "left out": (
                self._all(lambda step: (step.left_out or 0.0) > MOST_LEFT_OUT),
                f"{stats.left_out or 0:.0%} of the completions are left out of the loss, because vLLM and training find them "
                "too differently likely. Lower grpo.max_new_tokens, or set rollout.engine=builtin.",
            ),
        }

    def _why_apart(self) -> str:
        if not self._vllm:
            return ""
        if self._agreed:
            return (
                "They agreed at an earlier step, so vLLM's weights are stale: it no longer takes over what is trained. Set "
                "rollout.engine=builtin. "
            )
        return (
            "They have not agreed since this start, so vLLM computes another model or other pictures, or did not take the "
            "weights over. Set rollout.engine=builtin. "
        )

    def _all(self, holds: Callable[[GrpoStats], bool]) -> bool:
        return len(self._recent) == IN_A_ROW and all(map(holds, self._recent))

    def _least_entropy(self) -> float:
        known = [step.entropy for step in self._first if step.entropy is not None]
        return min(LOW_ENTROPY, ENTROPY_SHARE * sum(known) / len(known)) if known else 0.0

    def _mean_length(self) -> float:
        return sum(step.completion_tokens for step in self._first) / len(self._first)
