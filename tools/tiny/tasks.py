"""What is drawn and what is asked about it: six kinds of picture, each with several questions whose answers are known.

Everything about an item follows from (seed, index, width, height), so any worker can draw any item and two runs draw
the same ones. The wording is ours: no question asks with yes or no whether something is there, and none is one of
easy-VQA's (tests/unit/test_tiny_drawings.py compares).
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tools.tiny.colours import LEGIBLE, RGB, draw_named
from tools.tiny.draw import FONTS, SHAPES, Canvas, draw_shape, least_px, text_size
from tools.tiny.phrases import PHRASES

WORDS = tuple(sorted(set(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())))
TOKEN_PX = 32
"""Sides of finished pictures are multiples of this: patch 16 x merge 2, as in every Qwen3-VL."""
LEAST_FONT_PX, MOST_FONT_PX = 9, 40
"""Letters smaller than this are no longer legible in every font."""
ODD_SHARE = 0.25
"""Share of pictures drawn at some other size and resized to the multiple, as the processor does with real ones."""


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    """What is scored together: shape, colour, read, ..."""
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Item:
    image: Image.Image
    """RGB, exactly the size asked for."""
    questions: tuple[Question, ...]

    @property
    def pixels(self) -> UInt8[np.ndarray, "height width 3"]:
        return np.asarray(self.image)


@dataclass(frozen=True, slots=True)
class Thing:
    shape: str
    colour: str
    shade: RGB
    x: float
    y: float
    radius: float


def make_item(seed: int, index: int, width: int, height: int, num_questions: int) -> Item:
    """Item number `index`: a picture of `width` x `height` pixels and `num_questions` questions about it."""
    rng = random.Random(f"{seed}/{width}x{height}/{index}")
    odd = rng.random() < ODD_SHARE
    reach = TOKEN_PX // 2 - 1  # anything nearer than half a token rounds to the same multiple
    drawn = (width + rng.randint(-reach, reach), height + rng.randint(-reach, reach)) if odd else (width, height)
    canvas = Canvas(*drawn, scale=rng.choice([1, 2, 3]))
    background = canvas.fill_background(rng)
    kinds = [(kind, share) for kind, share, room in KINDS if width * height >= room]
    kind = rng.choices([k for k, _ in kinds], [s for _, s in kinds])[0]
    asked = kind(canvas, rng)
    asked.append(("background", {}, background))
    chosen = [asked[i] for i in rng.sample(range(len(asked)), min(num_questions, len(asked)))]
    chosen += rng.choices(asked, k=num_questions - len(chosen))
    image = canvas.finish()
    if odd:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return Item(image, tuple(phrase(task, names, answer, rng) for task, names, answer in chosen))


Asked = tuple[str, dict[str, str], str]
"""Task, names for the blanks of its phrases, answer."""


def phrase(task: str, names: dict[str, str], answer: str, rng: random.Random) -> Question:
    """One of the task's wordings: British or American, sometimes all small letters, sometimes without its full stop."""
    text = rng.choice(PHRASES[task]).format(**names)
    if rng.random() < 0.5:
        text = text.replace("olour", "olor")
    if rng.random() < 0.35:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.2:
        text = text.rstrip(".?")
    return Question(task.partition(":")[0], text, answer)


