"""The page at GET /: one file with everything inside it; nothing but its own script and style may run there."""

from __future__ import annotations

import base64
import hashlib
import re

from lensmith.evals.markup import fill_template, show
from lensmith.serve.subject import Subject


def render_page(subject: Subject) -> str:
    """The whole page as text."""
    blanks = {"name": show(subject.name), "kinds": " ".join(reversed(subject.kinds))}
    return fill_template("lensmith.serve", "page.html", blanks)


def page_headers(page: str) -> dict[str, str]:
    """A Content-Security-Policy that names the page's script and style by their hashes, and what goes with it."""
    script, style = (_digest(page, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def _digest(page: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
