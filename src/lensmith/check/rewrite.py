"""A row with other pictures and other texts, in its own layout: what a clean copy is made of.

It follows the ways in which `lensmith.data.samples` reads a row: columns, turns, parts; everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lensmith.data.boxes import ANNOTATED_PX
from lensmith.data.json_text import parse_json
from lensmith.data.samples import IMAGE, ROLES, VIDEO, Kind

if TYPE_CHECKING:
    from lensmith.data.layout import Layout
    from lensmith.types import Role

Cells = Callable[[Any], list[Any]]
"""From a cell that holds pictures or videos to what stands for each of them in the copy."""


@dataclass(frozen=True, slots=True)
class Rewriter:
    """What is put in the place of what."""

    layout: Layout
    cells: Mapping[Kind, Cells]
    text: Callable[[Role, str], str]

    def rewrite(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a usable row, rewritten."""
        layout = self.layout
        # What only an annotation reader writes: the copy's answers no longer need it.
        done = {name: value for name, value in fields.items() if name != ANNOTATED_PX}
        for kind, names in ((IMAGE, layout.image), (VIDEO, layout.video)):
            for name in names:
                if name in done:
                    done[name] = self._cell(kind, done[name])
        if layout.chat is not None:
            turns = done[layout.chat]
            done[layout.chat] = [self._turn(turn) for turn in (parse_json(turns) if isinstance(turns, str) else turns)]
        spoken: tuple[tuple[str | None, Role], ...] = ((layout.question, "user"), (layout.answer, "assistant"))
        for name, role in spoken:
            if name is not None and isinstance(done.get(name), str):
                done[name] = self.text(role, done[name])
        return done

    def _cell(self, kind: Kind, cell: Any) -> Any:
        """One name where there was one, a list where there was a list, and nothing for nothing."""
        names = self.cells[kind](cell)
        if not names:
            return cell
        return names[0] if len(names) == 1 and not _is_list(cell) else names

    def _turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        role = ROLES[str(turn.get("role") or turn.get("from")).lower()]
        key = "content" if turn.get("content") is not None else "value"
        return {**turn, key: self._content(role, turn.get(key))}

    def _content(self, role: Role, content: Any) -> Any:
        if isinstance(content, str):
            return self.text(role, content)
        if isinstance(content, Mapping):
            content = [content]
        return [part for item in content for part in self._part(role, item)] if _is_list(content) else content

    def _part(self, role: Role, item: Any) -> list[Any]:
        """One part as one or, for a document of several pages, more."""
        if isinstance(item, str):
            return [self.text(role, item)]
        kept = {name: value for name, value in item.items() if value is not None}
        if isinstance(kept.get("text"), str):
            return [{**kept, "text": self.text(role, kept["text"])}]
        kind = VIDEO if kept.get("type") in VIDEO.types or "video" in kept else IMAGE
        payload = next((kept[key] for key in kind.keys if key in kept), None)
        if payload is None:
            return [item]  # a mark: the row's own column says what goes here
        found = self.cells[kind](kept if kind is VIDEO else payload)
        return [{"type": kind.name, **(one if isinstance(one, dict) else {kind.name: one})} for one in found]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
