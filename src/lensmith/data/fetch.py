"""Pictures at http(s) addresses, downloaded once into a temporary folder; only with data.allow_urls."""

from __future__ import annotations

import getpass
import os
import tempfile
import urllib.error
import urllib.request
from hashlib import blake2b
from pathlib import Path

from lensmith.errors import RowError

TIMEOUT_S = 30
MAX_BYTES = 64 * 2**20
"""A larger download is refused: it is hardly one picture."""


def fetch_image(url: str) -> Path:
    """The downloaded file. Every process and epoch after the first finds it on disk.

    Raises:
        RowError: `missing_file` where the address does not answer, `unreadable_image` where it answers too much.
    """
    folder = Path(tempfile.gettempdir()) / f"lensmith-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / blake2b(url.encode(), digest_size=16).hexdigest()
    if path.exists():
        return path
    request = urllib.request.Request(url, headers={"User-Agent": "lensmith"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content = answer.read(MAX_BYTES + 1)
    except (urllib.error.URLError, TimeoutError, OSError, ValueError) as cause:
        raise RowError(url, "missing_file", f"cannot be fetched ({cause}); download it and name the file.") from cause
    if len(content) > MAX_BYTES:
        raise RowError(url, "unreadable_image", f"is over {MAX_BYTES // 2**20} MiB; download it and name the file.")
    # Written beside and moved into place, so that another process never reads half a picture.
    handle, name = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return Path(name).replace(path)
