"""Which columns hold what: guessed from names and shapes, always said, always overridable with data.columns."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lensmith.data.json_text import NotJson, parse_json
from lensmith.errors import DataError, RowError

if TYPE_CHECKING:
    from lensmith.config.tree import Columns
    from lensmith.data.rows import Rows

LOOK_AT_ROWS = 100
"""Rows whose columns are looked at: in JSON Lines not every row has every column."""

CHAT_NAMES = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
IMAGE_NAMES = (
    "image", "images", "image_path", "image_paths", "image_file", "image_files", "img", "imgs", "img_path", "file_name",
    "filename", "picture", "photo", "image_url", "image_id", "path", "file",
)  # fmt: skip
VIDEO_NAMES = ("video", "videos", "video_path", "video_paths", "video_file", "video_files", "video_url", "clip")
QUESTION_NAMES = ("question", "query", "prompt", "instruction", "problem", "user", "input")
ANSWER_NAMES = (
    "answer", "response", "solution", "output", "completion", "assistant", "ground_truth", "target", "caption", "label",
    "text",
)  # fmt: skip
SYSTEM_NAMES = ("system", "system_prompt")


@dataclass(frozen=True, slots=True)
class Layout:
    """How to read the rows of one file."""

    kind: Literal["messages", "conversations", "table"]
    chat: str | None
    """Column with the turns, unless the rows are a table."""
    image: tuple[str, ...]
    question: str | None
    answer: str | None
    system: str | None
    sentence: str
    """What was guessed, in one line to print."""
    video: tuple[str, ...] = ()

    @property
    def used(self) -> frozenset[str]:
        """Columns that the sample is made of."""
        names = (self.chat, *self.image, *self.video, self.question, self.answer, self.system)
        return frozenset(name for name in names if name)


def guess_layout(rows: Rows, columns: Columns) -> Layout:
    """Columns by name, in any case, unless `columns` says which.

    Raises:
        DataError: a column that `columns` names is not there, or none looks like the answer, with the columns there are.
    """
    seen = _look_at(rows)
    for setting, name in columns.model_dump().items():
        if name is not None and name not in seen:
            near = difflib.get_close_matches(name, seen, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{rows.name}: data.columns.{setting} is {name!r}, but there are {_listed(seen)}.{hint}")
    chat = None if columns.question or columns.answer else _find_chat(seen)
    if columns.image:
        image = (columns.image,)
    else:
        both = tuple(name for name in seen if name.lower() in ("image", "images"))
        found = _find(seen, IMAGE_NAMES, taken=(chat, columns.question, columns.answer))
        image = both or ((found,) if found else ())
    if columns.video:
        video = (columns.video,)
    else:
        found = _find(seen, VIDEO_NAMES, taken=(chat, *image, columns.question, columns.answer))
        video = (found,) if found else ()
    system = columns.system or _find(seen, SYSTEM_NAMES)
    if chat is not None:
        kind = "conversations" if _speaker_key(seen[chat]) == "from" else "messages"
        question = answer = None
    else:
        kind = "table"
        question = columns.question or _find(seen, QUESTION_NAMES, taken=(*image, *video, columns.answer, system))
        answer = columns.answer or _find(seen, ANSWER_NAMES, taken=(*image, *video, question, system))
        if answer is None:
            raise DataError(
                f"{rows.name}: no column looks like the answer among {_listed(seen)}; "
                "name it, as in data.columns.answer=caption"
            )
    layout = Layout(kind, chat, image, question, answer, system, "", video)
    return replace(layout, sentence=_sentence(rows.name, layout, seen))


def _look_at(rows: Rows) -> dict[str, Any]:
    """Column names in order of appearance, each with one of its values, from the first rows that can be read."""
    seen: dict[str, Any] = {}
    fault: RowError | None = None
    for index in range(min(LOOK_AT_ROWS, len(rows))):
        try:
            fields = rows[index].fields
        except RowError as error:
            fault = fault or error
            continue
        for name, value in fields.items():
            if seen.get(name) is None:
                seen[name] = value
    if not seen and fault is not None:
        raise DataError(f"none of the first {min(LOOK_AT_ROWS, len(rows))} rows can be read. {fault}") from fault
    return seen


def _find(seen: Mapping[str, Any], names: Sequence[str], taken: Sequence[str | None] = ()) -> str | None:
    free = {
        name.lower().replace(" ", "_").replace("-", "_"): name for name in reversed(list(seen)) if name not in taken
    }
    return next((free[name] for name in names if name in free), None)


def _find_chat(seen: Mapping[str, Any]) -> str | None:
    named = [_find(seen, (name,)) for name in CHAT_NAMES]
    return next((name for name in itertools.chain(named, seen) if name is not None and _speaker_key(seen[name])), None)


def _speaker_key(value: Any) -> Literal["role", "from"] | None:
    """How a list of turns says who speaks; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except NotJson:
            return None
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        return None
    first = value[0]
    if not isinstance(first, Mapping):
        return None
    return "role" if first.get("role") else "from" if first.get("from") else None


def _listed(seen: Mapping[str, Any]) -> str:
    return f"the columns {', '.join(map(repr, seen))}"


def _sentence(name: str, layout: Layout, seen: Mapping[str, Any]) -> str:
    parts = []
    if layout.chat:
        style = "ShareGPT turns" if layout.kind == "conversations" else "chat turns"
        parts.append(f"{style} from {layout.chat!r}")
    if layout.image:
        parts.append(f"images from {' and '.join(map(repr, layout.image))}")
    if layout.video:
        parts.append(f"videos from {' and '.join(map(repr, layout.video))}")
    if layout.question:
        parts.append(f"questions from {layout.question!r}")
    if layout.answer:
        parts.append(f"answers from {layout.answer!r}")
    if layout.system:
        parts.append(f"system text from {layout.system!r}")
    others = [repr(column) for column in seen if column not in layout.used]
    rest = f"; not learned: {', '.join(others)}" if others else ""
    return f"{name}: {', '.join(parts)}{rest}. Set data.columns to change this."
