"""From a row to a checked sample: who says what, with which pictures where.

Three layouts are understood: chat `messages`, ShareGPT and LLaVA `conversations`, and tables with a column each for
image, question and answer. What is wrong with a row is a RowError that names the row, both values and the way out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from lensmith.data.json_text import NotJson, parse_json
from lensmith.data.layout import Layout, guess_layout
from lensmith.data.refs import RefReader
from lensmith.data.thoughts import count_thoughts, drop_thoughts, holds_thought
from lensmith.data.video_refs import VIDEO_KEYS, read_videos
from lensmith.errors import RowError
from lensmith.types import (
    ImageMark,
    ImageRef,
    Message,
    Part,
    Role,
    Row,
    Sample,
    Text,
    TokenLimits,
    VideoMark,
    VideoRef,
)

__all__ = ["Layout", "RowError", "guess_layout", "to_sample"]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""The words for who speaks, in chat formats and in ShareGPT's."""

PICTURE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")

Ref = ImageRef | VideoRef


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What a row may show beside texts. In a draft it marks where one of the row's own columns goes."""

    name: Literal["image", "video"]
    types: tuple[str, ...]
    """Types of a message's parts."""
    keys: tuple[str, ...]
    """Where such a part holds it."""

    @property
    def mark(self) -> str:
        return f"<{self.name}>"

    def split(self, text: str) -> list[str]:
        """A text cut at its marks. LLaVA writes them on lines of their own; Qwen3-VL reads on right behind the picture."""
        return re.split(rf"\n*{self.mark}\n*", text) if self.mark in text else [text]


IMAGE = Kind("image", ("image", "image_url"), PICTURE_KEYS)
VIDEO = Kind("video", ("video", "video_url"), VIDEO_KEYS)
KINDS = (IMAGE, VIDEO)

Draft = Text | Ref | Kind
"""A part before what the row's own columns list is put in the place of its marks."""

Turn = tuple[Role, list[Draft]]


def to_sample(
    row: Row,
    layout: Layout,
    refs: RefReader,
    *,
    reasoning: Literal["keep", "drop"] = "keep",
    limits: TokenLimits | None = None,
    faults: list[RowError] | None = None,
) -> Sample:
    """Checked messages and the pictures and videos they mention; files are looked for, not opened.

    Pictures go where the row marks them (`<image>` in the text, or a part of type image without a picture of its own);
    a row without any mark has them in front of its first question. So do videos, marked `<video>`.

    Args:
        refs: finds what the row names as pictures.
        reasoning: whether the <think> parts of answers stay in.
        limits: of the row's pictures, where its file has its own.
        faults: collects what is wrong with single pictures, marks and turns, so that all of it is found at once; the
            sample is then only good for looking at what else it holds. None raises the first fault.

    Raises:
        RowError: with one of the codes of `lensmith.errors.RowCode`.
    """
    draft = _Draft(row, layout, refs, faults)
    turns: list[Turn] = [(role, draft.parts(content)) for role, content in _turns(row, layout)]
    thoughts = _count_thoughts(turns)
    if reasoning == "drop":
        _collect(faults, _drop_thoughts, row, turns)
    _collect(faults, draft.place, turns)
    _collect(faults, _check_turns, row, turns)
    images: list[ImageRef] = []
    videos: list[VideoRef] = []
    messages = []
    for role, parts in turns:
        done: list[Part] = []
        for part in parts:
            if isinstance(part, ImageRef):
                done.append(ImageMark(len(images)))
                images.append(part)
            elif isinstance(part, VideoRef):
                done.append(VideoMark(len(videos)))
                videos.append(part)
            elif isinstance(part, Text):  # a mark is only left where that was a fault
                done.append(part)
        messages.append(Message(role, tuple(done)))
    if faults:
        listed = [ref for entries in draft.listed.values() for entry in entries for ref in entry]
        images += [ref for ref in listed if isinstance(ref, ImageRef) and ref not in images]
        videos += [ref for ref in listed if isinstance(ref, VideoRef) and ref not in videos]
    used = layout.used
    others = {name: value for name, value in row.fields.items() if name not in used}
    return Sample(row.where, tuple(messages), tuple(images), others, limits, thoughts, tuple(videos))


def _collect(faults: list[RowError] | None, step: Callable[..., None], *arguments: Any) -> None:
    """Do the step; its fault is collected where there is a list for it."""
    try:
        step(*arguments)
    except RowError as fault:
        if faults is None:
            raise
        faults.append(fault)


