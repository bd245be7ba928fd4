"""All rewards of a run over one batch of completions: a table of numbers, their weighted sum, and what failed.

A reward that raises says nothing about the completion, so it counts as nan and the others decide; it is told, and stops
the run only where `on_error="raise"`. Async rewards of one batch wait side by side.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lensmith.errors import RewardError
from lensmith.train.reward_calls import Signature, batch_arguments, read_number, single_arguments
from lensmith.train.reward_functions import Completion
from lensmith.types import Sample, counted

if TYPE_CHECKING:
    from jaxtyping import Float

OnError = Literal["count", "raise"]
ALL = -1
"""Stands for every completion of a batch where one is named."""


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Completions with the row that each answers; the lists are equally long, and a row stands once per completion."""

    completions: Sequence[str]
    """Texts, without the end mark."""
    completion_ids: Sequence[Sequence[int]]
    """Their tokens, the end mark included."""
    samples: Sequence[Sample]
    """With boxes as the model speaks them: see data.boxes.convert_sample."""
    truncated: Sequence[bool]
    """Whether each ended because it reached the most tokens it could have."""

    def __post_init__(self) -> None:
        sizes = {
            "completions": len(self.completions),
            "lists of token ids": len(self.completion_ids),
            "samples": len(self.samples),
            "truncated marks": len(self.truncated),
        }
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{size} {name}" for name, size in sizes.items())
            raise RewardError(f"rewards: {told}. Each completion needs one of each: repeat the sample per completion.")


@dataclass(frozen=True, slots=True)
class Reward:
    """One reward of a run: a function, how it is called and what it weighs."""

    name: str
    """Of its column in the table."""
    function: Callable[..., Any]
    weight: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    signature: Signature | None = None
    """Of a user's own function; None for those of Lensmith, which see a Completion."""
    home: str = ""
    """File and function, where it is a user's own."""

    def ask(self, text: str, ids: Sequence[int], sample: Sample, truncated: bool) -> Any:
        """What the function gives for one completion: a number, None, or something to wait for."""
        if self.signature is None:
            return self.function(Completion(text, ids, sample, truncated), **self.parameters)
        return self.function(**single_arguments(self.signature, text, ids, sample, truncated), **self.parameters)

    def ask_batch(
        self,
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        samples: Sequence[Sample],
        truncated: Sequence[bool],
    ) -> Any:
        """What a function of the batch form gives for all of them."""
        assert self.signature is not None
        return self.function(**batch_arguments(self.signature, texts, ids, samples, truncated), **self.parameters)


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """What went wrong with one reward in one batch."""

    count: int
    """Completions without a number for it."""
    first: str
    """The first of the reasons, as a sentence."""


@dataclass(frozen=True, slots=True)
class RewardTable:
    """What the rewards said about a batch."""

    names: tuple[str, ...]
    values: Float[np.ndarray, "completions rewards"]
    """float64, not weighted; nan where a reward gave None or failed."""
    total: Float[np.ndarray, " completions"]
    """Weighted sum of the numbers there are; nan where no reward gave one, so that no group's mean is moved."""
    failures: Mapping[str, RewardFailure]
    """By name; only those that failed."""

    @property
    def num_unscored(self) -> int:
        """Completions of which no reward said anything."""
        return int(np.isnan(self.total).sum())


@dataclass(slots=True)
class _Column:
    """One reward's numbers for a batch while they come in."""

    reward: Reward
    batch: RewardBatch
    values: np.ndarray
    reasons: list[tuple[int, Exception]] = field(default_factory=list)
    """Where (the completion, or ALL) and why there is no number."""

    def put(self, number: int, value: Any) -> None:
        self.values[number] = read_number(value)

    def put_all(self, values: Any) -> None:
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise RewardError(f"returned {values!r}, where a list of {counted(len(self.values), 'number')} is needed")
        if len(values) != len(self.values):
            raise RewardError(
                f"returned {counted(len(values), 'number')} for {counted(len(self.values), 'completion')}, where one each "
                "is needed"
            )
        self.values[:] = [read_number(value) for value in values]

    def failure(self) -> RewardFailure | None:
        if not self.reasons:
            return None
        self.reasons.sort(key=lambda reason: reason[0])  # async ones come in as they end
        number, _ = self.reasons[0]
        return RewardFailure(len(self.values) if number == ALL else len(self.reasons), self.sentence())

    def sentence(self) -> str:
        number, cause = self.reasons[0]
        samples = self.batch.samples
        where = samples[number].where if number != ALL else _span(samples)
        reason = str(cause) if isinstance(cause, RewardError) else f"{type(cause).__name__}: {cause}"
        # A column that is missing is missing in one row, also where the function was asked about all of them.
        where = next((row.where for row in samples if reason.startswith(f"{row.where}: ")), where)
        reason = reason.removeprefix(f"{where}: ")
        home = f" ({self.reward.home})" if self.reward.home else ""
        return f"{where}: reward {self.reward.name}{home}: {reason}"


