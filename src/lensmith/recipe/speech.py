"""What the recipe says to the person at the keyboard: on stderr, each remark once per process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lensmith.console import say

_said: set[str] = set()


class RenamedWarning(UserWarning):
    """A keyword has another name by now; it was understood."""


def say_once(sentence: str) -> None:
    """A remark that would be noise the second time."""
    if sentence not in _said:
        _said.add(sentence)
        say(sentence)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """What libraries plan to rename is for us to follow, not for users to read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def forget_said() -> None:
    """Everything may be said again; for tests."""
    _said.clear()


def warn_renamed(sentence: str) -> None:
    """A warning at the line of the user's own code."""
    # Four frames up: this one, read_keywords, the method of ours, the user's line.
    warnings.warn(sentence, RenamedWarning, stacklevel=4)
