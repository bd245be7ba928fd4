"""Data files and pictures at hf://, s3:// and gs:// addresses, through fsspec; nothing else is an address of a place.

A data file is fetched once and then read like any other. Pictures are fetched when they are needed, into a bounded cache.
File systems are asked for anew in each process: fsspec keeps them, but not across a fork.
"""

from __future__ import annotations

import posixpath
import re
import sys
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from lensmith.data.cache import keep_file, open_cached
from lensmith.data.fetch import MAX_BYTES
from lensmith.errors import DataError, RowError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEMES = ("hf://", "s3://", "gs://")
FAULTS = (
    "botocore.exceptions:BotoCoreError",
    "aiohttp:ClientError",
    "google.auth.exceptions:GoogleAuthError",
    "httpx:HTTPError",
    "httpx2:HTTPError",
)
"""What the libraries behind the three raise besides OSError and ValueError; huggingface_hub goes through either httpx."""


def is_remote(address: str) -> bool:
    """Whether this names a place that fsspec reaches, and not a path."""
    return address.startswith(SCHEMES)


def open_file_system(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the path in there.

    Raises:
        DataError: the library for it is not installed, or it cannot be set up.
    """
    import fsspec

    scheme = address.partition("://")[0]
    try:
        files = fsspec.filesystem(scheme)  # and not by the whole address: a `::` in it would chain file systems
    except ImportError as cause:
        raise DataError(
            f"{address}: {scheme}:// needs a library that is not installed ({cause}); pip install 'lensmith[cloud]', "
            "or copy the files to this machine."
        ) from cause
    except faults() as cause:
        raise DataError(f"{address}: cannot be reached ({_told(cause)}); check the address and your login.") from cause
    return files, files._strip_protocol(address)


def fetch_file(address: str) -> tuple[Path, str]:
    """A data file as a file of this machine, and where it is, to print. Fetched again when the original changed.

    Raises:
        DataError: there is no such file, or it cannot be had.
    """
    files, path = open_file_system(address)
    try:
        if files.isdir(path):
            inside = ", ".join(sorted(posixpath.basename(name) for name in files.ls(path, detail=False))[:8])
            raise DataError(f"{address}: is a folder ({inside}); name the data file in it.")
        version = files.ukey(path)
        kept, is_new = keep_file(
            address, posixpath.basename(path), version, lambda part: files.get_file(path, str(part))
        )
    except FileNotFoundError as cause:
        raise DataError(f"{address}: there is no such file; check the address.") from cause
    except faults() as cause:
        raise DataError(f"{address}: cannot be fetched ({_told(cause)}); check the address and your login.") from cause
    num_mib = kept.stat().st_size / 2**20
    return kept, f"{address}: {'fetched' if is_new else 'already'} as {kept} ({num_mib:,.1f} MiB)."


def open_remote(address: str) -> BinaryIO:
    """A picture, or a document, at an address; kept in a bounded cache.

    Raises:
        RowError: `missing_file` where it cannot be had, `unreadable_image` where it is too large for a picture.
    """
    return open_cached(address, lambda: _fetch(address))


def _fetch(address: str) -> BytesIO:
    try:
        files, path = open_file_system(address)
        content = cast("bytes", files.cat_file(path, start=0, end=MAX_BYTES + 1))
    except FileNotFoundError as cause:
        raise RowError(address, "missing_file", "there is no such file.") from cause
    except (DataError, *faults()) as cause:
        sentence = f"cannot be fetched ({_told(cause)}); check the address and your login."
        raise RowError(address, "missing_file", sentence) from cause
    if len(content) > MAX_BYTES:
        sentence = f"is over {MAX_BYTES // 2**20} MiB; copy it to this machine and name the file."
        raise RowError(address, "unreadable_image", sentence)
    return BytesIO(content)


class RemoteRoot:
    """A folder at an address that rows name their files in. Whether these are there is seen when they are opened."""

    def __init__(self, folder: str, *, allow_outside: bool = False) -> None:
        """Raises DataError where the library for such addresses is not installed."""
        open_file_system(folder)
        self.folder, self.allow_outside = _normal(folder), allow_outside

    def join(self, name: str, where: str) -> str:
        """The address of the file that a row names. Raises RowError `outside_root`."""
        address = _normal(name if is_remote(name) else f"{self.folder}/{name}")
        if not self.allow_outside and (name.startswith("/") or not address.startswith(f"{self.folder}/")):
            raise outside(address, self.folder, where)
        return address


def outside(address: str, root: str, where: str) -> RowError:
    """Said of an address that a row names and that does not begin with the root's."""
    return RowError(
        where,
        "outside_root",
        f"{address[:200]} is outside {root}; set data.image_root to a folder that holds it, "
        "or data.allow_outside=true where you trust the data file.",
    )


def parent(address: str) -> str:
    """The folder that an address lies in."""
    return address.rpartition("/")[0]


def _normal(address: str) -> str:
    scheme, _, path = address.partition("://")
    return f"{scheme}://{posixpath.normpath(path).lstrip('/')}"


def faults() -> tuple[type[Exception], ...]:
    """What a file system raises when it cannot be reached, does not know us or has no such file."""
    named = (fault.partition(":") for fault in FAULTS)
    loaded = ((sys.modules.get(module), name) for module, _, name in named)  # what is not loaded raises nothing
    return (OSError, ValueError, *(getattr(module, name) for module, name in loaded if module is not None))


def _told(cause: Exception) -> str:
    return re.sub(r"\s+", " ", str(cause))[:300] or type(cause).__name__
