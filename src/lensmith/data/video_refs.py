"""What a cell or a message part may hold as a video, turned into VideoRefs; files are found as those of pictures are.

A file (path, address, bytes, or a {"bytes", "path"} struct), a list of pictures that are its frames, or a struct that says
more: {"video": ..., "fps": 1.0}, {"video": [...], "timestamps": [0.0, 1.5]}. A list of files is several videos.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, NoReturn

from lensmith.data.refs import DEEPEST_CELL, NOT_THERE, RefReader
from lensmith.errors import RowError
from lensmith.types import VideoRef

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".webm", ".mkv", ".gif", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv",
)  # fmt: skip
"""A list of names like these is several videos; a list of others is the frames of one."""
PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\x00", b"MM\x00*")
"""How JPEG, PNG, BMP and both kinds of TIFF begin; WebP needs a look further in."""
VIDEO_KEYS = ("video", "video_url", "frames", "bytes", "path", "url")
"""Where a struct holds a video; the bytes first, since the path beside them may be of another machine."""
RATE_KEYS = ("fps", "sample_fps")
REFUSED_KEYS = (
    "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width",
    "video_start", "video_end",
)  # fmt: skip
"""What qwen-vl-utils reads beside a video and Lensmith does not. Passed over, they would train on other frames."""


def read_videos(cell: Any, refs: RefReader, where: str, faults: list[RowError] | None = None) -> list[VideoRef]:
    """All videos of a cell; none for null or an empty string.

    Args:
        faults: collects what is wrong with single files, as in `RefReader.read`; None raises it.

    Raises:
        RowError: what `RefReader.read` raises, or `malformed_row` for settings that cannot be used.
    """
    videos = []
    for value, settings in _entries(cell, {}, where):
        try:
            videos += _read_entry(value, settings, refs, where)
        except RowError as fault:
            if faults is None:
                raise
            faults.append(fault)
            videos.append(VideoRef(NOT_THERE, NOT_THERE.key))
    return videos


def _entries(
    cell: Any, settings: Mapping[str, Any], where: str, depth: int = 0
) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Each video of a cell, and what the structs around it say."""
    if depth > DEEPEST_CELL:
        _malformed(where, f"videos stand in lists nested over {DEEPEST_CELL} deep; flatten them")
    if isinstance(cell, str) and cell.strip().startswith("["):
        with suppress(ValueError, RecursionError):  # a file may be called [1].mp4
            cell = json.loads(cell)
    if isinstance(cell, Mapping):
        payload = next((cell[key] for key in VIDEO_KEYS if cell.get(key) is not None), None)
        yield from _entries(payload, {**settings, **cell}, where, depth + 1)
    elif _is_list(cell) and not all(map(_is_frame, cell)):
        for value in cell:
            yield from _entries(value, settings, where, depth + 1)
    elif not (cell is None or cell in ("", []) or (isinstance(cell, float) and math.isnan(cell))):
        yield cell, settings


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_frame(value: Any) -> bool:
    if isinstance(value, Mapping):
        if any(value.get(key) is not None for key in ("video", "video_url", "frames")):
            return False
        value = value.get("bytes") or value.get("path") or value.get("url") or ""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value[:4]).startswith(PICTURE_STARTS) or value[8:12] == b"WEBP"
    if isinstance(value, str):
        return PurePath(value.partition("?")[0]).suffix.lower() not in VIDEO_SUFFIXES
    return not _is_list(value)


def _read_entry(value: Any, settings: Mapping[str, Any], refs: RefReader, where: str) -> list[VideoRef]:
    """One video, or several where their names stand in one text with `;` between them."""
    for key in REFUSED_KEYS:
        if settings.get(key) is not None:
            _malformed(
                where, f"a video asks for {key}={settings[key]!r}; set data.video for all videos, or cut the file"
            )
    rate = next((settings[key] for key in RATE_KEYS if settings.get(key) is not None), None)
    if rate is not None and not (_is_number(rate) and rate > 0):
        _malformed(where, f"a video has fps={rate!r}; it must be a number over 0")
    found = tuple(ref for entry in refs.read(value, where) for ref in entry)
    if _is_list(value):
        times = _times(settings.get("timestamps"), len(found), where)
        digest = blake2b("\0".join(ref.key for ref in found).encode(), digest_size=16).hexdigest()
        return [VideoRef(found, digest, rate, times)]
    if settings.get("timestamps") is not None:
        _malformed(where, "a video file has timestamps of its own; list them only for frames that are pictures")
    return [VideoRef(ref, ref.key, rate) for ref in found]


def _times(value: Any, num_frames: int, where: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or not all(map(_is_number, value)) or list(value) != sorted(value):
        _malformed(where, f"a video has timestamps={value!r}; they must be seconds in rising order")
    if len(value) != num_frames:
        _malformed(where, f"a video has {len(value)} timestamps for {num_frames} frames; give each frame one")
    return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _malformed(where: str, sentence: str) -> NoReturn:
    raise RowError(where, "malformed_row", f"{sentence}.")