class _Draft:
    """Turns one row's contents into parts, and remembers what its columns list."""

    def __init__(self, row: Row, layout: Layout, refs: RefReader, faults: list[RowError] | None) -> None:
        self.row, self.refs, self.faults = row, refs, faults
        self.columns = {IMAGE: layout.image, VIDEO: layout.video}
        self.listed = {
            kind: [entry for name in names for entry in self._read(kind, row.fields.get(name))]
            for kind, names in self.columns.items()
        }
        # Where pictures never stand in a column, `<image>` in a text is just text; so it is beside image parts.
        self.marked = {kind for kind in KINDS if self.columns[kind] or layout.kind == "conversations"}
        self.in_parts: set[Kind] = set()
        """Kinds that the messages hold as parts."""

    def _read(self, kind: Kind, cell: Any) -> list[tuple[Ref, ...]]:
        if kind is VIDEO:
            return [(video,) for video in read_videos(cell, self.refs, self.row.where, self.faults)]
        return [*self.refs.read(cell, self.row.where, self.faults)]

    def parts(self, content: Any) -> list[Draft]:
        """One turn's content: a text, or a list of texts and parts."""
        if content is None:
            return []
        if isinstance(content, Mapping):
            content = [content]
        if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
            return [part for item in content for part in self._part(item)]
        return [Text(text)] if (text := _text_of(content, self.row)) else []

    def _part(self, item: Any) -> list[Draft]:
        if isinstance(item, str):
            return [Text(item)] if item else []
        if not isinstance(item, Mapping):
            self._malformed(f"a part of a message is a {type(item).__name__}")
        guess = "text" if item.get("text") is not None else "video" if item.get("video") is not None else "image"
        name = item.get("type") or guess
        if name == "text":
            text = item.get("text") or ""
            return [Text(text)] if text else []
        kind = next((kind for kind in KINDS if name in kind.types), None)
        if kind is None:
            self._malformed(f"a part of a message has the type {name!r}")
        self.in_parts.add(kind)
        payload = next((item[key] for key in kind.keys if item.get(key) is not None), None)
        if payload is None:
            return [kind]
        # What stands beside a video says more about it.
        return [ref for entry in self._read(kind, item if kind is VIDEO else payload) for ref in entry]

    def _malformed(self, what: str) -> NoReturn:
        raise RowError(
            self.row.where, "malformed_row", f"{what}; Lensmith reads parts of type text, image, image_url and video."
        )

    def place(self, turns: list[Turn]) -> None:
        """Put what the columns list where the marks are, or in front of the first question."""
        for kind in reversed(KINDS):  # where none is marked, the images come first
            if kind in self.marked and kind not in self.in_parts:
                for role, parts in turns:
                    if role == "user":
                        parts[:] = [piece for part in parts for piece in _split_marks(part, kind)]
            num_marks = sum(part is kind for _, parts in turns for part in parts)
            if num_marks == 0 and self.listed[kind]:
                self._place_in_front(turns, kind)
            elif num_marks:
                entries = iter(self._entries(kind, num_marks))
                for _, parts in turns:
                    parts[:] = [ref for part in parts for ref in (next(entries) if part is kind else (part,))]

    def _entries(self, kind: Kind, num_marks: int) -> list[tuple[Ref, ...]]:
        """What goes to each mark."""
        entries = self.listed[kind]
        if num_marks != len(entries):  # then perhaps each page of a document has a mark of its own
            entries = [(ref,) for entry in entries for ref in entry]
        if num_marks == len(entries):
            return entries
        num_listed = len(self.listed[kind])
        marks = f"{kind.name} parts without a picture" if kind in self.in_parts else f"{kind.mark} marks in the text"
        more = "Remove a path or add a mark" if num_marks < num_listed else "Add the missing path or remove a mark"
        raise RowError(
            self.row.where,
            "marks_mismatch",
            f"{num_marks} {marks} but {num_listed} {kind.name}s listed in {self._places(kind)}. {more}; "
            "to leave such rows out, set data.on_bad_row=skip.",
        )

    def _places(self, kind: Kind) -> str:
        return " and ".join(map(repr, self.columns[kind])) or f"'{kind.name}s'"

    def _place_in_front(self, turns: list[Turn], kind: Kind) -> None:
        inline = sum(isinstance(part, VideoRef if kind is VIDEO else ImageRef) for _, parts in turns for part in parts)
        if inline:
            raise RowError(
                self.row.where,
                "marks_mismatch",
                f"the messages hold {inline} {kind.name}s themselves and {self._places(kind)} lists "
                f"{len(self.listed[kind])} more, with no mark for them. Remove one of the two.",
            )
        first = next((parts for role, parts in turns if role == "user"), None)
        if first is not None:
            first[:0] = [ref for entry in self.listed[kind] for ref in entry]


def _answers(turns: Sequence[Turn]) -> list[list[Draft]]:
    return [parts for role, parts in turns if role == "assistant"]


def _count_thoughts(turns: Sequence[Turn]) -> int:
    return sum(count_thoughts(part.text) for parts in _answers(turns) for part in parts if isinstance(part, Text))


