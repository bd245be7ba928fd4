"""Files from elsewhere, kept on this machine: data files for good, pictures as long as there is room.

Pictures lie in 256 folders by digest, and each folder makes room for itself: no index, no lock, and as many processes as
like. Everything is written beside its place and moved there, so that nobody reads half a file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

PICTURE_BYTES = 20 * 2**30
"""All pictures kept; those fetched first go first."""
NUM_FOLDERS = 256


def cache_folder() -> Path:
    """`lensmith` in the user's cache folder, which XDG_CACHE_HOME names, readable by the user alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lensmith"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def open_cached(address: str, fetch: Callable[[], BytesIO], *, limit_bytes: int = PICTURE_BYTES) -> BinaryIO:
    """The picture of that address, fetched if it is not there (any more); `limit_bytes` bounds all that are kept."""
    digest = _digest(address)
    path = cache_folder() / "pictures" / digest[:2] / digest
    try:
        return path.open("rb")  # and not a question before it: another process may be making room
    except FileNotFoundError:
        content = fetch()
    path.parent.mkdir(parents=True, exist_ok=True)
    _put(path, content.getbuffer())
    _make_room(path.parent, limit_bytes // NUM_FOLDERS)
    return content


def keep_file(address: str, name: str, version: str, fetch: Callable[[Path], None]) -> tuple[Path, bool]:
    """A whole file by that name, of that version, and whether it had to be fetched; `fetch` writes it to a path."""
    path = cache_folder() / "files" / _digest(f"{address} {version}") / name
    if path.exists():
        return path, False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{name}.{os.getpid()}.part")
    try:
        fetch(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path, True


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _put(path: Path, content: memoryview) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(name).replace(path)


def _make_room(folder: Path, limit_bytes: int) -> None:
    """Remove the oldest files until the rest is within the limit; another process may be doing the same."""
    files = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            state = path.stat()
            files.append((state.st_mtime_ns, state.st_size, path))
    files.sort()
    excess = sum(size for _, size, _ in files) - limit_bytes
    for _, size, path in files[:-1]:  # never the one just written
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size
