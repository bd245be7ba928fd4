r"""JSON as data files hold it: parsed once, with what Python's parser lets through and nothing else can read.

A lone `\ud83d` is half of a character: no file name, no tokenizer and no terminal takes it.
"""

from __future__ import annotations

import json
from typing import Any


class NotJson(ValueError):
    """The text is no JSON, or holds what cannot be used; the message says what, in a few words."""


def parse_json(text: str) -> Any:
    """The value that the text holds. Raises NotJson."""
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as cause:
        raise NotJson(f"{cause.msg}, column {cause.colno}") from cause
    except UnicodeEncodeError as cause:
        raise NotJson(f"\\u{ord(cause.object[cause.start]):x} without its other half is no character") from cause
    except RecursionError as cause:
        raise NotJson("nested too deep") from cause
    except ValueError as cause:  # a number of over 4,300 digits
        raise NotJson(str(cause)) from cause
    return value
