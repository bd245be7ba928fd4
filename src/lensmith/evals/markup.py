"""What every page is made of: a template beside its module, the house style, and text that can do no harm.

Rows are strangers' texts. Whatever of them goes into a page goes through `show`, so that markup shows as text and nothing
hidden in it stays hidden: control characters, those that turn the direction of what follows, and halves of characters
are written out.
"""

from __future__ import annotations

import base64
import string
from collections.abc import Mapping
from html import escape
from importlib import resources

CONTROL_PICTURES = {number: 0x2400 + number for number in range(0x20) if chr(number) not in "\t\n"} | {0x7F: 0x2421}
"""Control characters -> the pictures that Unicode has for them."""
HIDDEN = (0x00AD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF)
"""Characters without a shape that can hide or reverse text; joiners are not among them, since emoji and scripts need them."""
SURROGATES = range(0xD800, 0xE000)
"""Halves of characters, which JSON can hold and UTF-8 cannot."""
_SHOWN = CONTROL_PICTURES | {number: f"⟨U+{number:04X}⟩" for number in (*HIDDEN, *SURROGATES)}


def fill_template(package: str, name: str, blanks: Mapping[str, str]) -> str:
    """The template `name` of that package with its blanks filled in; `$house` is the house style."""
    template = string.Template(_read(package, name))
    return template.substitute(blanks, house=_read("lensmith.evals", "house.css"))


def _read(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def show(text: str) -> str:
    """Any text as HTML that shows it, whatever it holds."""
    return escape(text.translate(_SHOWN))


def shorten(text: str, characters: int) -> str:
    """At most so many characters, the last of them an ellipsis where some were cut."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def list_facts(facts: Mapping[str, str]) -> str:
    """Figures with their names, for a `<dl class="facts">`."""
    return "".join(f"<div><dt>{show(name)}</dt><dd>{show(value)}</dd></div>" for name, value in facts.items())


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that fetches nothing; `kind` is their media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
