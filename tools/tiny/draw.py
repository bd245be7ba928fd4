"""Brushes: backgrounds, shapes, lettering and bar charts on a canvas. What to draw is decided in tasks.py.

A canvas draws at `scale` times its size and is reduced at the end, so that edges are sharp (1) or smooth (2, 3) as they
are in pictures from elsewhere. All coordinates given to it are in pixels of the finished picture.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tools.tiny.colours import NAMES, RGB, draw_shade

Point = tuple[float, float]

SHAPES = [
    "circle",
    "oval",
    "square",
    "rectangle",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "diamond",
    "pentagon",
    "hexagon",
    "arrow",
    "moon",
]
LEAST_PX: dict[str, int] = {
    "circle": 8,
    "square": 8,
    "triangle": 8,
    "rectangle": 9,
    "oval": 10,
    "ring": 11,
    "cross": 11,
}
"""Smallest side at which a shape can still be told from the others; LEAST_PX_OTHERS for those not listed."""
LEAST_PX_OTHERS = 14
FONTS = ("built-in", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")


class Canvas:
    """A picture in the making, `width` x `height` pixels when finished."""

    def __init__(self, width: int, height: int, scale: int) -> None:
        self.width, self.height, self.scale = width, height, scale
        self.image = Image.new("RGB", (width * scale, height * scale))
        self.pen = ImageDraw.Draw(self.image)
        self.behind: list[RGB] = []
        """Colours of the background: what is drawn must stand out from each."""

    def fill_background(self, rng: random.Random) -> str:
        """Plain, shaded, striped or grainy; returns the name of its (first) colour."""
        name = rng.choice(NAMES)
        first = draw_shade(name, rng)
        style = rng.choices(["plain", "shaded", "striped", "grainy"], [55, 20, 10, 15])[0]
        pixels = np.empty((self.height, self.width, 3), dtype=np.float32)
        pixels[:] = first
        self.behind = [first]
        if style == "shaded":
            second = draw_shade(name, rng)
            self.behind.append(second)
            axis = rng.choice([0, 1])
            ramp = np.linspace(0, 1, pixels.shape[axis], dtype=np.float32)
            ramp = ramp[:, None, None] if axis == 0 else ramp[None, :, None]
            pixels += ramp * (np.array(second, dtype=np.float32) - pixels)
        elif style == "striped":
            second = draw_shade(name, rng)
            self.behind.append(second)
            period, axis = rng.randint(3, 12), rng.choice([0, 1])
            on = (np.arange(pixels.shape[axis]) // period) % 2 == 1
            pixels[on if axis == 0 else (slice(None), on)] = second
        elif style == "grainy":
            noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 10), pixels.shape)
            pixels += noise.astype(np.float32)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        self.image.paste(picture.resize(self.image.size, Image.Resampling.NEAREST))
        return name

    def polygon(self, points: list[Point], fill: RGB | None, edge: RGB | None = None, edge_px: float = 0) -> None:
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        if fill is not None:
            self.pen.polygon(scaled, fill=fill)
        if edge is not None:
            width = max(1, round(edge_px * self.scale))
            self.pen.line([*scaled, scaled[0], scaled[1]], fill=edge, width=width, joint="curve")

    def lettering(self, text: str, font: str, size_px: int, fill: RGB, at: Point, angle: float = 0.0) -> None:
        """Text whose inked box has its upper left corner at `at`, turned by `angle` degrees about its middle."""
        face = load_font(font, size_px * self.scale)
        left, top, right, bottom = face.getbbox(text)
        x, y = at[0] * self.scale, at[1] * self.scale
        if not angle:
            self.pen.text((x - left, y - top), text, font=face, fill=fill)
            return
        stencil = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
        ImageDraw.Draw(stencil).text((-left, -top), text, font=face, fill=255)
        turned = stencil.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        x -= (turned.width - stencil.width) / 2
        y -= (turned.height - stencil.height) / 2
        self.image.paste(fill, (round(x), round(y)), turned)

    def finish(self) -> Image.Image:
        if self.scale == 1:
            return self.image
        return self.image.resize((self.width, self.height), Image.Resampling.BOX)


@functools.cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in face (Aileron), or one of the DejaVu faces that matplotlib carries. `size` in pixels."""
    if name == "built-in":
        return ImageFont.load_default(size)  # type: ignore[return-value]
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def text_size(text: str, font: str, size_px: int) -> tuple[int, int]:
    """Width and height of the inked box, in pixels."""
    left, top, right, bottom = load_font(font, size_px).getbbox(text)
    return math.ceil(right - left), math.ceil(bottom - top)


def least_px(shape: str) -> int:
    return LEAST_PX.get(shape, LEAST_PX_OTHERS)


def _arc(width: float, height: float, num: int = 40) -> list[Point]:
    turns = np.linspace(0, 2 * math.pi, num, endpoint=False)
    return [(width * math.cos(t), height * math.sin(t)) for t in turns]


