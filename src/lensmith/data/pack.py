"""Several samples in one row: no padding, and one copy of an image however many questions are asked about it.

    samples     [image A · q1 a1]  [image A · q2 a2]  [q3 a3]
    pack        image A | q1 a1 | q2 a2 | q3 a3
    segments    prefix    branch  branch  alone

A branch reads its prefix and itself; positions restart with each sample and go on from the prefix in each branch. That
makes loss and gradients those of the samples one by one (tests/reference/test_pack.py).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensmith.data.images import grid_of, read_patches
from lensmith.data.positions import mrope_positions
from lensmith.types import Encoded, ImageSize, Pack, Segment, VisionGeometry

PixelReader = Callable[[ImageSize, VisionGeometry], Float[Tensor, "patches values"]]


def pack_samples(
    samples: Sequence[Encoded],
    geometry: VisionGeometry,
    *,
    image_token_id: int,
    video_token_id: int | None = None,
    share_prefix: bool = True,
    read: PixelReader = read_patches,
    pixel_dtype: torch.dtype | None = None,
    digest_pictures: bool = False,
    name_picture: Callable[[ImageSize], str] | None = None,
) -> Pack:
    """Lay samples end to end, those that share a prefix together; reads the pixels, in `pixel_dtype` if one is given.

    `digest_pictures`: whether somebody keeps features by `Pack.pictures`; they are there anyway if a picture repeats.
    `name_picture`: gives names that stand for the pixels, where digests would cost too much; None: digests.
    """
    parts = _Parts(geometry, image_token_id, video_token_id)
    for members in _groups(samples, share_prefix):
        first = samples[members[0]]
        prefix = None
        if len(members) > 1:
            prefix = parts.add(first, slice(0, first.prefix_tokens), None)
        for member in members:
            start = 0 if prefix is None else samples[member].prefix_tokens
            parts.add(samples[member], slice(start, None), prefix)
        parts.images.extend(first.images)
    names = [(image.ref.key, image.seen_px) for image in parts.images]
    distinct = {
        name: read(image, geometry).to(dtype=pixel_dtype)
        for name, image in dict(zip(names, parts.images, strict=True)).items()
    }
    digests: dict[Any, str] = {}
    if digest_pictures or len(distinct) < len(names):
        images = dict(zip(names, parts.images, strict=True))
        named = (
            (lambda name: digest_pixels(distinct[name], name[1]))
            if name_picture is None
            else (lambda name: name_picture(images[name]))
        )
        digests = {name: named(name) for name in distinct}
    pixels = [distinct[name] for name in names]
    return Pack(
        input_ids=torch.from_numpy(np.concatenate(parts.input_ids)),
        labels=torch.from_numpy(np.concatenate(parts.labels)),
        positions=torch.from_numpy(np.concatenate(parts.positions, axis=1)),
        segments=tuple(parts.segments),
        pixels=torch.cat(pixels) if pixels else torch.empty(0, geometry.patch_values, dtype=pixel_dtype),
        grids=torch.tensor([grid_of(image, geometry) for image in parts.images], dtype=torch.int64).reshape(-1, 3),
        wheres=tuple(samples[member].where for members in _groups(samples, share_prefix) for member in members),
        pictures=tuple(digests[name] for name in names if digests),
    )


def digest_pixels(pixels: Float[Tensor, "patches values"], seen_px: tuple[int, int]) -> str:
    """Equal for equal pixels of equal shape, whatever file they came from and whatever happens to that file later.

    SHA-256 (half of it), because processors have instructions for it: per 1,000 tokens in bf16 14 ms on one core, where
    blake2b takes 30 and reading and resizing a JPEG 67.
    """
    digest = hashlib.sha256(repr((seen_px, pixels.dtype)).encode())
    digest.update(pixels.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class _Parts:
    """The growing row."""

    def __init__(self, geometry: VisionGeometry, image_token_id: int, video_token_id: int | None) -> None:
        self.geometry, self.image_token_id, self.video_token_id = geometry, image_token_id, video_token_id
        self.input_ids: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.images: list[ImageSize] = []

    def add(self, sample: Encoded, tokens: slice, parent: int | None) -> int:
        """Append those tokens of the sample as one segment; returns its index."""
        start = self.segments[-1].stop if self.segments else 0
        ids = sample.input_ids[tokens].astype(np.int64)
        self.input_ids.append(ids)
        self.labels.append(sample.labels[tokens].astype(np.int64))
        self.positions.append(self._positions(sample)[:, tokens])
        self.segments.append(Segment(start, len(ids), parent))
        return len(self.segments) - 1

    def _positions(self, sample: Encoded) -> Int[np.ndarray, "4 tokens"]:
        grids = [grid_of(image, self.geometry) for image in sample.images]
        return mrope_positions(
            sample.input_ids,
            grids,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            merge=self.geometry.merge,
        ).astype(np.int64)


def _groups(samples: Sequence[Encoded], share_prefix: bool) -> list[list[int]]:
    """Sample numbers that share a prefix, in order of first appearance; every other sample alone."""
    groups: dict[object, list[int]] = {}
    for number, sample in enumerate(samples):
        key = sample.prefix_key if share_prefix else None
        groups.setdefault(("alone", number) if key is None else key, []).append(number)
    return list(groups.values())


def plan_packs(
    tokens: Int[np.ndarray, " samples"],
    prefix_tokens: Int[np.ndarray, " samples"],
    groups: Int[np.ndarray, " samples"],
    *,
    budget_tokens: int,
    share_prefix: bool = True,
    padded: bool = False,
) -> list[Int[np.ndarray, " members"]]:
    """Which samples go together into packs of at most `budget_tokens`, by first fit, longest first.

    `padded`: each sample counts as many tokens as the longest of its pack, because it will be a row of a batch.

    Samples of one group count their prefix once. A group larger than the budget is cut, its prefix counted again in each
    piece. A single sample over the budget gets a pack of its own: the scan has already dealt with such rows.
    """
    pieces: list[tuple[int, list[int]]] = []
    for members in _group_members(groups, prefix_tokens, share_prefix):
        prefix = int(prefix_tokens[members[0]]) if len(members) > 1 else 0
        size, piece = prefix, []
        for member in members:
            own = int(tokens[member]) - prefix
            if piece and size + own > budget_tokens:
                pieces.append((size, piece))
                size, piece = prefix, []
            size, piece = size + own, [*piece, member]
        pieces.append((size, piece))
    return _first_fit(pieces, budget_tokens, padded)


def _group_members(groups: np.ndarray, prefix_tokens: np.ndarray, share_prefix: bool) -> list[list[int]]:
    members: dict[object, list[int]] = {}
    for number, (group, prefix) in enumerate(zip(groups.tolist(), prefix_tokens.tolist(), strict=True)):
        members.setdefault(group if prefix and share_prefix else ("alone", number), []).append(number)
    return list(members.values())


def _first_fit(
    pieces: list[tuple[int, list[int]]], budget_tokens: int, padded: bool
) -> list[Int[np.ndarray, " members"]]:
    room: list[int] = []
    longest: list[int] = []
    packs: list[list[int]] = []
    for size, piece in sorted(pieces, key=lambda item: -item[0]):
        takes = longest if padded else [size] * len(room)
        slot = next((n for n, (free, taken) in enumerate(zip(room, takes, strict=True)) if taken <= free), None)
        if slot is None:
            slot = len(packs)
            packs.append([])
            room.append(budget_tokens)
            longest.append(size)
        packs[slot].extend(piece)
        room[slot] -= longest[slot] if padded else size
    return [np.array(pack) for pack in packs]


def split_pack(pack: Pack, *, picture_ids: Collection[int]) -> tuple[Pack, Pack] | None:
    """Two packs that hold the samples of one, in order, cut where the larger is smallest; None for a single sample.

    A shared prefix stands in both where the cut goes through its branches. `picture_ids`: the tokens that stand for
    pictures. Losses are sums, so the two have the loss and the gradient of the one (tests/unit/test_split_pack.py).
    """
    samples = _sample_segments(pack)
    if len(samples) == 1:
        return None

    def larger_tokens(cut: int) -> int:
        return max(_count_tokens(pack, samples[:cut]), _count_tokens(pack, samples[cut:]))

    members = range(len(samples))
    cut = min(members[1:], key=larger_tokens)
    return _take_samples(pack, members[:cut], picture_ids), _take_samples(pack, members[cut:], picture_ids)


def sample_tokens(pack: Pack) -> list[int]:
    """Tokens of each sample of a pack, each with its prefix, in the order of `Pack.wheres`."""
    return [_count_tokens(pack, [sample]) for sample in _sample_segments(pack)]


def _sample_segments(pack: Pack) -> list[list[int]]:
    """Of each sample its segments: itself, behind the prefix that it may share."""
    prefixes = {segment.parent for segment in pack.segments}
    own = [number for number in range(len(pack.segments)) if number not in prefixes]
    return [[n] if (parent := pack.segments[n].parent) is None else [parent, n] for n in own]


def _count_tokens(pack: Pack, samples: Sequence[Sequence[int]]) -> int:
    return sum(pack.segments[number].length for number in set(itertools.chain.from_iterable(samples)))


def _take_samples(pack: Pack, members: Sequence[int], picture_ids: Collection[int]) -> Pack:
    """The pack of those samples alone, with what they look at."""
    of_samples = _sample_segments(pack)
    numbers = sorted(set(itertools.chain.from_iterable(of_samples[member] for member in members)))
    stays = torch.zeros(pack.num_tokens, dtype=torch.bool)
    segments: list[Segment] = []
    for number in numbers:
        segment = pack.segments[number]
        stays[segment.start : segment.stop] = True
        start = segments[-1].stop if segments else 0
        parent = None if segment.parent is None else numbers.index(segment.parent)
        segments.append(Segment(start, segment.length, parent))
    seen = stays[_first_tokens(pack, picture_ids)]
    return replace(
        pack,
        input_ids=pack.input_ids[stays],
        labels=pack.labels[stays],
        positions=pack.positions[:, stays],
        segments=tuple(segments),
        pixels=pack.pixels[seen.repeat_interleave(pack.grids.prod(-1))],
        grids=pack.grids[seen],
        wheres=tuple(pack.wheres[member] for member in members),
        pictures=tuple(itertools.compress(pack.pictures, seen.tolist())),
    )


def _first_tokens(pack: Pack, picture_ids: Collection[int]) -> Int[Tensor, " images"]:
    """Where each picture of the pack begins in its row of tokens."""
    rows = torch.isin(pack.input_ids, torch.tensor(list(picture_ids))).nonzero()[:, 0]
    patches = pack.grids.prod(-1)
    patches_per_token = max(1, int(patches.sum())) // max(1, len(rows))
    return rows[(patches.cumsum(0) - patches) // patches_per_token]
