"""Where sentences go: a person reads stderr, whoever runs the program."""

from __future__ import annotations

import os
import sys
from typing import Any


def say(text: Any) -> None:
    """For the person: a text, or a table of rich's; once, whatever the number of processes."""
    if os.environ.get("RANK", "0") != "0":
        return
    from rich.console import Console

    Console(file=sys.stderr).print(text, markup=False, highlight=False, soft_wrap=True)
