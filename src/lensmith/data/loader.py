"""From row numbers to optimizer steps: which samples, in which packs, on which process; read ahead by workers.

One item of the loader is one optimizer step: all packs of this process and the number of learned tokens of the *whole*
step, so that the trainer divides once and unequal packs weigh right. The order is fixed by the seed before the first
step; only row numbers are shuffled, and rows and pixels stay on disk until a worker needs them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from lensmith.data.pack import pack_samples, plan_packs
from lensmith.types import Encoded, Pack, VisionGeometry

if TYPE_CHECKING:
    from lensmith.data.scan import Scan

SAME_IMAGE_SHARE = 4
"""At most one in so many samples of a step asks about one image: sharing a prefix pays, but such samples repeat each other."""

PREFETCH_STEPS = 2
MAX_WORKERS = 8


@dataclass(frozen=True, slots=True)
class StepPacks:
    """The packs of one optimizer step on one process."""

    packs: tuple[Pack, ...]
    learned_tokens: int
    """Of the whole step, over all processes: the loss is divided by this."""
    samples: int
    """Of the whole step."""

    def pin_memory(self) -> StepPacks:
        return StepPacks(tuple(pack.pin_memory() for pack in self.packs), self.learned_tokens, self.samples)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which samples of a scan make up each step; positions in the scan's arrays, not row numbers."""

    steps: tuple[Int[np.ndarray, " samples"], ...]
    per_epoch: int

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.steps))


def plan_steps(
    scan: Scan,
    *,
    effective_samples: int,
    seed: int,
    epochs: float,
    steps: int | None = None,
    share_prefix: bool = True,
    world: int = 1,
) -> StepPlan:
    """Seeded order of all samples, epoch after epoch, cut into steps; `steps` overrides `epochs`.

    Samples that share a prefix stay together, as far as SAME_IMAGE_SHARE lets them. Every sample is seen once per epoch:
    the last step of an epoch may be smaller, or larger where what is left is less than one sample per process.
    """
    planned = itertools.chain.from_iterable(
        _plan_epoch(scan, effective_samples, np.random.default_rng([seed, epoch]), share_prefix, world)
        for epoch in itertools.count()
    )
    per_epoch = steps_per_epoch(len(scan.tokens), effective_samples, world)
    return StepPlan(tuple(itertools.islice(planned, steps or max(1, round(per_epoch * epochs)))), per_epoch)


def steps_per_epoch(samples: int, effective_samples: int, world: int = 1) -> int:
    """Optimizer steps that see every sample once."""
    full, rest = divmod(samples, effective_samples)
    return max(1, full + (rest >= world))


