"""Pictures of small sums with boxed answers, drawn by a seed: what `lensmith demo grpo` learns from.

A picture is 96 x 64 pixels with a sum such as 3+5 in one of four fonts, in any colours that stand apart, at any place. Of
what it shows only the digits count; the answer is `\\boxed{8}`. The test has all 36 sums of digits up to LARGEST; six of them,
HELD_BACK, stand in no other part, and no picture of one part is in another.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageFont

QUESTION = "What is the result? Put it in \\boxed{}."
WIDTH_PX, HEIGHT_PX = 96, 64
"""Six language tokens of 32 x 32 pixels."""
FONTS = ("built-in", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")
"""Pillow's own, and three of those that come with matplotlib: there on every machine."""
FONT_PX = (20, 30)
MARGIN_PX = 3
LARGEST = 5
"""Of both numbers: 36 sums. Up to 9, a warm-up needs more steps to teach as much (docs/log.md)."""
HELD_BACK = (frozenset({1, 2}), frozenset({0, 5}), frozenset({2, 4}))
"""Pairs of numbers, in either order, that only the test has: their results are those of other sums too."""
WRITTEN = ("{}+{}", "{} + {}", "{}+{}=")
MODEST = 0.45
"""Least distance of the lightness (0 to 1) of writing and ground: nobody is asked to read what cannot be seen."""
PARTS = ("test", "warm-up", "train")
"""In the order in which they are drawn: a picture that was drawn before is drawn anew."""

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Sum:
    """One picture and what it says."""

    image: Image.Image
    """RGB, WIDTH_PX x HEIGHT_PX."""
    one: int
    two: int

    @property
    def is_held_back(self) -> bool:
        return {self.one, self.two} in HELD_BACK

    @property
    def answer(self) -> str:
        return f"\\boxed{{{self.one + self.two}}}"


def write_sums(folder: Path, seed: int, counts: dict[str, int]) -> dict[str, Path]:
    """Draw `counts` pictures of each of PARTS below `folder`; returns the data file of each, named after it.

    Rows have image, question, answer and held_back. The same seed draws the same pictures, and no two parts share one.
    """
    drawn: set[bytes] = set()
    files = {}
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows = []
        for number, shown in enumerate(_different(seed, part, counts[part], drawn)):
            name = f"{part}/{number:05d}.png"
            shown.image.save(folder / name, compress_level=1)
            rows.append({"image": name, "question": QUESTION, "answer": shown.answer, "held_back": shown.is_held_back})
        files[part] = folder / f"{part}.jsonl"
        files[part].write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return files


def _different(seed: int, part: str, count: int, drawn: set[bytes]) -> Iterator[Sum]:
    """`count` sums that this part may have and whose pictures are not among those `drawn`, which they join."""
    rng = random.Random(f"sums of two digits, seed {seed}, {part}")
    while count:
        shown = draw_sum(rng)
        digest = hashlib.sha256(shown.image.tobytes()).digest()
        if digest in drawn or (shown.is_held_back and part != "test"):
            continue
        drawn.add(digest)
        count -= 1
        yield shown


def draw_sum(rng: random.Random) -> Sum:
    """A sum of two numbers up to LARGEST, written somewhere in a picture."""
    from PIL import Image, ImageDraw

    one, two = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    text = rng.choice(WRITTEN).format(one, two)
    face = load_font(rng.choice(FONTS), rng.randint(*FONT_PX))
    ground, ink = draw_colours(rng)
    image = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), ground)
    left, top, right, bottom = face.getbbox(text)
    x = rng.uniform(MARGIN_PX, max(MARGIN_PX, WIDTH_PX - MARGIN_PX - (right - left)))
    y = rng.uniform(MARGIN_PX, max(MARGIN_PX, HEIGHT_PX - MARGIN_PX - (bottom - top)))
    ImageDraw.Draw(image).text((x - left, y - top), text, font=face, fill=ink)
    return Sum(image, one, two)


def draw_colours(rng: random.Random) -> tuple[Colour, Colour]:
    """Ground and writing: any two hues, one of them light and the other dark."""
    dark = rng.uniform(0.1, 0.5 - MODEST / 4)
    light = rng.uniform(dark + MODEST, 0.95)
    shades = [_colour(rng.random(), lightness, rng.uniform(0.2, 0.9)) for lightness in (light, dark)]
    rng.shuffle(shades)
    return shades[0], shades[1]


def _colour(hue: float, lightness: float, saturation: float) -> Colour:
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, saturation))
    return red, green, blue


@functools.cache
def load_font(name: str, size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """One of FONTS."""
    from PIL import ImageFont

    if name == "built-in":
        return ImageFont.load_default(size_px)
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size_px)
