"""Files of a clean copy: pictures and videos under names that relative paths reach, each written once."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import TYPE_CHECKING, Any, BinaryIO

from lensmith.data.images import open_image
from lensmith.data.places import open_ref
from lensmith.data.video_refs import read_videos
from lensmith.types import ImageRef

if TYPE_CHECKING:
    from lensmith.check.pictures import Look
    from lensmith.data.refs import Pictures, RefReader
    from lensmith.types import VideoRef

PNG_LEVEL = 3
"""Of 9; larger levels take several times as long for a few percent."""
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "HEIF": ".heic"}
"""Of picture formats whose suffix is not their name."""
UNSAFE = re.compile(r"[^\w.-]+")
"""What names of files had better not hold; `#` and `;` mean something in a cell."""
STEM_CHARACTERS = 60


class Copier:
    """Copies what cells name into one folder. Worker processes may do so side by side: names depend on sources alone."""

    def __init__(self, folder: Path, look: Callable[[ImageRef], Look]) -> None:
        """`folder`: of the copy; files go to `images` and `videos` in it. `look`: what is known of a picture."""
        self.folder, self._look = folder, look

    def images(self, cell: Any, refs: RefReader, where: str) -> list[Any]:
        """Names of the pictures in a cell; a document is one entry, with its pages."""
        return [self._entry(entry) for entry in refs.read(cell, where)]

    def videos(self, cell: Any, refs: RefReader, where: str) -> list[Any]:
        """Names of the videos in a cell, with what is said about their times."""
        return [self._video(video) for video in read_videos(cell, refs, where)]

    def _entry(self, entry: Pictures) -> str:
        pages = [ref.page for ref in entry if ref.page is not None]
        if not pages:
            return self._picture(entry[0])
        span = f"{pages[0]}" if len(pages) == 1 else f"{pages[0]}-{pages[-1]}"
        return f"{self._file(entry[0], 'images')}#page={span}"

    def _picture(self, ref: ImageRef) -> str:
        look = self._look(ref)
        if look.oddities:
            return self._write(
                ref, "images", ".png", lambda file: open_image(ref).save(file, "PNG", compress_level=PNG_LEVEL)
            )
        kind = look.header.format if look.header else ""
        return self._file(ref, "images", SUFFIXES.get(kind, f".{kind.lower()}"))

    def _video(self, video: VideoRef) -> Any:
        if isinstance(video.source, ImageRef):
            named: Any = self._file(video.source, "videos")
        else:
            named = [self._picture(ref) for ref in video.source]
        said = {"fps": video.fps, "timestamps": video.times_s and list(video.times_s)}
        said = {name: value for name, value in said.items() if value is not None}
        return {"video": named, **said} if said else named

    def _file(self, ref: ImageRef, place: str, suffix: str | None = None) -> str:
        """Copy a file as it is; `suffix` None keeps its own."""

        def copy(target: BinaryIO) -> None:
            with open_ref(ref) as source:
                copyfileobj(source, target)

        return self._write(ref, place, suffix, copy)

    def _write(self, ref: ImageRef, place: str, suffix: str | None, write: Callable[[BinaryIO], None]) -> str:
        name = PurePosixPath(
            ref.member or ("" if isinstance(ref.source, bytes) else str(ref.source)).replace("\\", "/")
        )
        stem = UNSAFE.sub("-", name.stem)[:STEM_CHARACTERS] or "image"
        digest = blake2b(ref.key.partition("#")[0].encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        relative = f"{place}/{stem}-{digest}{name.suffix if suffix is None else suffix}"
        target = self.folder / relative
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            # Written beside and moved into place: another process may want the same picture at this moment.
            handle, beside = tempfile.mkstemp(dir=target.parent)
            with os.fdopen(handle, "wb") as file:
                write(file)
            Path(beside).chmod(0o644)
            Path(beside).replace(target)
        return relative
