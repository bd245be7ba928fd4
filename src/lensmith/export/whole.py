"""A folder that appears whole or not at all, and never in the place of somebody's files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lensmith.errors import RunError

RECORD = "lensmith_export.json"
"""In every folder that an export wrote: what of, and how. A folder with it may be replaced, no other."""
GIB = 2**30
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def size(nbytes: float) -> str:
    """In MiB where GiB would show as nothing."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"


def check_replaceable(folder: Path) -> None:
    """Raises RunError for a folder that holds something else than an earlier export, and for a file of that name."""
    if folder.is_file():
        raise RunError(f"{folder}: is a file, and an export is a folder. Choose another place with --out.")
    if folder.is_dir() and not (folder / RECORD).is_file() and (held := sorted(p.name for p in folder.iterdir())):
        raise RunError(
            f"{folder}: holds {', '.join(held[:3])} but no {RECORD}, so no export wrote it, and it is left alone. "
            "Choose another folder with --out, or empty this one."
        )


def check_space(folder: Path, nbytes: int) -> None:
    """Raises RunError where fewer bytes than `nbytes` are free for `folder`, which need not exist yet."""
    place = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise RunError(
            f"{folder}: needs {size(nbytes)}, and {size(free)} are free there; nothing was written. "
            "Make room, or choose a folder on another disk with --out."
        )


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its place when the block ends well and goes when it does not.

    Everything is on disk before the rename. An earlier export there is replaced; until then it stays as it is.
    Raises RunError for a folder of something else, and where the disk is full.
    """
    folder = folder.resolve()
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    _put_back(old, folder)  # an export may have been killed between the two renames below
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as cause:
        if cause.errno not in _NO_SPACE:
            raise
        free = size(shutil.disk_usage(folder.parent).free)
        raise RunError(
            f"{folder}: no space left while exporting; {free} are free there, and nothing half is left behind. "
            "Make room, or choose a folder on another disk with --out."
        ) from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _put_back(old, folder)


def _put_back(old: Path, folder: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """What this folder was made of; its presence is what `check_replaceable` asks for."""
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
