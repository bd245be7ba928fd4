"""A step that does not fit the GPU is taken again in smaller packs, with the same gradient.

Losses are sums that are divided once, so the gradients of two halves of a pack add up to that of the whole. When memory runs
out, the step's gradients are dropped, the pack at fault is cut between its samples, and the step begins again. A sample that
is too large alone gets every saving that changes no number (all layers recomputed, their inputs in host memory); after that
the run ends with its name. Two steps in a row that ran out lower the size of packs for good.

Every event is said, and stands in the run folder's oom.jsonl, where `lensmith show` and the planner find it.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lensmith.data.pack import sample_tokens, split_pack
from lensmith.errors import RunError
from lensmith.model.engine import Engine
from lensmith.model.recompute import HostBuffers
from lensmith.rundir import RunDir
from lensmith.train.ranks import any_process, gather_values, rank
from lensmith.types import IGNORE, Pack, counted

GIB = 2**30

Remedy = Literal["split", "recompute", "too_large", "others", "weights_moved"]
"""The pack cut in two; all layers recomputed, with their inputs in host memory; and three ends: nothing left to try, nothing
of ours to try on another engine, and nothing that could be tried."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """A pack that did not fit, and what was done; one line of oom.jsonl."""

    step: int
    rank: int
    rows: tuple[str, ...]
    tokens: int
    learned_tokens: int
    patches: int
    largest_row: str
    """The sample with the most tokens, its pictures counted."""
    largest_tokens: int
    remedy: Remedy
    budget_before_tokens: int
    budget_after_tokens: int
    """Most tokens of a pack, before and after this step."""
    reserved_gib: float | None
    """By torch when memory ran out, 2**30 bytes; None without a GPU, as the two below."""
    free_gib: float | None
    """On the whole card, whoever uses the rest."""
    total_gib: float | None

    def sentence(self) -> str:
        """What the user is told: what happened, and what is done or can be done about it."""
        room = "" if self.free_gib is None else f" ({self.free_gib:.1f} of {self.total_gib:.1f} GiB were free)"
        pack = f"a pack of {counted(self.tokens, 'token')} and {counted(len(self.rows), 'sample')}"
        match self.remedy:
            case "split":
                return (
                    f"Step {self.step}: GPU memory ran out{room} in {pack}, the largest {self.largest_row} with "
                    f"{self.largest_tokens:,} tokens. The step is taken again with that pack in two: the same gradient."
                )
            case "recompute":
                return (
                    f"Step {self.step}: GPU memory ran out{room} in {self.largest_row}, alone in a pack of "
                    f"{counted(self.tokens, 'token')}. From now on every layer is recomputed and its input waits in host "
                    "memory: slower, the same result. To start so, set memory.recompute=layers and memory.offload=inputs."
                )
            case "too_large":
                return (
                    f"{self.largest_row}: step {self.step}: GPU memory ran out{room} in this row alone, with every layer "
                    f"recomputed and its input in host memory. The row has {counted(self.tokens, 'token')}. Lower "
                    "data.image.max_tokens, set pack.tokens below the row's and data.on_long=shrink or drop, or take "
                    "tune.method=qlora or a smaller model; `lensmith plan` says what fits."
                )
            case "others":
                return (
                    f"{self.largest_row}: step {self.step}: GPU memory ran out{room} in this row alone, which has "
                    f"{counted(self.tokens, 'token')}. With engine=unsloth, set memory.recompute=layers if it is none, lower "
                    "data.image.max_tokens, or take tune.method=qlora; engine=lensmith can keep parts in host memory as well."
                )
            case "weights_moved":
                return (
                    f"{self.largest_row}: step {self.step}: GPU memory ran out{room} in {pack}. With optim.in_backward=true "
                    "some weights had moved by then, so the step cannot be taken again. Lower optim.effective_samples, set "
                    "memory.offload=inputs, or set optim.in_backward=false; the newest checkpoint is from before."
                )


class MemoryGuard:
    """Takes the steps of a run, in smaller packs where it has to; with several processes all agree after each attempt."""

    def __init__(
        self,
        engine: Engine,
        run: RunDir,
        say: Callable[[str], None],
        *,
        budget_tokens: int,
        in_backward: bool = False,
        ours: bool = True,
    ) -> None:
        """`budget_tokens`: most tokens of the packs that will come; `in_backward`: weights move in the backward pass; `ours`:
        whether the engine has savings that can be turned on."""
        self.ours = ours
        self.engine, self.run, self.say, self.in_backward = engine, run, say, in_backward
        self.budget_tokens = budget_tokens
        """Larger packs are cut before they are tried."""
        self._short: tuple[int, int] | None = None
        """The latest step in which a pack was cut, and its largest pack that fitted."""
        lowered = min((line["budget_after_tokens"] for line in run.read_oom()), default=budget_tokens)
        if lowered < budget_tokens:
            self.budget_tokens = lowered
            say(
                f"Packs hold at most {lowered:,} tokens instead of {budget_tokens:,}, because GPU memory ran out before; "
                f"to try larger ones again, remove {run.oom_path}."
            )

    def take_step(
        self,
        step: int,
        packs: Sequence[Pack],
        take_pack: Callable[[Pack], Tensor],
        drop_gradients: Callable[[], None],
    ) -> Tensor:
        """The sum of what `take_pack`, which runs one pack forward and backward, returns; gradients are the step's.

        Raises:
            RunError: a sample does not fit whatever is done, or weights have moved already.
        """
        packs, shortages = self._cut(packs, self.budget_tokens), []
        while True:
            total, failed = _attempt(packs, take_pack)
            if not any_process(failed is not None, self.engine.place):
                break
            shortage = None if failed is None else self._describe(step, failed)
            drop_gradients()
            _free_memory()
            shortages += self._share(shortage, shortages)
            packs = self._relieve(packs, shortage)
        self._close_step(step, packs, shortages)
        return torch.zeros((), device=self.engine.place) if total is None else total

    def _describe(self, step: int, failed: Pack) -> Shortage:
        sizes = sample_tokens(failed)
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        gpu = self.engine.place.type == "cuda"
        free, total = torch.cuda.mem_get_info(self.engine.place) if gpu else (None, None)
        reserved = torch.cuda.memory_reserved(self.engine.place) if gpu else None
        return Shortage(
            step=step,
            rank=rank(),
            rows=failed.wheres,
            tokens=failed.num_tokens,
            learned_tokens=int((failed.labels != IGNORE).sum()),
            patches=len(failed.pixels),
            largest_row=failed.wheres[largest],
            largest_tokens=sizes[largest],
            remedy=self._choose_remedy(failed),
            budget_before_tokens=self.budget_tokens,
            budget_after_tokens=self.budget_tokens,
            reserved_gib=_gib(reserved),
            free_gib=_gib(free),
            total_gib=_gib(total),
        )

    def _choose_remedy(self, failed: Pack) -> Remedy:
        if self.in_backward:
            return "weights_moved"
        if failed.num_samples > 1:
            return "split"
        if not self.ours:
            return "others"
        spared = self.engine.recompute == "layers" and self.engine.host_buffers is not None
        return "too_large" if spared else "recompute"

    def _share(self, shortage: Shortage | None, earlier: Sequence[Shortage]) -> list[Shortage]:
        """What ran out in this attempt, over all processes, and said; raises RunError in all of them where one gives up."""
        found = [event for event in gather_values(shortage) if event is not None]
        for event in found:
            if event.remedy in ("too_large", "others", "weights_moved"):
                self._record([*earlier, *found])
                raise RunError(event.sentence())
            self.say(event.sentence())
        return found

    def _relieve(self, packs: list[Pack], shortage: Shortage | None) -> list[Pack]:
        """The packs for the next attempt of this process, after the remedy of what ran out here."""
        if shortage is None:
            return packs
        if shortage.remedy == "split":
            return self._cut(packs, shortage.tokens - 1)  # those as large as the one that failed are cut with it
        self.engine.recompute = "layers"
        self.engine.host_buffers = self.engine.host_buffers or HostBuffers(self.engine.place)
        return packs

    def _close_step(self, step: int, packs: Sequence[Pack], shortages: Sequence[Shortage]) -> None:
        """Lower the budget where this was the second step in a row that had to be cut, and write down what happened."""
        if failed_tokens := min((event.tokens for event in shortages if event.remedy == "split"), default=0):
            fitted = max((pack.num_tokens for pack in packs if pack.num_tokens < failed_tokens), default=0)
            worked_tokens = max(gather_values(fitted))
            if self._short is not None and self._short[0] == step - 1:
                before, self.budget_tokens = self.budget_tokens, min(worked_tokens, self._short[1])
                self.say(
                    f"GPU memory ran out in two steps in a row: from now on packs hold at most {self.budget_tokens:,} tokens "
                    f"instead of {before:,}; larger ones are cut first. Results stay the same. To start so, set "
                    f"pack.tokens={self.budget_tokens}."
                )
            self._short = (step, worked_tokens)
        self._record(shortages)

    def _record(self, shortages: Sequence[Shortage]) -> None:
        if rank() == 0:
            for shortage in shortages:
                self.run.append_oom(dataclasses.replace(shortage, budget_after_tokens=self.budget_tokens))

    def _cut(self, packs: Sequence[Pack], budget_tokens: int) -> list[Pack]:
        """The packs, those over the budget cut until they are not or hold one sample."""
        config = self.engine.config
        fitting: list[Pack] = []
        for pack in packs:
            halves = None
            if pack.num_tokens > budget_tokens:
                halves = split_pack(pack, picture_ids=(config.image_token_id, config.video_token_id))
            fitting += [pack] if halves is None else self._cut(halves, budget_tokens)
        return fitting


def _attempt(packs: Sequence[Pack], take_pack: Callable[[Pack], Tensor]) -> tuple[Tensor | None, Pack | None]:
    """The sum over the packs (None without any), and the pack that did not fit, if one did not."""
    total = None
    for pack in packs:
        try:
            value = take_pack(pack)
        except torch.OutOfMemoryError:
            # Dealt with by the caller: as long as the error lives, so do the frames it came from, with their tensors.
            return None, pack
        total = value if total is None else total + value
    return total, None


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / GIB