def _regular(num: int, start: float) -> list[Point]:
    return [(math.cos(start + 2 * math.pi * i / num), math.sin(start + 2 * math.pi * i / num)) for i in range(num)]


def _turned(points: list[Point], angle: float) -> list[Point]:
    c, s = math.cos(angle), math.sin(angle)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


def _rectangle(rng: random.Random) -> list[Point]:
    slope = math.atan(rng.uniform(0.22, 0.78))
    x, y = math.cos(slope), math.sin(slope)
    return [(-x, -y), (x, -y), (x, y), (-x, y)]


def _triangle(rng: random.Random) -> list[Point]:
    spread = rng.uniform(0.85, 1.15) * math.pi / 3
    return [(math.cos(a), math.sin(a)) for a in (-math.pi / 2, math.pi / 2 - spread, math.pi / 2 + spread)]


def _star(rng: random.Random) -> list[Point]:
    radii = (1.0, rng.uniform(0.38, 0.5))
    turns = [i * math.pi / 5 for i in range(10)]
    return [(radii[i % 2] * math.sin(t), -radii[i % 2] * math.cos(t)) for i, t in enumerate(turns)]


def _cross(rng: random.Random) -> list[Point]:
    arm = rng.uniform(0.22, 0.34)
    corner = [(arm, -0.95), (arm, -arm), (0.95, -arm)]
    return [p for turn in range(4) for p in _turned(corner, turn * math.pi / 2)]


def _heart(_: random.Random) -> list[Point]:
    # The "heart curve" of Weisstein's MathWorld, scaled into the unit circle.
    turns = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(float(a) / 17, -float(b) / 17) for a, b in zip(x, y, strict=True)]


def _diamond(rng: random.Random) -> list[Point]:
    half = rng.uniform(0.5, 0.65)
    return [(0, -1), (half, 0), (0, 1), (-half, 0)]


def _arrow(rng: random.Random) -> list[Point]:
    shaft, neck = rng.uniform(0.16, 0.26), rng.uniform(-0.1, 0.2)
    head = [(neck, -shaft), (neck, -0.6), (1, 0), (neck, 0.6), (neck, shaft)]
    return [(-0.95, -shaft), *head, (-0.95, shaft)]


def _moon(_: random.Random) -> list[Point]:
    # Outer arc of the unit circle, inner arc of a narrower one moved to the right: a crescent open to the right.
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(math.radians(50), math.radians(310), 28)]
    inner = [(0.45 + 0.78 * math.cos(a), 0.98 * math.sin(a)) for a in np.linspace(-1.75, -4.53, 22)]
    return [*outer, *inner]


OUTLINES: dict[str, Callable[[random.Random], list[Point]]] = {
    "circle": lambda _: _arc(1, 1),
    "oval": lambda rng: _arc(1, rng.uniform(0.45, 0.68)),
    "square": lambda _: _regular(4, math.pi / 4),
    "rectangle": _rectangle,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": lambda _: _arc(1, 1),
    "heart": _heart,
    "diamond": _diamond,
    "pentagon": lambda _: _regular(5, -math.pi / 2),
    "hexagon": lambda _: _regular(6, 0),
    "arrow": _arrow,
    "moon": _moon,
}
"""Corners around (0, 0), inside the unit circle, before turning. Rectangles, ovals, triangles and others come in random
proportions, within limits that keep their names true."""
SHAPES = tuple(OUTLINES)


def place(points: list[Point], middle: Point, radius: float, angle: float) -> list[Point]:
    """Unit-circle corners -> pixels: turned by `angle` (radians), enlarged and moved."""
    return [(middle[0] + radius * x, middle[1] + radius * y) for x, y in _turned(points, angle)]


def draw_shape(canvas: Canvas, shape: str, middle: Point, radius: float, fill: RGB, rng: random.Random) -> None:
    """A shape whose corners lie within `radius` of `middle`; filled, sometimes edged or hollow."""
    upright = rng.random() < 0.5
    limit = {"square": 0.35, "heart": 0.5, "diamond": 0.3, "cross": 0.3, "arrow": math.pi, "moon": math.pi}
    turn = 0.0 if upright else rng.uniform(-1, 1) * limit.get(shape, math.pi)
    if upright and shape in ("rectangle", "oval", "triangle") and rng.random() < 0.5:
        turn = math.pi / 2 * rng.choice([1, 2, 3])
    corners = place(OUTLINES[shape](rng), middle, radius, turn)
    if shape == "ring":
        thick = radius * rng.uniform(0.25, 0.4)
        canvas.polygon(place(_arc(1, 1), middle, radius - thick / 2, 0), None, fill, thick)
    elif radius >= 9 and shape not in ("circle", "oval", "moon", "arrow", "cross") and rng.random() < 0.2:
        canvas.polygon(corners, None, fill, max(2.0, radius * 0.18))
    else:
        canvas.polygon(corners, fill)
