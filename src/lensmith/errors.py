"""What can go wrong by the user's hand. Every message has four parts: where, what, the two values, the way out.

The command line prints these without a traceback and exits with 1; any other exception is a bug in Lensmith, shows its
traceback and exits with 2.
"""

from __future__ import annotations


class LensmithError(Exception):
    """Something the user can mend; the message says how."""


class ConfigError(LensmithError):
    """A setting is unknown, of the wrong type, contradictory or without effect."""


class DataError(LensmithError):
    """A row, image or data file cannot be used as it is."""


class ModelError(LensmithError):
    """A model name, folder, adapter or version that cannot be used here."""


class RunError(LensmithError):
    """A run stopped: non-finite steps, a failed self-check, no space left, a folder of another run."""


class Interrupted(RunError):
    """Ctrl-C: what was done so far is saved, and the message says how to go on."""
