"""Colours for the drawings: sampled from all of RGB and named by the nearest of eighteen names.

No fixed palette: a "teal" is any RGB value that lies nearer to a teal anchor than to every other colour's anchors, by a
margin that keeps borderline shades out. Distances are Euclidean in CIE L*a*b* (CIE 15:2004, D65 white), which is closer
to how different two colours look than RGB is.
"""

from __future__ import annotations

import functools
import math
import random

import numpy as np
from jaxtyping import Float, Int

RGB = tuple[int, int, int]

ANCHORS: dict[str, list[RGB]] = {
    "black": [(16, 17, 20), (36, 34, 34)],
    "white": [(250, 250, 250), (236, 237, 235)],
    "gray": [(92, 94, 97), (128, 130, 131), (164, 165, 168)],
    "red": [(218, 30, 36), (240, 60, 50), (190, 22, 30)],
    "orange": [(240, 138, 28), (245, 165, 60)],
    "yellow": [(242, 224, 48), (250, 245, 110), (225, 205, 20)],
    "green": [(48, 160, 60), (28, 108, 40), (92, 222, 74), (20, 245, 30)],
    "olive": [(118, 120, 38), (148, 146, 62)],
    "teal": [(18, 132, 128), (34, 104, 108)],
    "cyan": [(70, 212, 228), (120, 236, 240)],
    "blue": [(38, 72, 218), (60, 120, 235), (24, 30, 225)],
    "navy": [(18, 24, 92)],
    "purple": [(122, 48, 165), (92, 40, 120)],
    "magenta": [(222, 38, 186), (235, 70, 160)],
    "pink": [(246, 152, 186), (248, 190, 205)],
    "brown": [(128, 76, 40), (156, 58, 44), (98, 58, 32)],
    "maroon": [(104, 14, 38)],
    "beige": [(226, 206, 164), (205, 182, 140)],
}
NAMES = tuple(ANCHORS)

GRID = 28
"""RGB values tried per channel when the table of nameable colours is built."""
MARGIN = 0.72
"""A shade is used when its nearest anchor is nearer than this share of the distance to any other colour's anchor."""
VISIBLE = 26.0
"""Least L*a*b* distance between something drawn and what is behind it; 2.3 is a just noticeable difference."""
LEGIBLE = 40.0
"""The same for writing, whose strokes are thin."""


def lab(rgb: Int[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """sRGB in 0..255 -> CIE L*a*b* under D65 (IEC 61966-2-1 and CIE 15:2004)."""
    share = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@functools.lru_cache(maxsize=4096)
def _lab_of(shade: RGB) -> tuple[float, float, float]:
    return tuple(lab(np.array(shade)).tolist())


def distance(one: RGB, other: RGB) -> float:
    """How different two colours look: Euclidean in L*a*b* (CIE 1976)."""
    return math.dist(_lab_of(one), _lab_of(other))


@functools.cache
def shades() -> dict[str, list[RGB]]:
    """Every RGB value of the grid that has a clear name, by name."""
    ticks = np.linspace(0, 255, GRID).round().astype(int)
    grid = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 3)
    grid_lab = lab(grid)
    nearest = np.stack(
        [
            np.linalg.norm(grid_lab[:, None] - lab(np.array(anchors))[None], axis=-1).min(axis=1)
            for anchors in ANCHORS.values()
        ]
    )
    best, second = np.sort(nearest, axis=0)[:2]
    owner = nearest.argmin(axis=0)
    clear = best <= MARGIN * second
    return {name: [(int(r), int(g), int(b)) for r, g, b in grid[clear & (owner == i)]] for i, name in enumerate(NAMES)}


def draw_shade(name: str, rng: random.Random) -> RGB:
    """One of the shades of a name, moved by up to half a grid step."""
    jitter = 127 // (GRID - 1)
    return tuple(min(255, max(0, c + rng.randint(-jitter, jitter))) for c in rng.choice(shades()[name]))  # type: ignore[return-value]


def draw_named(rng: random.Random, behind: list[RGB], avoid: set[str], least: float = VISIBLE) -> tuple[str, RGB]:
    """A name not in `avoid` and a shade of it that stands out from every colour in `behind` by `least`."""
    while True:
        name = rng.choice(NAMES)
        if name in avoid:
            continue
        shade = draw_shade(name, rng)
        if all(distance(shade, other) >= least for other in behind):
            return name, shade
