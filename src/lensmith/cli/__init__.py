"""The verbs: parse, call, print, exit code. What they do is elsewhere and loads when a verb runs."""

# isort: off
from lensmith.cli.app import DONE, USER_ERROR, app, main

# In the order of `lensmith --help`, which is that of the walk.
from lensmith.cli import start, train, serve, verify, export, convert, look  # noqa: F401

# isort: on

__all__ = ["DONE", "USER_ERROR", "app", "main"]