def _plan_epoch(
    scan: Scan, effective_samples: int, generator: np.random.Generator, share_prefix: bool, world: int
) -> Iterator[Int[np.ndarray, " samples"]]:
    order = generator.permutation(len(scan.tokens))
    if share_prefix:
        most = max(1, effective_samples // SAME_IMAGE_SHARE)
        pieces = _gather_groups(order, scan.groups, scan.prefix_tokens, most)
        # Shuffled once more: a piece stands where its first member stood, so rows without company would all come late.
        order = np.array([sample for piece in generator.permutation(len(pieces)) for sample in pieces[piece]])
    cuts = effective_samples * np.arange(1, steps_per_epoch(len(order), effective_samples, world))
    yield from np.split(order, cuts)


def _gather_groups(
    order: Int[np.ndarray, " samples"], groups: np.ndarray, prefix_tokens: np.ndarray, most: int
) -> list[list[int]]:
    """Samples of one group in pieces of at most `most`, each sample without a prefix in a piece of its own."""
    pieces: list[list[int]] = []
    open_piece: dict[int, list[int]] = {}
    for sample in order.tolist():
        group = int(groups[sample])
        piece = open_piece.get(group)
        if piece is None or len(piece) >= most or not prefix_tokens[sample]:
            piece = open_piece[group] = []
            pieces.append(piece)
        piece.append(sample)
    return pieces


class StepDataset(Dataset[StepPacks]):
    """Item i is optimizer step i, read and packed for one of `world` processes."""

    def __init__(
        self,
        scan: Scan,
        plan: StepPlan,
        geometry: VisionGeometry,
        *,
        image_token_id: int,
        video_token_id: int | None = None,
        budget_tokens: int,
        share_prefix: bool,
        padded: bool = False,
        together: bool = True,
        pixel_dtype: torch.dtype = torch.float32,
        digest_pictures: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.scan, self.plan, self.geometry = scan, plan, geometry
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        self.budget_tokens, self.share_prefix = budget_tokens, share_prefix
        self.padded = padded
        """Whether packs will be batches of padded rows (`plan_packs`)."""
        self.together, self.rank, self.world = together, rank, world
        # The tower rounds its input to its own type anyway; rounded here, half as many bytes are pinned and copied.
        self.pixel_dtype = pixel_dtype
        self.digest_pictures = digest_pictures

    def __len__(self) -> int:
        return len(self.plan.steps)

    def __getitem__(self, step: int) -> StepPacks:
        samples = self.plan.steps[step]
        packs = [
            pack_samples(
                [self.encoded(sample) for sample in members],
                self.geometry,
                image_token_id=self.image_token_id,
                video_token_id=self.video_token_id,
                share_prefix=self.share_prefix,
                pixel_dtype=self.pixel_dtype,
                digest_pictures=self.digest_pictures,
            )
            for members in self.members(step)
        ]
        return StepPacks(tuple(packs), int(self.scan.learned[samples].sum()), len(samples))

    def encoded(self, sample: int) -> Encoded:
        """One sample of the scan, read and encoded again."""
        return self.scan.source.encoded(int(self.scan.rows[sample]))

    def members(self, step: int) -> list[Int[np.ndarray, " samples"]]:
        """Samples of each pack of this process."""
        samples = self.plan.steps[step]
        if not self.together:
            return self._share_out(list(samples[:, None]))[self.rank]
        packs = [
            samples[pack]
            for pack in plan_packs(
                self.scan.tokens[samples],
                self.scan.prefix_tokens[samples],
                self.scan.groups[samples],
                budget_tokens=self.budget_tokens,
                share_prefix=self.share_prefix,
                padded=self.padded,
            )
        ]
        return self._share_out(packs)[self.rank]

    def _share_out(self, packs: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Packs for each process: the largest first, each to the process with the fewest tokens so far."""
        while len(packs) < self.world and max(map(len, packs)) > 1:
            packs.sort(key=len)
            largest = packs.pop()
            packs += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        shares: list[list[np.ndarray]] = [[] for _ in range(self.world)]
        load = np.zeros(self.world)
        for pack in sorted(packs, key=lambda pack: -int(self.scan.tokens[pack].sum())):
            lightest = int(load.argmin())
            shares[lightest].append(pack)
            load[lightest] += int(self.scan.tokens[pack].sum())
        return shares


def step_loader(dataset: StepDataset, *, workers: int, pin_memory: bool) -> DataLoader[StepPacks]:
    """Steps in order, read ahead by worker processes. A batch of one with its wrapper taken off again: a loader with a
    batch sampler is what accelerate can skip ahead in when a run resumes, without reading what it skips."""
    return DataLoader(
        dataset,
        batch_size=1,
        shuffle=False,
        collate_fn=_only,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH_STEPS if workers else None,
        persistent_workers=bool(workers),
        worker_init_fn=_one_thread,
    )


def _only(items: list[StepPacks]) -> StepPacks:
    (item,) = items
    return item


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def choose_workers(wanted: int | None, *, gpu: bool) -> int:
    """Data workers: what was asked for; else on a GPU one per spare core, at most MAX_WORKERS; on a CPU none, because
    they would take the cores that train."""
    if wanted is not None:
        return wanted
    return min(MAX_WORKERS, max(1, (os.cpu_count() or 1) - 1)) if gpu else 0
