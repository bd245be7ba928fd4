"""What rows cost, a chunk at a time: the part of a scan that worker processes do."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from lensmith.data.refusals import Refusal, Refusals
from lensmith.errors import RowError
from lensmith.types import Encoded, ImageSize, Moment, Sample

if TYPE_CHECKING:
    from lensmith.data.source import SampleSource

ROW_NUMBERS = {"rows": "q", "tokens": "i", "learned": "i", "prefix_tokens": "i", "groups": "q", "image_tokens": "i"}
"""Measured of each usable row, with the type code of the array that collects it: 32 bytes in all."""
IMAGE_NUMBERS = {"image_rows": "q", "image_keys": "q", "image_scales": "f", "image_changes": "b", "image_frames": "i"}
"""Measured of each image and video of such a row: its row, a digest of its key, side seen / side on disk, -1 where max_tokens
reduced it or 1 where min_tokens enlarged it, and the frames seen of a video, 0 for an image. 25 bytes."""


def _arrays() -> dict[str, array[Any]]:
    return {name: array(code) for name, code in (ROW_NUMBERS | IMAGE_NUMBERS).items()}


@dataclass(slots=True)
class Chunk:
    """What was measured of some rows, as growing arrays by name; a million rows with a picture each are 60 MB."""

    numbers: dict[str, array[Any]] = field(default_factory=_arrays)
    caps: dict[int, int] = field(default_factory=dict)
    """Row number -> tokens per image, for rows that only fit with smaller images."""
    refused: Refusals = field(default_factory=Refusals)
    dropped: Refusals = field(default_factory=Refusals)
    unlearned_answers: int = 0
    thoughts: int = 0

    def add(self, **numbers: float) -> None:
        """Append one number to each of the named arrays."""
        for name, number in numbers.items():
            self.numbers[name].append(number)

    def extend(self, later: Chunk) -> None:
        """Add what was measured of later rows."""
        for name, numbers in later.numbers.items():
            self.numbers[name].extend(numbers)
        self.caps |= later.caps
        self.refused.extend(later.refused)
        self.dropped.extend(later.dropped)
        self.unlearned_answers += later.unlearned_answers
        self.thoughts += later.thoughts


@dataclass(frozen=True, slots=True)
class Fitted:
    """A sample against the token budget."""

    original: Encoded
    """With images as their limits have them."""
    encoded: Encoded | None
    """As it fits; None where data.on_long=drop leaves it out."""
    cap: int | None = None
    """Most tokens of each of its images, where they were reduced to fit."""


@dataclass(frozen=True, slots=True)
class Measurer:
    """Measures rows of one source against a token budget."""

    source: SampleSource
    budget_tokens: int
    on_long: Literal["error", "shrink", "drop"]

    def measure(self, start: int, stop: int) -> Chunk:
        """Rows start .. stop - 1; those that cannot be used are refused, with the reason."""
        chunk = Chunk()
        for row in range(start, stop):
            try:
                sample = self.source.sample(row)
                self.add(row, sample, self.fit(row, sample), chunk)
            except RowError as fault:
                chunk.refused.add(Refusal(fault.where, fault.code, fault.sentence))
        return chunk

    def fit(self, row: int, sample: Sample) -> Fitted:
        """The sample of that row, with smaller images where it needs them.

        Raises:
            RowError: the sample cannot be used, or does not fit the budget.
        """
        original = self.source.encode(sample, max_tokens=self.source.caps.get(row), check=True)
        if original.num_tokens <= self.budget_tokens:
            return Fitted(original, original)
        if self.on_long == "drop":
            return Fitted(original, None)
        cap = self._cap(sample, original) if self.on_long == "shrink" else None
        if cap is None:
            tried = " and smaller images would not do" if self.on_long == "shrink" else ""
            raise RowError(
                sample.where,
                "too_long",
                f"{_needs(original)}, but pack.tokens is {self.budget_tokens:,}{tried}. "
                "Raise pack.tokens, shorten the row, or set data.on_long=drop.",
            )
        return Fitted(original, self.source.encode(sample, max_tokens=cap), cap)

    def add(self, row: int, sample: Sample, fitted: Fitted, chunk: Chunk) -> None:
        """Add the numbers of a fitted sample to those of its chunk."""
        if fitted.encoded is None:
            chunk.dropped.add(Refusal(sample.where, "too_long", self.excess(fitted.original)))
            return
        if fitted.cap is not None:
            chunk.caps[row] = fitted.cap
        chunk.unlearned_answers += self.source.encoder.unlearned_answers(sample)
        chunk.thoughts += sample.thoughts
        self._add(row, fitted.encoded, fitted.original, chunk)

    def excess(self, encoded: Encoded) -> str:
        """What to say of a row that is dropped because it is too long."""
        return f"{_needs(encoded)}, and pack.tokens is {self.budget_tokens:,}."

    def _cap(self, sample: Sample, encoded: Encoded) -> int | None:
        """The most tokens per image or moment with which the row fits, not below the least of an image; None where none."""
        room = self.budget_tokens - encoded.num_tokens + sum(image.tokens for image in encoded.images)

        def cost(cap: int) -> int:
            images, videos = self.source.sizes(sample, max_tokens=cap)
            return sum(size.tokens for size in itertools.chain(images, *videos))

        low = self.source.encoder.limits(sample.limits)[0] if sample.images else 1
        high = max((image.tokens for image in encoded.images), default=0)
        if not encoded.images or cost(low) > room:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= room else (low, middle)
        return low

    def _add(self, row: int, encoded: Encoded, original: Encoded, chunk: Chunk) -> None:
        key = encoded.prefix_key
        chunk.add(
            rows=row,
            tokens=encoded.num_tokens,
            learned=encoded.num_learned,
            prefix_tokens=encoded.prefix_tokens,
            # 63 bits of a digest instead of the key itself: 8 bytes per row. Packing compares the keys themselves.
            groups=-1 - row if key is None else _digest(repr(key[:-1]).encode() + key[-1]),
            image_tokens=sum(image.tokens for image in encoded.images),
        )
        for image in original.images:
            clip = image.ref.clip if isinstance(image.ref, Moment) else None
            if clip is None or image.ref == Moment(clip, 0):  # the moments of a video are of one size
                key = image.ref.key if clip is None else clip.video.key
                chunk.add(
                    image_rows=row,
                    image_keys=_digest(key.encode("utf-8", "surrogatepass")),
                    image_scales=image.scale,
                    image_changes=self._change(image),
                    image_frames=0 if clip is None else len(set(clip.frames)),
                )

    def _change(self, image: ImageSize) -> int:
        side = self.source.encoder.geometry.token_px
        height, width = image.original_px
        natural = round(height / side) * round(width / side)
        return (image.tokens > natural) - (image.tokens < natural)


def _needs(encoded: Encoded) -> str:
    image_tokens = sum(image.tokens for image in encoded.images)
    return f"needs {encoded.num_tokens:,} tokens, {image_tokens:,} of them for images"


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest()) >> 1
