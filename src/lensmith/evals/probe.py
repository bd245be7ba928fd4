"""A forgetting probe: a fixed set of general questions that base and tuned model are asked alike.

Half are about pictures drawn here (colours, shapes, counting, reading, place, size), half about none (facts, arithmetic, words,
doing as told). None needs more than a word or a number, and none can be in anybody's training data as a row. An answer is right
where one of the accepted ones stands in it, word for word: how a model puts it is not what the probe is about.

Thirty-two questions tell a model that has forgotten much from one that has not; a loss of one or two is chance.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lensmith.evals.answer_text import final_answer
from lensmith.evals.score import normalise
from lensmith.types import ImageMark, ImageRef, Message, Sample, Text

if TYPE_CHECKING:
    from PIL import ImageDraw

SIDE_PX = 224
"""Of a probe's picture: 49 tokens."""
ANSWER_TOKENS = 48
"""Enough for a sentence around the word."""

Painter = Callable[["ImageDraw.ImageDraw"], None]


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """One question with the answers that count."""

    kind: str
    question: str
    accepted: tuple[str, ...]
    paint: Painter | None = None
    """Draws its picture on white; None for a question about none."""

    def is_right(self, answer: str) -> bool:
        """Whether an accepted answer stands in what was said, as whole words in their order."""
        said = f" {normalise(final_answer(answer))} "
        return any(f" {normalise(accepted)} " in said for accepted in self.accepted)

    def to_sample(self, number: int) -> Sample:
        """As a row of data would be, its first accepted answer as the reference."""
        marks = () if self.paint is None else (ImageMark(0),)
        images = () if self.paint is None else (ImageRef(self.picture(), key=f"probe {number}"),)
        asked = Message("user", (*marks, Text(self.question)))
        return Sample(f"probe:{number}", (asked, Message("assistant", (Text(self.accepted[0]),))), images)

    def picture(self) -> bytes:
        """The picture as PNG."""
        from PIL import Image, ImageDraw

        assert self.paint is not None, "asked for questions with a picture only"
        image = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
        self.paint(ImageDraw.Draw(image))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()


def _disc(colour: str, x: int = 112, y: int = 112, radius: int = 60) -> Painter:
    return lambda draw: draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _square(colour: str, x: int = 112, y: int = 112, half: int = 55) -> Painter:
    return lambda draw: draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)


def _triangle(colour: str) -> Painter:
    return lambda draw: draw.polygon([(112, 40), (184, 176), (40, 176)], fill=colour)


def _text(text: str, size_px: int = 52) -> Painter:
    from PIL import ImageFont

    return lambda draw: draw.text((112, 112), text, fill="black", anchor="mm", font=ImageFont.load_default(size_px))


def _all(*painters: Painter) -> Painter:
    def paint(draw: ImageDraw.ImageDraw) -> None:
        for one in painters:
            one(draw)

    return paint