def draw_things(canvas: Canvas, rng: random.Random) -> list[Asked]:
    """One to four shapes, no two alike in shape or colour."""
    room = 1 + min(3, canvas.width * canvas.height // 3500)
    wanted = rng.choices(range(1, room + 1), [50, 28, 14, 8][:room])[0]
    things = scatter(canvas, rng, rng.sample(SHAPES, wanted))
    num = len(things)
    asked: list[Asked] = []
    for thing in things:
        names = {"shape": thing.shape, "colour": thing.colour}
        asked += [("colour", names, thing.colour), *[("shape", names, thing.shape)] * 2]
        asked += claims(thing, things, rng)
        for axis, (low, high) in enumerate((("left", "right"), ("top", "bottom"))):
            share = (thing.x / canvas.width, thing.y / canvas.height)[axis]
            if abs(share - 0.5) > 0.1:
                side = low if share < 0.5 else high
                asked.append((f"side:{'lr' if axis == 0 else 'tb'}", names, side))
    if num == 1:
        only = things[0]
        names = {"article": "a"}
        asked += [("colour:only", names, only.colour), ("shape:only", names, only.shape)] * 2
    asked.append(("describe", {}, describe(things)))
    if num > 1:
        asked += pairs(things, rng)
        asked.append(("count:all", {}, str(num)))
    return asked


def describe(things: list[Thing]) -> str:
    """ "a teal circle and a red star", from left to right."""
    parts = [f"{article(t.colour)} {t.colour} {t.shape}" for t in sorted(things, key=lambda t: t.x)]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def claims(thing: Thing, things: list[Thing], rng: random.Random) -> list[Asked]:
    """Statements about one thing's colour or shape, right half of the time, with and without "not"; and choices."""
    other_colours = [t.colour for t in things if t is not thing] or [rng.choice(["red", "teal", "gray", "blue"])]
    wrong_colour = rng.choice([c for c in (*other_colours, *_OTHER_COLOURS) if c != thing.colour])
    wrong_shape = rng.choice([s for s in SHAPES if s != thing.shape])
    asked: list[Asked] = []
    for task, subject, right, wrong in (
        ("claim:colour", thing.shape, thing.colour, wrong_colour),
        ("claim:shape", thing.colour, thing.shape, wrong_shape),
    ):
        said, negated = rng.choice([right, wrong]), rng.random() < 0.4
        holds = (said == right) != negated
        names = {"subject": subject, "said": said, "is": "is not" if negated else "is", "article": article(said)}
        asked.append((task, names, "correct" if holds else "wrong"))
    one, two = rng.sample([thing.colour, wrong_colour], 2)
    asked.append(("choose:colour", {"one": one, "two": two, "shape": thing.shape}, thing.colour))
    one, two = rng.sample([thing.shape, wrong_shape], 2)
    asked.append(("choose:shape", {"one": one, "two": two, "colour": thing.colour}, thing.shape))
    return asked


_OTHER_COLOURS = (
    "black",
    "gray",
    "red",
    "green",
    "blue",
    "teal",
    "brown",
    "yellow",
    "orange",
    "purple",
    "white",
    "pink",
)


def pairs(things: list[Thing], rng: random.Random) -> list[Asked]:
    """Where one thing is from another, and which is bigger."""
    asked: list[Asked] = []
    for one, two in [rng.sample(things, 2) for _ in range(2)]:
        names = {"one": one.shape, "two": two.shape}
        dx, dy = one.x - two.x, one.y - two.y
        if abs(dx) > 1.6 * abs(dy):
            asked.append(("relation", names, "left" if dx < 0 else "right"))
        elif abs(dy) > 1.6 * abs(dx):
            asked.append(("relation", names, "above" if dy < 0 else "below"))
        if max(one.radius, two.radius) > 1.35 * min(one.radius, two.radius):
            bigger, smaller = (one, two) if one.radius > two.radius else (two, one)
            asked.append(("size:bigger", names, bigger.shape))
            asked.append(("size:smaller", names, smaller.colour))
    return asked


def scatter(canvas: Canvas, rng: random.Random, shapes: list[str]) -> list[Thing]:
    """Draws the shapes in different colours where none touches another; fewer when there is no room."""
    short = min(canvas.width, canvas.height)
    most = short * {1: 0.48, 2: 0.3, 3: 0.25}.get(len(shapes), 0.22)
    things: list[Thing] = []
    used: set[str] = set()
    for shape in shapes:
        least = min(least_px(shape) / 2, most)
        for _ in range(30):
            radius = math.exp(rng.uniform(math.log(least), math.log(most)))
            x, y = rng.uniform(radius, canvas.width - radius), rng.uniform(radius, canvas.height - radius)
            if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + 1 for t in things):
                colour, shade = draw_named(rng, canvas.behind, used)
                used.add(colour)
                draw_shape(canvas, shape, (x, y), radius, shade, rng)
                things.append(Thing(shape, colour, shade, x, y, radius))
                break
    return things


