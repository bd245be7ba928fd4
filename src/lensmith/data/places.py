# ruff: noqa: PTH100, PTH111, PTH112, PTH116, PTH118, PTH120, PTH123  (pathlib takes five times as long, and this runs for every picture of every row)
"""Where pictures lie: paths held inside one folder, members of .zip files, addresses; and how each is opened.

A row is data from anywhere, so what it names is looked for below the image root and nowhere else, unless
data.allow_outside says that the file is trusted: not by absolute paths, not through `..`, not through links. Archives are
read in place: nothing is unpacked to disk, and a member is found by its whole name, so none can lead out.
"""

from __future__ import annotations

import functools
import io
import lzma
import os
import re
import stat
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from lensmith.data.fetch import MAX_BYTES, fetch_image
from lensmith.data.remote import open_remote
from lensmith.errors import RowError
from lensmith.types import ImageRef, counted

KNOWN_FOLDERS = 65_536
"""Folders remembered per process as inside the root; past it the store is emptied."""
IN_ARCHIVE = re.compile(
    r"(?P<archive>.+?\.(?:zip|tar|tar\.\w+|tgz|7z|rar))[/\\](?P<member>.+)", re.IGNORECASE | re.DOTALL
)
HUB_SNAPSHOT = re.compile(r"(?P<repository>.+)/snapshots/[0-9a-f]{40}(/.*)?")
"""How the Hugging Face cache lays out a repository: snapshots of links into one folder of blobs."""
OPEN_ARCHIVES = 8
ZIP_FAULTS = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What Python raises on broken archives; RuntimeError is said of encrypted ones, and of versions that it does not know."""
WEB = ("http://", "https://")


class LocalRoot:
    """A folder of this machine that rows name their files in."""

    def __init__(self, folder: str | Path, *, allow_outside: bool = False) -> None:
        self.folder, self.allow_outside = os.path.abspath(os.path.expanduser(folder)), allow_outside
        real = os.path.realpath(self.folder)
        snapshot = HUB_SNAPSHOT.fullmatch(real)
        self._starts = (_below(self.folder), _below(real))
        self._real_starts = (_below(real), *([_below(f"{snapshot['repository']}/blobs")] if snapshot else []))
        self._stay: dict[str, bool] = {}

    def find(self, name: str, where: str) -> tuple[str, str | None]:
        """Absolute path of the file that a row names; for a picture inside a .zip also its name in there.

        Raises:
            RowError: `outside_root`, `missing_file`, or `unreadable_image` for an archive that cannot be read in place.
        """
        # normpath, not resolve(): a few microseconds instead of a look at every folder on the way.
        path = os.path.normpath(os.path.join(self.folder, name))
        try:
            if self._is_file(path, where):
                return path, None
            if (match := IN_ARCHIVE.fullmatch(path)) and self._is_file(match["archive"], where):
                member = match["member"].replace(os.sep, "/")
                check_member(Path(match["archive"]), member, where)
                return match["archive"], member
        except ValueError as cause:  # a null byte, or half of a surrogate pair
            raise RowError(where, "missing_file", f"no file can be called {name[:80]!a}; mend the path.") from cause
        raise self._missing(path, where)

    def holds(self, name: str) -> bool:
        """Whether a row may name this file, and it is there."""
        try:
            return self._is_file(os.path.normpath(os.path.join(self.folder, name)), "")
        except (RowError, ValueError):
            return False

    def _is_file(self, path: str, where: str) -> bool:
        if not self.allow_outside and not (path.startswith(self._starts) and self._stays(os.path.dirname(path))):
            raise self._outside(path, where)
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                if not self.allow_outside and not os.path.realpath(path).startswith(self._real_starts):
                    raise self._outside(path, where)
                mode = os.stat(path).st_mode
        except OSError:
            return False
        return stat.S_ISREG(mode)

    def _stays(self, folder: str) -> bool:
        """Whether no link on the way leads out; asked once per folder, since it looks at every part of the path."""
        stays = self._stay.get(folder)
        if stays is None:
            if len(self._stay) >= KNOWN_FOLDERS:
                self._stay.clear()
            stays = self._stay[folder] = _below(os.path.realpath(folder)).startswith(self._real_starts)
        return stays

    def _outside(self, path: str, where: str) -> RowError:
        leads = f" leads to {os.path.realpath(path)}," if path.startswith(self._starts) else " is"
        return RowError(
            where,
            "outside_root",
            f"{path}{leads} outside {self.folder}; set data.image_root to a folder that holds it, "
            "or data.allow_outside=true where you trust the data file.",
        )

    def _missing(self, path: str, where: str) -> RowError:
        folder = os.path.dirname(path)
        if os.path.isdir(path):
            what = "is a folder"
        else:
            what = "is missing" if os.path.isdir(folder) else f"is missing, and so is its folder {folder}"
        return RowError(
            where,
            "missing_file",
            f"{path} {what}; relative paths start from {self.folder}, which data.image_root changes. "
            "To leave such rows out, set data.on_bad_row=skip.",
        )


def open_ref(ref: ImageRef) -> BinaryIO:
    """The file that a picture, or the document it is a page of, is stored in; seekable, wherever it lies.

    On this machine it is unbuffered, because little is read of most.

    Raises:
        FileNotFoundError: a file of this machine is gone.
        RowError: what lies elsewhere cannot be had.
    """
    if isinstance(ref.source, bytes):
        return io.BytesIO(ref.source)
    if isinstance(ref.source, Path):
        if ref.member is not None:
            return io.BytesIO(read_member(ref.source, ref.member))
        return open(ref.source, "rb", buffering=0)  # pyright: ignore[reportReturnType]
    return fetch_image(ref.source) if ref.source.startswith(WEB) else open_remote(ref.source)


def check_member(archive: Path, member: str, where: str) -> None:
    """Raise RowError where the archive is no .zip, or has no such member."""
    if archive.suffix.lower() != ".zip":
        sentence = f"{archive.name} has no index to read {member} by; unpack it, or pack it again as .zip."
        raise RowError(where, "unreadable_image", sentence)
    try:
        opened = _open_archive(archive)
    except ZIP_FAULTS as cause:
        raise RowError(
            where, "unreadable_image", f"{archive} cannot be read as .zip ({cause}); pack it again."
        ) from cause
    if member not in opened.NameToInfo:
        sentence = (
            f"{archive} holds {counted(len(opened.NameToInfo), 'member')}, and none called {member}; mend the path."
        )
        raise RowError(where, "missing_file", sentence)


def read_member(archive: Path, member: str) -> bytes:
    """One file inside a .zip, whole: a partial read would leave its checksum unchecked.

    Raises:
        RowError: `decompression_bomb` for one that claims to be over MAX_BYTES, `unreadable_image` for a broken one.
    """
    where = f"{archive}/{member}"
    check_member(archive, member, where)
    opened = _open_archive(archive)
    num_bytes = opened.getinfo(member).file_size
    if num_bytes > MAX_BYTES:
        sentence = f"unfolds to {num_bytes:,} bytes, and one picture may have {MAX_BYTES:,}; unpack the archive."
        raise RowError(where, "decompression_bomb", sentence)
    try:
        return opened.read(member)  # at most file_size bytes, whatever the compressed data unfolds to
    except ZIP_FAULTS as cause:
        raise RowError(where, "unreadable_image", f"cannot be unpacked ({cause}); pack it again.") from cause


def _open_archive(path: Path) -> zipfile.ZipFile:
    state = path.stat()
    # A process that was forked needs a handle of its own: one handle has one place to read from.
    return _open_archive_once(path, state.st_mtime_ns, state.st_size, os.getpid())


@functools.lru_cache(maxsize=OPEN_ARCHIVES)
def _open_archive_once(path: Path, changed_ns: int, num_bytes: int, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _below(folder: str) -> str:
    """How every path inside the folder starts."""
    return folder.rstrip(os.sep) + os.sep
