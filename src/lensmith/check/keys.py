"""Sixty-four bits for what rows say and show, so that a million of them are compared in a few megabytes."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from lensmith.check.texts import plain
from lensmith.types import Sample, Text

NOTHING = 0
"""Key of what a row does not have."""


class RowKeys(NamedTuple):
    """Equal keys mean equal rows, in four senses."""

    exact: int
    """The same turns with the same pictures in the same places."""
    loose: int
    """The same texts but for case, white space and final punctuation; whatever the pictures."""
    asked: int
    """The same pictures and the same turns before the last answer; NOTHING without a picture."""
    answered: int
    """The same last answer."""


def row_keys(sample: Sample, contents: Sequence[int]) -> RowKeys:
    """Keys of a sample whose pictures have these digests."""
    shown = b"".join(content.to_bytes(8) for content in contents)
    exact = "\0".join(
        f"{message.role}\1" + "\2".join(part.text if isinstance(part, Text) else "\3" for part in message.parts)
        for message in sample.messages
    )
    said = [plain(message.text) for message in sample.messages]
    asked = "\0".join(said[:-1])
    return RowKeys(
        digest(exact.encode("utf-8", "surrogatepass") + shown),
        digest(f"{asked}\0{said[-1]}".encode("utf-8", "surrogatepass")),
        digest(asked.encode("utf-8", "surrogatepass") + b"\0" + shown) if contents else NOTHING,
        digest(said[-1].encode("utf-8", "surrogatepass")),
    )


def digest(content: bytes) -> int:
    """64 bits, never NOTHING."""
    return int.from_bytes(blake2b(content, digest_size=8).digest()) or 1