def draw_crowd(canvas: Canvas, rng: random.Random) -> list[Asked]:
    """One to nine of one shape on a loose grid, sometimes among others of another shape and colour."""
    columns, rows = max(2, canvas.width // 22), max(2, canvas.height // 22)
    cells = [(c, r) for c in range(columns) for r in range(rows)]
    rng.shuffle(cells)
    wide, high = canvas.width / columns, canvas.height / rows
    most = min(9, len(cells))
    num = rng.randint(1, most)
    others = rng.randint(0, min(4, len(cells) - num)) if rng.random() < 0.4 else 0
    simple = [s for s in SHAPES if least_px(s) < 14] + ["star"]
    shapes = rng.sample(simple, 2)
    name, shade = draw_named(rng, canvas.behind, set())
    other_name, other_shade = draw_named(rng, [*canvas.behind, shade], {name})
    for i, (column, row) in enumerate(cells[: num + others]):
        radius = min(wide, high) * rng.uniform(0.34, 0.46)
        slack = max(0.0, min(wide, high) / 2 - radius)
        x = (column + 0.5) * wide + rng.uniform(-slack, slack)
        y = (row + 0.5) * high + rng.uniform(-slack, slack)
        mine = i < num
        draw_shape(canvas, shapes[0] if mine else shapes[1], (x, y), radius, shade if mine else other_shade, rng)
    asked: list[Asked] = [
        ("count", {"shapes": plural(shapes[0])}, str(num)),
        ("count:colour", {"colour": name}, str(num)),
        ("colour:many", {"shapes": plural(shapes[0])}, name),
    ]
    if others:
        asked += [("count", {"shapes": plural(shapes[1])}, str(others)), ("count:all", {}, str(num + others))]
        asked.append(("colour:many", {"shapes": plural(shapes[1])}, other_name))
        if num != others:
            names = {"one": plural(shapes[0]), "two": plural(shapes[1])}
            asked.append(("more", names, plural(shapes[0] if num > others else shapes[1])))
    return asked


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def draw_writing(canvas: Canvas, rng: random.Random) -> list[Asked]:
    """A word, a made-up word, a number or a mixed string of one to twelve signs, in any font that fits."""
    style = rng.choices(["word", "madeup", "number", "mixed", "short"], [42, 13, 20, 10, 15])[0]
    longest = max(3, min(12, canvas.width // 9))
    text = _something_to_read(style, longest, rng)
    name = _write_somewhere(canvas, text, rng)
    quoted = {"kind": {"word": "word", "madeup": "word", "number": "number"}.get(style, "string")}
    asked: list[Asked] = [("read", quoted, text)] * 4
    asked += [("ink", quoted, name), ("length", quoted, str(len(text)))]
    asked += [("letter:first", quoted, text[0]), ("letter:last", quoted, text[-1])]
    asked.append(("spell", quoted, " ".join(text)))
    if style in ("word", "madeup"):
        asked.append(("capitals", quoted, text.upper()))
        said, negated = rng.choice([text[-1], rng.choice("aeinorst")]), rng.random() < 0.4
        holds = (said == text[-1]) != negated
        names = {"said": said, "ends": "does not end" if negated else "ends"}
        asked.append(("claim:ends", names, "correct" if holds else "wrong"))
    return asked


def _something_to_read(style: str, longest: int, rng: random.Random) -> str:
    if style == "word":
        word = rng.choice(WORDS)
        while len(word) > longest:
            word = rng.choice(WORDS)
        return rng.choices([word, word.upper(), word.capitalize()], [60, 20, 20])[0]
    if style == "madeup":
        syllables = rng.randint(1, max(1, min(4, longest // 3)))
        ends = ["", "", "n", "r", "s", "t", "l", "m", "k"]
        return "".join(
            rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(ends) for _ in range(syllables)
        )
    if style == "number":
        return str(rng.randrange(10 ** rng.randint(1, min(6, longest))))
    most = 3 if style == "short" else min(8, longest)
    signs = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789-+%#&$"
    return "".join(rng.choice(signs) for _ in range(rng.randint(1, most)))


def _write_somewhere(canvas: Canvas, text: str, rng: random.Random, band: tuple[float, float] = (0.0, 1.0)) -> str:
    """Writes `text` inside the band (shares of the height), as large as it fits or smaller; returns its colour."""
    font = rng.choice(FONTS)
    top, bottom = band[0] * canvas.height + 1, band[1] * canvas.height - 1
    largest = bisect.bisect_right(
        range(MOST_FONT_PX),
        0,
        lo=LEAST_FONT_PX,
        key=lambda s: not _fits(text_size(text, font, s), canvas.width - 4, bottom - top),
    )
    size = rng.randint((LEAST_FONT_PX + largest) // 2 - 2, max(LEAST_FONT_PX, largest - 1))
    size = max(LEAST_FONT_PX, size)
    wide, high = text_size(text, font, size)
    x = rng.uniform(1, max(1, canvas.width - wide - 2))
    y = rng.uniform(top, max(top, bottom - high))
    name, shade = draw_named(rng, canvas.behind, set(), LEGIBLE)
    angle = rng.uniform(-9, 9) if rng.random() < 0.25 else 0.0
    canvas.lettering(text, font, size, shade, (x, y), angle)
    return name


def _fits(size: tuple[int, int], width: float, height: float) -> bool:
    return size[0] <= width and size[1] <= height


def draw_lines(canvas: Canvas, rng: random.Random) -> list[Asked]:
    """Two lines of writing, one over the other."""
    longest = max(3, min(10, canvas.width // 11))
    texts = [_something_to_read(rng.choice(["word", "number"]), longest, rng) for _ in range(2)]
    inks = [_write_somewhere(canvas, t, rng, band) for t, band in zip(texts, ((0.03, 0.48), (0.52, 0.97)), strict=True)]
    asked: list[Asked] = [("lines:both", {}, f"{texts[0]} {texts[1]}")] * 2
    for place, text, ink in zip(("upper", "lower"), texts, inks, strict=True):
        asked += [("lines:one", {"place": place}, text)] * 2
        asked.append(("ink:line", {"place": place}, ink))
    return asked


def draw_sum(canvas: Canvas, rng: random.Random) -> list[Asked]:
    """A sum or difference of two numbers to work out."""
    one, two = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.5:
        one, two = rng.randint(0, 20), rng.randint(0, 20)
    sign = rng.choice("+-")
    if sign == "-":
        one, two = max(one, two), min(one, two)
    text = rng.choice(["{}{}{}", "{}{}{}=", "{} {} {} =", "{}{}{}=?"]).format(one, sign, two)
    name = _write_somewhere(canvas, text, rng)
    result = one + two if sign == "+" else one - two
    asked: list[Asked] = [("sum", {}, str(result))] * 4
    asked += [
        ("number:first", {}, str(one)),
        ("number:second", {}, str(two)),
        ("sign", {}, {"+": "plus", "-": "minus"}[sign]),
    ]
    asked += [("ink", {"kind": "text"}, name), ("parity", {}, "even" if result % 2 == 0 else "odd")]
    if one != two:
        asked.append(("number:larger", {}, str(max(one, two))))
    return asked


def draw_chart(canvas: Canvas, rng: random.Random) -> list[Asked]:
    """Two to five upright bars with a letter under each and its value on top."""
    num = rng.randint(2, min(5, canvas.width // 26))
    labels = rng.sample("ABCDEFGHKLMNPRSTUVWXYZ", num)
    values = rng.sample(range(1, 10 if num > 3 or rng.random() < 0.5 else 31), num)
    font = rng.choice(FONTS[:4])
    text_px = rng.choice([10, 11, 12])
    base, head = canvas.height - text_px - 4, text_px + 4
    slot = (canvas.width - 4) / num
    ink, shade = draw_named(rng, canvas.behind, set(), LEGIBLE)
    used = {ink}
    fills: list[str] = []
    same = draw_named(rng, canvas.behind, used) if rng.random() < 0.4 else None
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        name, fill = same or draw_named(rng, canvas.behind, used)
        used.add(name)
        fills.append(name)
        left, right = 2 + slot * (i + 0.18), 2 + slot * (i + 0.82)
        top = base - max(2.0, (base - head - 2) * value / max(values))
        canvas.polygon([(left, top), (right, top), (right, base), (left, base)], fill)
        for text, y in ((label, base + 3), (str(value), top - text_px + 1)):
            wide, _ = text_size(text, font, text_px)
            canvas.lettering(text, font, text_px, shade, ((left + right - wide) / 2, y))
    canvas.polygon([(1, base), (canvas.width - 2, base), (canvas.width - 2, base + 1), (1, base + 1)], shade)
    order = sorted(range(num), key=values.__getitem__)
    asked: list[Asked] = [("bar:value", {"label": lab}, str(v)) for lab, v in zip(labels, values, strict=True)]
    asked += [("bar:highest", {}, labels[order[-1]])] * 2 + [("bar:lowest", {}, labels[order[0]])] * 2
    asked += [("bar:number", {}, str(num)), ("bar:most", {}, str(max(values)))]
    one, two = rng.sample(range(num), 2)
    asked.append(("bar:sum", {"one": labels[one], "two": labels[two]}, str(values[one] + values[two])))
    names = {"one": labels[one], "two": labels[two]}
    asked.append(("bar:higher", names, labels[one] if values[one] > values[two] else labels[two]))
    if same is None:
        asked.append(("bar:colour", {"label": labels[one]}, fills[one]))
    return asked


KINDS: tuple[tuple[Callable[[Canvas, random.Random], list[Asked]], float, int], ...] = (
    (draw_things, 60, 0),
    (draw_writing, 22, 0),
    (draw_crowd, 10, 0),
    (draw_sum, 10, 0),
    (draw_lines, 8, 96 * 64),
    (draw_chart, 16, 128 * 96),
)
"""Kind of picture, its weight, and the pixels it needs."""
