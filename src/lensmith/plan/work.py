"""What one pass works on: tokens, pictures, learned rows. From flags, from settings alone, or pack by pack from a scan.

`Work` is all that memory and time know of the data. The same numbers stand in the records that coefficients are fitted
from (benchmarks/results/memory-grid.json).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lensmith.config.tree import PACK_TOKENS, RunConfig

if TYPE_CHECKING:
    import numpy as np

    from lensmith.data.scan import Scan

IMAGE_SHARE = 0.6
"""Of a pack's tokens where there is no data to look at: one picture and a short question and answer to it."""
LEARNED_SHARE = 0.5
"""Of a sample's text, where there is no data to look at."""
PROMPT_TEXT_TOKENS = 100
"""Question and chat template in front of a completion, besides its pictures."""


@dataclass(frozen=True, slots=True)
class Work:
    """One pack, and how many such packs an optimizer step takes."""

    tokens: int
    learned: int
    """Rows that the head is read for."""
    samples: int = 1
    images: int = 0
    image_tokens: int = 0
    """Of all images together; each stands once, however many branches look at it."""
    key_tokens: int | None = None
    """Keys that all attention runs read together, where a shared prefix makes these more than `tokens`; None: as many."""
    prefixes: int = 1
    """How many shared prefixes there are, of equal length; means nothing without `key_tokens`."""
    packs_per_step: float = 1.0

    @property
    def group(self) -> int:
        """Samples that share a prefix; 1 where none do."""
        return 1 if self.key_tokens is None else max(1, self.samples // self.prefixes)

    @property
    def gathered_tokens(self) -> int:
        """Keys that are copied to stand behind one another; none where nothing is shared."""
        return self.key_tokens or 0

    @property
    def pairs(self) -> float:
        """Query-key pairs of causal attention: `samples` equal branches behind equal prefixes, which may be empty."""
        prefix = max(0.0, (self.key_tokens or self.tokens) - self.tokens) / self.samples
        branch = (self.tokens - self.prefixes * prefix) / self.samples
        return self.prefixes * prefix**2 / 2 + self.samples * branch * (prefix + branch / 2)

    def image_pairs(self, patches_per_token: int) -> float:
        """Query-key pairs of the tower, with images of equal size."""
        return (patches_per_token * self.image_tokens) ** 2 / self.images if self.images else 0.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """How completions are made and scored in GRPO."""

    group: int = 8
    completion_tokens: int = 512
    prompt_tokens: int = PROMPT_TEXT_TOKENS
    """Pictures included."""
    share_prefix: bool = True
    engine: Literal["builtin", "vllm", "server"] = "builtin"
    """vllm: beside the training in the same process, with weights of its own; server: on other GPUs."""
    gpu_share: float | None = None
    """Of the card's memory that vllm takes, where the settings say so; None: what it needs."""
    reserved_gib: float = 0.0
    """That share of a certain card."""
    passes: int = 1
    """Passes without gradients over each completion: under the old policy, and one more with a reference."""


def work_of(
    tokens: int, *, images: int = 0, image_tokens: int = 0, learned: int | None = None, effective_samples: int = 1
) -> Work:
    """A pack of `tokens` with `images` pictures of `image_tokens` each, one sample per picture."""
    seen = images * image_tokens
    samples = max(1, images)
    return Work(
        tokens=max(tokens, seen),
        learned=round(LEARNED_SHARE * max(0, tokens - seen)) if learned is None else learned,
        samples=samples,
        images=images,
        image_tokens=seen,
        packs_per_step=max(1, math.ceil(effective_samples / samples)),
    )


def scaled_work(work: Work, config: RunConfig) -> Work:
    """`work` as the settings make it: in packs of pack.tokens if that is less, its pictures within data.image.max_tokens."""
    tokens = min(work.tokens, config.pack.tokens or work.tokens)
    images = max(1, work.images * tokens // work.tokens) if work.images else 0
    size = min(work.image_tokens // work.images, config.data.image.max_tokens, tokens) if images else 0
    return work_of(
        tokens,
        images=images,
        image_tokens=size,
        learned=round(work.learned * tokens / work.tokens),
        effective_samples=config.optim.effective_samples,
    )


def full_pack(config: RunConfig) -> Work:
    """The pack that settings allow, where nothing is known of the data: full, most of it pictures of the largest size."""
    tokens = config.pack.tokens or PACK_TOKENS["cuda"]
    size = min(config.data.image.max_tokens, tokens)
    images = max(1, round(IMAGE_SHARE * tokens / size))
    return work_of(tokens, images=images, image_tokens=size, effective_samples=config.optim.effective_samples)


def group_work(rollout: Rollout, *, images: int, image_tokens: int, budget_tokens: int, effective_samples: int) -> Work:
    """The training pack of GRPO: as many whole groups as the budget holds, else as many completions of one, at least one."""
    prompt, completion = rollout.prompt_tokens, rollout.completion_tokens
    groups = max(1, effective_samples // rollout.group)
    if rollout.share_prefix:
        together = min(groups, budget_tokens // (prompt + rollout.group * completion))
        branches = together * rollout.group or min(rollout.group, max(1, (budget_tokens - prompt) // completion))
        prompts = max(1, together)
    else:
        branches = prompts = min(groups * rollout.group, max(1, budget_tokens // (prompt + completion)))
    work = Work(
        tokens=prompts * prompt + branches * completion,
        learned=branches * completion,
        samples=branches,
        images=images * prompts,
        image_tokens=images * image_tokens * prompts,
        packs_per_step=max(1, math.ceil(effective_samples / branches)),
    )
    return shared_work(work, prefixes=prompts) if rollout.share_prefix and branches > 1 else work


@dataclass(frozen=True, slots=True)
class PromptSize:
    """What every completion of a group follows."""

    text_tokens: int
    images: int
    image_tokens: int
    """Of all its pictures."""

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens


def largest_prompt(scan: Scan) -> tuple[PromptSize, int]:
    """The longest prompt of the scanned rows, its pictures as one, and which sample it is."""
    prompts = scan.tokens - scan.learned
    longest = int(prompts.argmax())
    seen = int(scan.image_tokens[longest])
    return PromptSize(int(prompts[longest]) - seen, min(1, seen), seen), longest


def rollout_of(config: RunConfig, prompt: PromptSize) -> Rollout:
    """How a run with these settings makes and scores completions of such prompts."""
    grpo, rollout = config.grpo, config.rollout
    beside = rollout.engine == "vllm" and rollout.vllm_mode == "colocate"
    return Rollout(
        grpo.group,
        grpo.max_new_tokens,
        prompt.tokens,
        share_prefix=config.pack.share_prefix,
        engine="builtin" if rollout.engine != "vllm" else "vllm" if beside else "server",
        gpu_share=rollout.vllm_gpu_share if beside else None,
        passes=2 if grpo.beta else 1,
    )


def written_at_once(rollout: Rollout, config: RunConfig) -> tuple[int, int]:
    """Prompts and completions whose keys and values the built-in engine holds at the same time: whole groups of a step."""
    groups = max(1, config.optim.effective_samples // rollout.group)
    if config.rollout.batch is not None:
        groups = min(groups, max(1, config.rollout.batch // rollout.group))
    return groups, groups * rollout.group


def shared_work(work: Work, *, prefixes: int) -> Work:
    """The same pack, where all that is not learned stands in `prefixes` prompts, each in front of as many completions."""
    prompt = (work.tokens - work.learned) // prefixes
    return replace(work, key_tokens=work.tokens + work.samples * prompt, prefixes=prefixes)


@dataclass(frozen=True, slots=True)
class ScannedPack:
    """One pack of the run, with the samples (positions in the scan's arrays) in it."""

    work: Work
    members: np.ndarray


@dataclass(frozen=True, slots=True)
class ScannedWork:
    """All packs of one epoch, as training will make them."""

    packs: tuple[ScannedPack, ...]
    steps: int
    """Of the whole run."""
    mean: Work
    """What time is reckoned with: the mean pack."""


def scanned_work(scan: Scan, config: RunConfig) -> ScannedWork:
    """The packs of the first epoch, by the order and the packing that training uses; reads nothing."""
    from lensmith.data.loader import plan_steps

    share = config.pack.share_prefix and not config.tune.dropout
    plan = plan_steps(
        scan,
        effective_samples=config.optim.effective_samples,
        seed=config.seed,
        epochs=config.optim.epochs,
        steps=config.optim.steps,
        share_prefix=share,
    )
    first = plan.steps[: plan.per_epoch]
    packs = tuple(pack for samples in first for pack in _packs(scan, config, samples, share))
    per_step = len(packs) / len(first)
    mean = Work(
        **{
            name: round(sum(getattr(pack.work, name) for pack in packs) / len(packs))
            for name in ("tokens", "learned", "samples", "images", "image_tokens")
        },
        packs_per_step=per_step,
    )
    return ScannedWork(packs, len(plan.steps), mean)


def worst_candidates(packs: Sequence[ScannedPack], each: int = 8) -> list[ScannedPack]:
    """Packs among which the one that needs most memory is, whatever the settings: the largest by each of its numbers."""
    measures = ("tokens", "image_tokens", "learned", "gathered_tokens")
    return [
        pack for name in measures for pack in heapq.nlargest(each, packs, key=lambda pack: getattr(pack.work, name))
    ]


def _packs(scan: Scan, config: RunConfig, samples: np.ndarray, share: bool) -> Iterator[ScannedPack]:
    from lensmith.data.pack import plan_packs

    if config.pack.together:
        packed = plan_packs(
            scan.tokens[samples],
            scan.prefix_tokens[samples],
            scan.groups[samples],
            budget_tokens=config.pack.tokens or PACK_TOKENS["cuda"],
            share_prefix=share,
        )
        members = [samples[pack] for pack in packed]
    else:
        members = list(samples[:, None])
    for pack in members:
        yield ScannedPack(_pack_work(scan, pack, share, packs_per_step=len(members)), pack)


def _pack_work(scan: Scan, members: np.ndarray, share: bool, *, packs_per_step: int) -> Work:
    """A pack's numbers; what a shared prefix holds counts once, and its keys are read by each branch."""
    groups: dict[int, list[int]] = {}
    for member in members.tolist():
        groups.setdefault(int(scan.groups[member]), []).append(member)
    tokens = keys = images = image_tokens = prefixes = 0
    for group in groups.values():
        own, pictured = int(scan.tokens[group].sum()), scan.image_tokens[group]
        prefix = int(scan.prefix_tokens[group[0]]) if share and len(group) > 1 else 0
        tokens += own - prefix * (len(group) - 1)
        keys += own + prefix
        prefixes += prefix > 0
        pictured = pictured[:1] if prefix else pictured
        images, image_tokens = images + int((pictured > 0).sum()), image_tokens + int(pictured.sum())
    return Work(
        tokens=tokens,
        learned=int(scan.learned[members].sum()),
        samples=len(members),
        images=images,
        image_tokens=image_tokens,
        key_tokens=keys if keys > tokens else None,
        prefixes=max(1, prefixes),
        packs_per_step=packs_per_step,
    )
