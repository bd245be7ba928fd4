"""What the checks ask about: rows of the run's data where they are still there, else pictures drawn here."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lensmith.config.tree import RunConfig
from lensmith.data.encode import Encoder
from lensmith.data.source import SampleSource
from lensmith.errors import LensmithError, RowError
from lensmith.evals.predict import draw_samples
from lensmith.train.prepare import scan_one, scan_rows
from lensmith.types import ImageMark, ImageRef, Message, Sample, Text

if TYPE_CHECKING:
    import torch

PROMPTS = 8
"""Image prompts on which logits and inputs are compared."""
DRAWN_PX = (96, 128)
"""Height and width of a drawn picture: larger than the fewest tokens of any checkpoint's own limits would enlarge."""


@dataclass(frozen=True, slots=True)
class Material:
    """Rows to ask about."""

    source: SampleSource | None
    """Of the rows below; None where there are none."""
    rows: tuple[int, ...]
    """Held-out ones, or where nothing is held out those that trained."""
    held_out: bool
    why: str
    """Where the rows come from, or why there are none."""

    def samples(self, count: int, seed: int, *, pictures: bool = False) -> list[Sample]:
        """At most `count` readable samples drawn by the seed; with `pictures`, only those with images and no video."""
        if self.source is None:
            return []
        found: list[Sample] = []
        for row in np.random.default_rng(seed).permutation(np.array(self.rows)).tolist():
            if len(found) == count:
                break
            try:
                sample = self.source.sample(row)
            except RowError:  # `lensmith check` tells of it
                continue
            if not pictures or (sample.images and not sample.videos):
                found.append(sample)
        return found

    def asked(self, count: int, seed: int) -> list[Sample]:
        """Held-out samples with answers, as `lensmith eval` draws them."""
        if self.source is None or not self.held_out:
            return []
        read = [self.source.sample(row) for row in draw_samples(self.rows, count, seed)]
        return [sample for sample in read if sample.answer.strip()]


def find_material(config: RunConfig, encoder: Encoder, device: torch.device) -> Material:
    """Rows that the run held out; those it trained on where it held nothing out; none where its data is gone."""
    try:
        if isinstance(config.data.test, str):
            train, held_out = None, scan_one(config, encoder, device, "test", _silent)
        else:
            train, held_out = scan_rows(config, encoder, device, _silent)
    except LensmithError as fault:
        return Material(None, (), held_out=False, why=f"the run's data cannot be read ({fault})")
    scan = train if held_out is None else held_out
    assert scan is not None, "one of the two was read"
    rows = tuple(np.unique(scan.rows).tolist())  # a weight above 1 repeats rows for training, not for asking
    kind = "training" if held_out is None else "held-out"
    return Material(scan.source, rows, held_out=held_out is not None, why=f"{len(rows):,} {kind} rows")


def image_prompts(material: Material, seed: int) -> tuple[list[Sample], str]:
    """PROMPTS samples with pictures, the same ones each time, and where they are from; drawn ones where rows have none."""
    found = material.samples(PROMPTS, seed, pictures=True)
    if found:
        return found, "of the run's rows"
    return drawn_prompts(), "drawn here"


def drawn_prompts() -> list[Sample]:
    """PROMPTS questions about simple pictures, always the same."""
    question = (ImageMark(0), Text("What is in the image?"))
    return [
        Sample(f"drawn picture {number + 1}", (Message("user", question),), (_picture(number),))
        for number in range(PROMPTS)
    ]


def _picture(number: int) -> ImageRef:
    """A shape on a ground, each of another colour, size and place."""
    from PIL import Image, ImageDraw

    height, width = DRAWN_PX
    image = Image.new("RGB", (width + 32 * (number % 3), height), _colour(2 * number))
    draw = ImageDraw.Draw(image)
    left, top, side = 6 + 5 * number, 4 + 3 * number, 30 + 4 * number
    shapes = (draw.rectangle, draw.ellipse)
    shapes[number % 2]((left, top, left + side, top + side), fill=_colour(2 * number + 1))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return ImageRef(buffer.getvalue(), f"drawn {number}")


def _colour(number: int) -> tuple[int, ...]:
    """Far apart from its neighbours: steps of 97 and 53 have no common divisor with 256."""
    return tuple((40 + step * number) % 256 for step in (97, 53, 151))


def _silent(_: object) -> None:
    """What the scan has to say was said when the run was trained."""