def _drop_thoughts(row: Row, turns: Sequence[Turn]) -> None:
    for parts in _answers(turns):
        texts = [part.text for part in parts if isinstance(part, Text)]
        if any(map(holds_thought, texts)):
            said = iter(drop_thoughts(texts, row.where))
            left: list[Draft] = [Text(next(said)) if isinstance(part, Text) else part for part in parts]
            parts[:] = [part for part in left if not isinstance(part, Text) or part.text]


def _split_marks(part: Draft, kind: Kind) -> list[Draft]:
    if not isinstance(part, Text):
        return [part]
    pieces: list[Draft] = []
    for number, text in enumerate(kind.split(part.text)):
        if number:
            pieces.append(kind)
        if text:
            pieces.append(Text(text))
    return pieces


def _turns(row: Row, layout: Layout) -> list[tuple[Role, Any]]:
    """Who says what, in order; contents as found."""
    system = row.fields.get(layout.system) if layout.system else None
    opening: list[tuple[Role, Any]] = [("system", system)] if _text_of(system, row).strip() else []
    if layout.kind == "table":
        question = _text_of(row.fields.get(layout.question), row) if layout.question else ""
        answer = _text_of(row.fields.get(layout.answer or ""), row)
        return [*opening, ("user", question), ("assistant", answer)]
    turns = [_turn(row, number, turn) for number, turn in enumerate(_chat(row, layout.chat or ""), 1)]
    if opening and turns[0][0] == "system":
        raise RowError(
            row.where,
            "malformed_row",
            f"a system text stands both in {layout.system!r} and in {layout.chat!r}; keep one of the two.",
        )
    return opening + turns


def _chat(row: Row, column: str) -> list[Any]:
    value = row.fields.get(column)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except NotJson as cause:
            raise RowError(row.where, "malformed_row", f"{column!r} is a text but not JSON ({cause}).") from cause
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        found = "no turns" if not value else f"a value of type {type(value).__name__}"
        raise RowError(row.where, "malformed_row", f"{column!r} holds {found}; it must be a list of turns.")
    return list(value)


def _turn(row: Row, number: int, turn: Any) -> tuple[Role, Any]:
    if not isinstance(turn, Mapping) or not (turn.get("role") or turn.get("from")):
        raise RowError(
            row.where,
            "malformed_row",
            f"turn {number} does not say who speaks; write it as "
            '{"role": "user", "content": ...} or {"from": "human", "value": ...}.',
        )
    name = turn.get("role") or turn.get("from")
    role = ROLES.get(str(name).lower())
    if role is None:
        raise RowError(
            row.where,
            "unknown_role",
            f"turn {number} is spoken by {name!r}, but roles are {', '.join(ROLES)}; rename it.",
        )
    return role, turn["content"] if turn.get("content") is not None else turn.get("value")


def _text_of(value: Any, row: Row) -> str:
    """A cell as text: numbers as they are written, nothing for null."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    raise RowError(
        row.where,
        "malformed_row",
        f"a value of type {type(value).__name__} stands where one text should; "
        "choose another column with data.columns, or flatten it.",
    )


def _check_turns(row: Row, turns: Sequence[Turn]) -> None:
    """Raise RowError for turns that cannot be learned from, or that the model would not see."""
    roles = [role for role, _ in turns]
    if "assistant" not in roles:
        raise RowError(row.where, "no_answer", f"{len(roles)} turns but none by the assistant, so nothing to learn.")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowError(row.where, "empty_question", "the assistant speaks before any user turn; add the question.")
    if "system" in roles[1:]:
        # Qwen3-VL's template drops a system turn anywhere else without a word.
        raise RowError(
            row.where,
            "malformed_row",
            f"turn {roles.index('system', 1) + 1} is a system turn; only the first can be one.",
        )
    for number, (role, parts) in enumerate(turns, 1):
        text = "".join(part.text for part in parts if isinstance(part, Text))
        seen = next((part for part in parts if isinstance(part, Ref)), None)
        if role != "user" and seen is not None:
            one, many = ("a video", "videos") if isinstance(seen, VideoRef) else ("an image", "images")
            raise RowError(
                row.where,
                "marks_mismatch",
                f"turn {number} is by the {role} and holds {one}, but Qwen3-VL sees {many} in user turns only; "
                "move it there.",
            )
        if role == "assistant" and not text.strip():
            raise RowError(
                row.where,
                "empty_answer",
                f"the answer in turn {number} is empty ({len(text)} characters of white space); write it or remove the row.",
            )
        if role == "user" and not text.strip() and seen is None:
            sentence = f"turn {number} holds neither text nor an image or video; remove it."
            raise RowError(row.where, "empty_question", sentence)