class RewardSet:
    """The rewards of a run."""

    def __init__(self, rewards: Sequence[Reward], on_error: OnError = "count") -> None:
        self.rewards = tuple(rewards)
        self.on_error: OnError = on_error

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self.rewards)

    @property
    def weights(self) -> Float[np.ndarray, " rewards"]:
        return np.array([reward.weight for reward in self.rewards], dtype=np.float64)

    def score(self, batch: RewardBatch) -> RewardTable:
        """Every reward of every completion.

        Raises:
            RewardError: a reward failed, and `on_error` is "raise".
        """
        columns = [_Column(reward, batch, np.full(len(batch.completions), np.nan)) for reward in self.rewards]
        waiting = [work for column in columns for work in _fill(column)]
        if waiting:
            _run_together(waiting)
        failures = {}
        for column in columns:
            failure = column.failure()
            if failure is None:
                continue
            if self.on_error == "raise":
                raise RewardError(
                    f"{failure.first.rstrip('.')}. {failure.count} of {counted(len(column.values), 'completion')} have no "
                    'number from it. Mend it or its rows, or let such completions be left out with on_error="count".'
                ) from column.reasons[0][1]
            failures[column.reward.name] = failure
        values = np.stack([column.values for column in columns], axis=1)
        return RewardTable(self.names, values, weighted_total(values, self.weights), failures)


def weighted_total(
    values: Float[np.ndarray, "completions rewards"], weights: Float[np.ndarray, " rewards"]
) -> Float[np.ndarray, " completions"]:
    """Sum of weight x value over the values there are; nan where there are none."""
    total = np.nansum(values * weights, axis=1)
    total[np.isnan(values).all(axis=1)] = np.nan
    return total


def _fill(column: _Column) -> list[Coroutine[Any, Any, None]]:
    """Fill in what can be known at once; what has to be waited for is given back."""
    reward, batch = column.reward, column.batch
    lists = (batch.completions, batch.completion_ids, batch.samples, batch.truncated)
    if reward.signature is not None and reward.signature.form == "batch":
        waiting = [_ask(column, ALL, lambda: reward.ask_batch(*lists))]
    else:
        waiting = [
            _ask(column, number, lambda row=row: reward.ask(*row))
            for number, row in enumerate(zip(*lists, strict=True))
        ]
    return [work for work in waiting if work is not None]


def _ask(column: _Column, number: int, call: Callable[[], Any]) -> Coroutine[Any, Any, None] | None:
    """One call; its numbers go into the column, its failure among the reasons."""
    try:
        answer = call()
        if inspect.isawaitable(answer):
            return _wait(column, number, answer)
        _take(column, number, answer)
    except Exception as cause:  # noqa: BLE001  (whatever a user's function raises: told by name, or raised in score)
        column.reasons.append((number, cause))
    return None


async def _wait(column: _Column, number: int, answer: Awaitable[Any]) -> None:
    try:
        _take(column, number, await answer)
    except Exception as cause:  # noqa: BLE001  (as above)
        column.reasons.append((number, cause))


def _take(column: _Column, number: int, answer: Any) -> None:
    if number == ALL:
        column.put_all(answer)
    else:
        column.put(number, answer)


def _run_together(waiting: Sequence[Coroutine[Any, Any, None]]) -> None:
    async def gather() -> None:
        await asyncio.gather(*waiting)

    # In a thread of its own, because a notebook's main thread already runs a loop.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, gather()).result()


def _span(samples: Sequence[Sample]) -> str:
    """Where the rows of a batch are."""
    wheres = list(dict.fromkeys(sample.where for sample in samples))
    return wheres[0] if len(wheres) == 1 else f"{wheres[0]} to {wheres[-1]}"
