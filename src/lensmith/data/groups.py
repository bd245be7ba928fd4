"""Prompts for rollouts, and packs in which a prompt stands once before all of its completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensmith.data.boxes import convert_sample
from lensmith.data.images import read_patches
from lensmith.data.pack import pack_samples, plan_packs
from lensmith.data.source import SampleSource
from lensmith.types import IGNORE, Encoded, ImageSize, Pack, Sample, VisionGeometry


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model is asked it, and the sample that it comes from."""

    sample: Sample
    """Boxes in its texts as the model speaks them, so that rewards compare like with like."""
    encoded: Encoded
    """Up to the point where the answer begins; nothing is learned."""


def read_prompt(source: SampleSource, row: int) -> Prompt:
    """The prompt of that row number; its pictures as small as training sees them. No pixel is read.

    Raises:
        RowError: the row, or one of its pictures, cannot be used.
    """
    sample = source.sample(row)
    sizes = source.sizes(sample, max_tokens=source.caps.get(row))
    encoded = source.encoder.encode_prompt(sample, *sizes)
    return Prompt(convert_sample(sample, encoded.images, sample.boxes), encoded)


@dataclass(slots=True)
class GroupPacker:
    """Makes packs of prompts and completions; reads each picture once, until `forget`."""

    geometry: VisionGeometry
    image_token_id: int
    video_token_id: int | None
    budget_tokens: int
    share_prefix: bool = True
    pixel_dtype: torch.dtype = torch.float32
    name_picture: Callable[[ImageSize], str] | None = None
    """Names under which features are kept; None: digests of the pixels."""
    _pixels: dict[object, Float[Tensor, "patches values"]] = field(default_factory=dict)

    def forget(self) -> None:
        """Let go of the pictures."""
        self._pixels.clear()

    def pack_prompts(self, prompts: Sequence[Encoded]) -> Pack:
        """Each prompt once, in their order, each for itself."""
        return self._pack(prompts, share_prefix=False)

    def pack_completions(
        self, prompts: Sequence[Encoded], completions: Sequence[Sequence[int]], names: Sequence[str]
    ) -> list[Pack]:
        """Prompts and what was answered, one entry per completion, in packs of at most `budget_tokens`.

        Completions of one prompt share it; a group that does not fit one pack is cut, its prompt in each part. `names`
        become the packs' `wheres`: that is how a completion is found again, wherever packing put it.
        """
        samples = [_answered(*each) for each in zip(prompts, completions, names, strict=True)]
        groups: dict[object, int] = {}
        numbers = np.array([groups.setdefault(sample.prefix_key, len(groups)) for sample in samples])
        members = plan_packs(
            np.array([sample.num_tokens for sample in samples]),
            np.array([sample.prefix_tokens for sample in samples]),
            numbers,
            budget_tokens=self.budget_tokens,
            share_prefix=self.share_prefix,
        )
        return [self._pack([samples[n] for n in chosen], share_prefix=self.share_prefix) for chosen in members]

    def _pack(self, samples: Sequence[Encoded], *, share_prefix: bool) -> Pack:
        pack = pack_samples(
            samples,
            self.geometry,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            share_prefix=share_prefix,
            read=self._read,
            pixel_dtype=self.pixel_dtype,
            name_picture=self.name_picture,
            digest_pictures=True,
        )
        return pack.pin_memory() if torch.cuda.is_available() else pack

    def _read(self, image: ImageSize, geometry: VisionGeometry) -> Float[Tensor, "patches values"]:
        key = (image.ref.key, image.seen_px)
        if key not in self._pixels:
            self._pixels[key] = read_patches(image, geometry).to(self.pixel_dtype)
        return self._pixels[key]


def _answered(prompt: Encoded, answer: Sequence[int], name: str) -> Encoded:
    """The prompt with an answer that is learned."""
    ids: Int[np.ndarray, " answer"] = np.asarray(answer, dtype=prompt.input_ids.dtype)
    return replace(
        prompt,
        where=name,
        input_ids=np.concatenate([prompt.input_ids, ids]),
        labels=np.concatenate([np.full_like(prompt.input_ids, IGNORE), ids]),
        prefix_tokens=prompt.num_tokens,
    )
