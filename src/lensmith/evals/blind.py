"""Are the pictures used? The loss of the right answers under their own pictures, under others', and under plain grey.

A model that learns to answer from the words alone loses as little as one that looks, until it is asked something new. So
each answer is scored three times, with nothing changed but the pixels: same question, same sizes, same tokens. What tells
is the other picture, a real one that does not belong; grey is shown beside it, but a model may also lose for never having
seen a grey one.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.data.images import read_patches
from lensmith.data.pack import pack_samples
from lensmith.errors import DataError, RowError
from lensmith.evals.intervals import CONFIDENCE, RESAMPLES
from lensmith.types import Encoded, ImageRef, Moment

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from lensmith.data.source import SampleSource

GREY = 127
"""Of 255: the middle, where Qwen3-VL's normalised pixels are nearly 0."""


@dataclass(frozen=True, slots=True)
class BlindResult:
    """Losses in nats per learned token, over the same answers."""

    loss_right: float
    loss_shuffled: float
    """With pictures of other rows, resized to the sizes of the right ones."""
    loss_grey: float
    gap_low: float
    """The 95 % interval of loss_shuffled - loss_right."""
    gap_high: float
    n: int
    """Answers, each in a row with at least one picture."""

    @property
    def gap(self) -> float:
        """What a wrong picture costs, in nats per learned token."""
        return self.loss_shuffled - self.loss_right

    @property
    def is_used(self) -> bool:
        """Whether wrong pictures make the answers less likely, beyond what chance explains."""
        return self.gap_low > 0

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        change = f"{self.gap:+.3f} nats per token, 95 % interval {self.gap_low:+.3f} to {self.gap_high:+.3f}"
        losses = f"loss {self.loss_right:.3f} with the right image, {self.loss_shuffled:.3f} with another row's"
        told = f"({losses}, {self.loss_grey:.3f} with a grey one: {change}, n = {self.n})"
        if self.is_used:
            return f"Images are used: the wrong one makes the answers less likely {told}."
        if self.gap_high < 0:
            return f"Images are not used: the right one even makes the answers less likely {told}."
        return f"Images are not used: the wrong one changes the loss by no more than chance does {told}."


def blind_test(model: Any, source: SampleSource, rows: Sequence[int], *, samples: int = 32, seed: int) -> BlindResult:
    """Score the answers of `samples` rows that have pictures; `seed` draws them, their wrong pictures and the interval.

    `model`: an Engine, with or without adapters; it is left in the mode it was in.

    Raises:
        DataError: fewer than two of the rows can be used, or they all show the same pictures.
    """
    generator = np.random.default_rng(seed)
    right = _drawn(source, generator.permutation(np.unique(rows)), samples)
    views = (right, _shuffled(right, generator), [_with_pictures(one, [_grey()]) for one in right])
    losses = np.array([_answer_nats(model, source, view) for view in views])
    tokens = np.array([one.num_learned for one in right])
    low, high = _bootstrap(losses[1] - losses[0], tokens, generator)
    loss_right, loss_shuffled, loss_grey = (losses.sum(axis=1) / tokens.sum()).tolist()
    return BlindResult(loss_right, loss_shuffled, loss_grey, low, high, len(right))


def _drawn(source: SampleSource, order: Int[np.ndarray, " rows"], samples: int) -> list[Encoded]:
    """The first rows in that order that can be used, have a picture and learn something."""
    drawn: list[Encoded] = []
    for row in order.tolist():
        if len(drawn) == samples:
            break
        try:
            encoded = source.encoded(row)
            for image in encoded.images:  # damage inside a file shows only now
                read_patches(image, source.encoder.geometry)
        except RowError:  # the scan, or `lensmith check`, has told of it
            continue
        if encoded.images and encoded.num_learned:
            drawn.append(encoded)
    if len(drawn) < 2:
        raise DataError(
            f"blind test: {len(drawn)} of {len(order):,} rows have a picture and an answer, and at least 2 are needed "
            "to show one row the picture of another. Name rows with pictures in data.train."
        )
    return drawn


def _shuffled(right: Sequence[Encoded], generator: np.random.Generator) -> list[Encoded]:
    """Each sample with the pictures of another one, none of which is its own; as often as its frames need."""
    shown = [{image.ref.key for image in one.images} for one in right]
    shuffled = []
    for one, own in zip(right, shown, strict=True):
        others = [number for number, keys in enumerate(shown) if own.isdisjoint(keys)]
        if not others:
            raise DataError(
                f"blind test: {one.where} shares a picture with each of the {len(right)} rows that were drawn, so none has "
                "others to put in their place; use rows with different pictures."
            )
        other = right[others[generator.integers(len(others))]]
        shuffled.append(_with_pictures(one, [image.ref for image in other.images]))
    return shuffled


def _with_pictures(encoded: Encoded, refs: Sequence[ImageRef | Moment]) -> Encoded:
    """Those pictures in turn, in the same frames: sizes seen, and so tokens and positions, stay what they were."""
    images = tuple(replace(image, ref=ref) for image, ref in zip(encoded.images, itertools.cycle(refs), strict=False))
    return replace(encoded, images=images)


@functools.cache
def _grey() -> ImageRef:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), (GREY, GREY, GREY)).save(buffer, "PNG")
    return ImageRef(buffer.getvalue(), "grey")


def _answer_nats(model: Any, source: SampleSource, samples: Sequence[Encoded]) -> list[float]:
    """Loss of each sample's learned tokens, summed; one sample per pass, so that memory is that of the longest."""
    import torch

    encoder, training = source.encoder, model.training
    pack = functools.partial(
        pack_samples,
        geometry=encoder.geometry,
        image_token_id=encoder.image_token_id,
        video_token_id=encoder.video_token_id,
    )
    model.eval()
    with torch.inference_mode():
        nats = [-float(model(pack=pack([one])).sum()) for one in samples]
    model.train(training)
    return nats


def _bootstrap(
    differences: Float[np.ndarray, " samples"], tokens: Int[np.ndarray, " samples"], generator: np.random.Generator
) -> tuple[float, float]:
    """Percentile interval of sum(differences) / sum(tokens) over samples drawn with replacement.

    Paired: a sample brings its difference and its tokens together (Efron and Tibshirani 1993, chapter 13).
    """
    chosen = generator.integers(len(tokens), size=(RESAMPLES, len(tokens)))
    ratios = differences[chosen].sum(axis=1) / tokens[chosen].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return low, high