def _discs(count: int) -> Painter:
    return _all(*(_disc("navy", 50 + 62 * (n % 3), 56 + 62 * (n // 3), 22) for n in range(count)))


def probe_questions() -> tuple[ProbeQuestion, ...]:
    """All of them, always in this order."""
    left_right = _all(_disc("red", 60, 112, 38), _square("blue", 164, 112, 36))
    sizes = _all(_disc("green", 70, 112, 60), _disc("orange", 180, 112, 24))
    seen = [
        ("colour", "What color is the circle?", ("red",), _disc("red")),
        ("colour", "What color is the square?", ("blue",), _square("blue")),
        ("colour", "What color is the triangle?", ("green",), _triangle("green")),
        ("colour", "What color is the shape?", ("yellow",), _disc("yellow")),
        ("shape", "What shape is shown?", ("circle", "disc", "disk", "dot"), _disc("black")),
        ("shape", "What shape is shown?", ("triangle",), _triangle("purple")),
        ("shape", "What shape is shown?", ("square",), _square("teal")),
        ("count", "How many dots are there? Answer with a number.", ("3",), _discs(3)),
        ("count", "How many dots are there? Answer with a number.", ("5",), _discs(5)),
        ("reading", "What word is written here?", ("stop",), _text("STOP")),
        ("reading", "What word is written here?", ("house",), _text("House")),
        ("reading", "What number is written here?", ("47",), _text("47", 90)),
        ("place", "What color is the shape on the left?", ("red",), left_right),
        ("place", "What color is the shape on the right?", ("blue",), left_right),
        ("size", "What color is the larger circle?", ("green",), sizes),
        ("arithmetic", "What is the result of the sum in the picture?", ("12",), _text("7 + 5", 70)),
    ]
    asked = [
        ("facts", "What is the capital of France?", ("Paris",)),
        ("facts", "What is the capital of Japan?", ("Tokyo",)),
        ("facts", "Which planet is closest to the sun?", ("Mercury",)),
        ("facts", "What gas do plants take in from the air?", ("carbon dioxide", "CO2", "CO₂")),
        ("facts", "How many days are there in a week?", ("7",)),
        ("facts", "Who wrote Romeo and Juliet?", ("Shakespeare",)),
        ("arithmetic", "What is 6 times 7?", ("42",)),
        ("arithmetic", "What is 15 minus 8?", ("7",)),
        ("arithmetic", "What is half of 50?", ("25",)),
        ("words", "What is the opposite of hot?", ("cold", "cool")),
        ("words", "What is the plural of child?", ("children",)),
        ("words", "How do you say thank you in French?", ("merci",)),
        ("doing as told", "Answer with the single word yes.", ("yes",)),
        ("doing as told", "Repeat this word and nothing else: banana", ("banana",)),
        ("doing as told", "Write the letters A, B and C separated by commas.", ("A, B, C", "A,B,C")),
        ("doing as told", "Name one animal that barks, in one word.", ("dog",)),
    ]
    return tuple(ProbeQuestion(*each) for each in (*seen, *asked))


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What base and tuned model answered to the probe."""

    questions: tuple[ProbeQuestion, ...]
    base: tuple[str, ...]
    tuned: tuple[str, ...]

    @property
    def base_right(self) -> list[bool]:
        return [question.is_right(answer) for question, answer in zip(self.questions, self.base, strict=True)]

    @property
    def tuned_right(self) -> list[bool]:
        return [question.is_right(answer) for question, answer in zip(self.questions, self.tuned, strict=True)]

    @property
    def forgotten(self) -> list[int]:
        """Questions that the base model answers and the tuned one does not."""
        pairs = zip(self.base_right, self.tuned_right, strict=True)
        return [number for number, (before, after) in enumerate(pairs) if before and not after]

    def sentences(self) -> list[str]:
        """For a person: how many each answers, and what was lost."""
        total, base, tuned = len(self.questions), sum(self.base_right), sum(self.tuned_right)
        told = [f"General questions (forgetting probe): base {base} of {total} right, tuned {tuned}."]
        if not base:
            told[0] += " A base model that answers none of them cannot show what training made it forget."
        for number in self.forgotten[:SHOWN]:
            question, answer = self.questions[number], " ".join(self.tuned[number].split())
            told.append(f"  forgotten: {question.question} {question.accepted[0]!r}; tuned says {answer[:60]!r}")
        if (more := len(self.forgotten) - SHOWN) > 0:
            told.append(f"  and {more} more")
        return told

    def to_json(self) -> dict[str, object]:
        """Counts, and every answer."""
        lines = zip(self.questions, self.base, self.tuned, self.base_right, self.tuned_right, strict=True)
        return {
            "questions": len(self.questions),
            "base_right": sum(self.base_right),
            "tuned_right": sum(self.tuned_right),
            "answers": [
                {
                    "kind": question.kind,
                    "question": question.question,
                    "accepted": list(question.accepted),
                    "base": base,
                    "tuned": tuned,
                    "base_right": before,
                    "tuned_right": after,
                }
                for question, base, tuned, before, after in lines
            ],
        }


SHOWN = 5
"""Forgotten questions told on the screen; the JSON has all."""
