"""Check of what goes in: the saved processor, called as its users call it, gives the ids and pixels that training saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lensmith.data.boxes import convert_messages
from lensmith.data.encode import Encoder
from lensmith.data.images import open_image
from lensmith.evals.predict import picture_inputs
from lensmith.export.verify.check import Check, at_most, listed
from lensmith.types import Encoded, ImageMark, Sample, Text

PIXEL_TOLERANCE = 1e-5
"""Of normalised pixels, which lie between -1 and 1; one grey level is 8e-3."""
COPY = "Copy chat_template.jinja and the tokenizer's files from the base model, or from the run's tuned folder."


@dataclass(frozen=True, slots=True)
class Difference:
    """One row that the processor reads otherwise than training did."""

    where: str
    what: str


def check_inputs(folders: Sequence[Path], encoder: Encoder, samples: Sequence[Sample], prompts: str) -> Check:
    """Ask the processors of all folders about all samples; those with pictures that have limits of their own get them."""
    prepared = [(sample, encoder.encode_prompt(sample)) for sample in samples]
    told = (
        f"{len(prepared)} prompts {prompts}, through the processor in {' and '.join(folder.name for folder in folders)}"
    )
    if own := sorted({str(size) for sample in samples if (size := _own_size(sample, encoder)) is not None}):
        told += f"; for the pictures with limits of their own pass size={listed(own)}"
    count, faults = 0, []
    for folder in folders:
        differ, remedy = _ask_processor(folder, encoder, prepared)
        count += len(differ)
        if differ:
            faults.append(
                f"{folder}: {len(differ)} of {len(prepared)} prompts are read otherwise than in training, first "
                f"{differ[0].where}: {differ[0].what}. {remedy}"
            )
    return at_most("inputs", count, 0, told, " ".join(faults))


def _ask_processor(
    folder: Path, encoder: Encoder, prepared: Sequence[tuple[Sample, Encoded]]
) -> tuple[list[Difference], str]:
    """What it reads otherwise, and what to do about it."""
    from jinja2 import TemplateError
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as cause:
        line = str(cause).strip().partition("\n")[0]
        return [Difference(sample.where, f"it does not load ({line})") for sample, _ in prepared], COPY
    differ = []
    for sample, encoded in prepared:
        try:
            found = compare_inputs(processor, encoder, sample, encoded, _own_size(sample, encoder))
        except TemplateError as cause:
            found = Difference(sample.where, f"its chat template refuses the question ({cause})")
        if found:
            differ.append(found)
    return differ, _remedy(processor, encoder)


def compare_inputs(
    processor: Any, encoder: Encoder, sample: Sample, encoded: Encoded, size: dict[str, int] | None = None
) -> Difference | None:
    """What differs first between training's ids and pixels and those of a plain call of the processor.

    `size`: passed on to the image processor, where the sample's pictures have limits of their own.
    """
    given = processor.apply_chat_template(
        as_user(sample, encoded),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        **({} if size is None else {"processor_kwargs": {"images_kwargs": {"size": size}}}),
    )
    theirs, ours = given["input_ids"][0].numpy(), encoded.input_ids
    pictures = picture_inputs(encoded.images, encoder.geometry)
    if not pictures or "image_grid_thw" not in given:
        return None if not pictures and np.array_equal(ours, theirs) else Difference(sample.where, _ids(ours, theirs))
    grids, their_grids = pictures["image_grid_thw"], given["image_grid_thw"]
    if not torch.equal(grids, their_grids):
        seen, other = (_told_px(found, encoder.geometry.patch_px) for found in (grids, their_grids))
        return Difference(sample.where, f"pictures of {seen} px in training, of {other} px here")
    if not np.array_equal(ours, theirs):
        return Difference(sample.where, _ids(ours, theirs))
    apart = float((pictures["pixel_values"] - given["pixel_values"]).abs().max())
    if not apart <= PIXEL_TOLERANCE:
        return Difference(sample.where, f"pixels differ by up to {apart:.2g}")
    return None


def _told_px(grids: torch.Tensor, patch_px: int) -> str:
    """Heights and widths of pictures from their grids of patches."""
    return listed([f"{rows * patch_px} x {columns * patch_px}" for _, rows, columns in grids.tolist()])


def _ids(ours: np.ndarray, theirs: np.ndarray) -> str:
    shorter = min(len(ours), len(theirs))
    unequal = np.flatnonzero(ours[:shorter] != theirs[:shorter])
    place = int(unequal[0]) if len(unequal) else shorter
    return f"{len(ours)} token ids in training, {len(theirs)} here, the first other one at {place}"


def as_user(sample: Sample, encoded: Encoded, *, opened: bool = False) -> list[dict[str, Any]]:
    """The question as messages, the way that model cards show it; boxes as training converted them.

    `opened`: with pictures in RGB and upright, where these would else be paths.
    """
    turns = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
    messages = []
    for message in convert_messages(turns, sample, encoded.images, sample.boxes):
        parts: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, Text):
                parts.append({"type": "text", "text": part.text})
            elif isinstance(part, ImageMark):
                ref = sample.images[part.index]
                plain = isinstance(ref.source, Path) and ref.member is None and ref.page is None and not opened
                parts.append({"type": "image", "image": str(ref.source) if plain else open_image(ref)})
        messages.append({"role": message.role, "content": parts})
    return messages


def _own_size(sample: Sample, encoder: Encoder) -> dict[str, int] | None:
    return None if sample.limits is None else size_of(encoder, *encoder.limits(sample.limits))


def size_of(encoder: Encoder, min_tokens: int, max_tokens: int) -> dict[str, int]:
    """Limits in tokens as transformers' image processor takes them: areas in pixels, despite their names."""
    area = encoder.geometry.token_px**2
    return {"shortest_edge": min_tokens * area, "longest_edge": max_tokens * area}


def _remedy(processor: Any, encoder: Encoder) -> str:
    wanted = size_of(encoder, encoder.min_tokens, encoder.max_tokens)
    size = processor.image_processor.size
    found = {key: size[key] for key in wanted}
    if found != wanted:
        return f"Its image size is {found}: set it to {wanted} in the processor's settings, or pass size={wanted}."
    return COPY
