"""Frames of video files, decoded by PyAV: only those that are seen, upright, once per process as far as memory allows.

A file says itself how many frames it has and how fast they follow each other; where it does not (WebM, Matroska, GIF, a
changing rate), its packets are counted, which reads the file but decodes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lensmith.data.images import open_image, resize_pictures
from lensmith.data.places import open_ref
from lensmith.errors import RowError
from lensmith.types import Clip, ImageRef, Moment, VideoRef

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

KEPT_BYTES = 256 * 2**20
"""Resized frames remembered per process: about three clips of the default 12,288 tokens."""
STEADY_SHARE, STEADY_FRAMES = 0.01, 0.25
"""A rate is steady where a file's average agrees so well with its clock, or no frame is further from its place: phones and
clocks of whole milliseconds waver by less."""
KNOWN_VIDEOS = 4096
"""Headers remembered per process; one of changing rate takes 8 bytes per frame."""
SAME_TIME_S = 1e-6
"""Times closer than this are equal: less than the finest clock in use, 90 kHz."""
MAX_FRAME_PX = 2 * 89_478_485
"""Pixels of one frame from which a file is refused, as Pillow refuses pictures (twice its MAX_IMAGE_PIXELS)."""
LATE_FRAMES = 1.5
"""The last frame stands in for one up to so much later: some files count one frame more than they hold."""


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What is known of a video before its frames are decoded."""

    size_px: tuple[int, int]
    """Height and width of every frame, upright."""
    num_frames: int
    fps: float | None
    """Frames per second on average; None for a list of pictures that does not say."""
    times_s: Float[np.ndarray, " frames"] | None = None
    """When each frame is shown, where that is not number / fps. Of a file, from its first frame on."""
    was_counted: bool = False
    """Whether the file was read through once, because it does not say how many frames it has, or when they are shown."""
    start_s: float = 0.0
    """What the file's clock says at the first frame."""

    @property
    def step_s(self) -> float:
        """Seconds from frame to frame, on average."""
        return 1 / self.fps if self.fps else 1.0

    @property
    def near_s(self) -> float:
        """Half the shortest step: a frame so close to a time is the one that is meant."""
        if self.times_s is None or self.num_frames < 2:
            return self.step_s / 2
        return max(float(np.diff(self.times_s).min()) / 2, SAME_TIME_S)


def probe_file(video: VideoRef) -> VideoHeader:
    """What the container says of a file, and its first frame, which alone tells how the video is to be turned.

    Raises:
        RowError: `unreadable_video` for what holds no video or no frame, `missing_file`, `decompression_bomb`.
    """
    return _remembered(_headers, _version(video), lambda: _probe(video))


def _probe(video: VideoRef) -> VideoHeader:
    with _opened(video) as (container, stream):
        if stream.height * stream.width > MAX_FRAME_PX:
            sentence = f"its frames are {stream.width} x {stream.height} px, an unreasonable size; encode it smaller."
            raise RowError(str(video), "decompression_bomb", sentence)
        times = None if stream.frames and _is_steady(stream) else _packet_times(container, stream)
        total = stream.frames if times is None else len(times)
        first = _first_frame(video, container, stream, total) if total else None
    if first is None:
        raise RowError(str(video), "unreadable_video", "holds a video of 0 frames; encode it again, or remove the row.")
    size_px = (first.width, first.height) if _quarter_turns(first) % 2 else (first.height, first.width)
    if times is None:
        return VideoHeader(size_px, total, float(stream.average_rate), start_s=first.time or 0.0)
    fps, start_s = float(stream.average_rate or 1), float(times[0])
    times = times - start_s
    is_steady = np.abs(times * fps - np.arange(total)).max() <= STEADY_FRAMES
    return VideoHeader(size_px, total, fps, None if is_steady else times, was_counted=True, start_s=start_s)


def _first_frame(video: VideoRef, container: Any, stream: Any, total: int) -> Any:
    from av.error import FFmpegError

    try:
        container.seek(0)
        return next(container.decode(stream), None)
    except FFmpegError as cause:
        raise _undecodable(video, 0, total, 0.0, cause) from cause


def _is_steady(stream: Any) -> bool:
    average, tick = stream.average_rate, stream.guessed_rate
    return bool(average and tick and abs(average / tick - 1) <= STEADY_SHARE)


def _packet_times(container: Any, stream: Any) -> Float[np.ndarray, " frames"]:
    """When each frame is shown, by the file's clock; read from the packets, which come in the order of decoding."""
    packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
    return np.sort([float(pts * stream.time_base) for packet in packets if (pts := packet.pts) is not None])


def read_moment(moment: Moment, seen_px: tuple[int, int]) -> UInt8[Tensor, "frames 3 height width"]:
    """The frames of one moment in RGB, upright and resized. The whole clip is decoded, and remembered for the next ones.

    Raises:
        RowError: `unreadable_video`, naming the frame that cannot be decoded.
    """
    return _kept.frames(moment.clip, seen_px)[moment.index * moment.clip.per_moment :][: moment.clip.per_moment]


def decode_last(clip: Clip) -> None:
    """Raise RowError where the last frame of a clip from a file cannot be decoded."""
    last = Clip(clip.video, clip.frames[-1:], clip.times_s[-1:], 1)
    _remembered(_whole, (_version(clip.video), last.frames), lambda: _decode(last, lambda _: None))


T = TypeVar("T")

_headers: dict[object, VideoHeader] = {}
_whole: dict[object, Any] = {}
"""Videos whose last frame was decoded; both by version, since a cache of the videos themselves would hold their bytes."""


def _remembered(store: dict[object, T], key: object, make: Callable[[], T]) -> T:
    """What is in the store, or what is made and put there; the oldest of KNOWN_VIDEOS goes first."""
    if key not in store:
        made = make()
        if len(store) >= KNOWN_VIDEOS:
            del store[next(iter(store))]
        store[key] = made
    return store[key]


def _version(video: VideoRef) -> object:
    """Equal as long as the video and its files are as they were."""
    refs = (video.source,) if isinstance(video.source, ImageRef) else video.source
    paths = [ref.source for ref in refs if isinstance(ref.source, Path)]
    states = [path.stat() for path in paths if path.exists()]
    return video.key, tuple((state.st_mtime_ns, state.st_size) for state in states)


class _Kept:
    """The last clips that were decoded, up to KEPT_BYTES, and always the last one."""

    def __init__(self) -> None:
        self._clips: OrderedDict[object, Tensor] = OrderedDict()

    def frames(self, clip: Clip, seen_px: tuple[int, int]) -> UInt8[Tensor, "frames 3 height width"]:
        key = (_version(clip.video), clip.frames, seen_px)
        if key not in self._clips:
            frames = _clip_frames(clip, seen_px)
            while self._clips and sum(map(_num_bytes, self._clips.values())) + _num_bytes(frames) > KEPT_BYTES:
                self._clips.popitem(last=False)
            self._clips[key] = frames
        self._clips.move_to_end(key)
        return self._clips[key]


_kept = _Kept()


def _num_bytes(frames: Tensor) -> int:
    return frames.numel() * frames.element_size()


def _clip_frames(clip: Clip, seen_px: tuple[int, int]) -> UInt8[Tensor, "frames 3 height width"]:
    import torch

    def see(picture: UInt8[np.ndarray, "rows columns 3"]) -> UInt8[Tensor, "1 3 height width"]:
        return resize_pictures(picture[None], seen_px)

    return torch.cat(_decode(clip, see) if isinstance(clip.video.source, ImageRef) else _open_list(clip, see))


def _open_list(clip: Clip, see: Callable[[np.ndarray], Any]) -> list[Any]:
    sources, seen = clip.video.source, []
    assert isinstance(sources, tuple)
    for frame in clip.frames:
        try:
            seen.append(see(np.array(open_image(sources[frame]))))
        except RowError as fault:
            sentence = f"frame {frame + 1} of {len(sources)} cannot be read ({fault})"
            raise RowError(str(clip.video), "unreadable_video", sentence) from fault
    return seen


def _decode(clip: Clip, see: Callable[[np.ndarray], Any]) -> list[Any]:
    """What `see` makes of each frame of the clip, in RGB and upright, as it comes out of the decoder."""
    from av.error import FFmpegError

    with _opened(clip.video) as (container, stream):
        try:
            return [see(_picture(frame)) for frame in _Walk(container, stream, clip, may_seek=True)]
        except (FFmpegError, _Lost):
            pass
    # A key frame need not be a place to start from: what is shown just after it may build on frames from before it. From
    # the start of the file there is no doubt, and what fails then is damaged.
    with _opened(clip.video) as (container, stream):
        walk = _Walk(container, stream, clip, may_seek=False)
        try:
            return [see(_picture(frame)) for frame in walk]
        except (FFmpegError, _Lost) as cause:
            frame, time_s = clip.frames[walk.found], clip.times_s[walk.found]
            raise _undecodable(clip.video, frame, probe_file(clip.video).num_frames, time_s, cause) from cause


class _Lost(Exception):
    """A frame is not there, or not whole."""


class _Walk:
    """Iterates over the frames of a clip through its file, from key frame to key frame where that skips any."""

    def __init__(self, container: Any, stream: Any, clip: Clip, *, may_seek: bool) -> None:
        self.container, self.stream, self.times_s, self.may_seek = container, stream, clip.times_s, may_seek
        self.found = 0
        """Frames handed out so far."""
        header = probe_file(clip.video)
        self.start_s, self.near_s, self.late_s = header.start_s, header.near_s, LATE_FRAMES * header.step_s
        if may_seek:
            container.seek(0)  # Matroska's index is read by the first seek
        self.frames: Iterator[Any] = container.decode(stream)
        self.frame: Any = None
        """The last one decoded."""

    def __iter__(self) -> Iterator[Any]:
        for time_s in self.times_s:
            if self.may_seek:
                self._skip_to(time_s)
            self._decode_to(time_s)
            yield self.frame
            self.found += 1

    def _decode_to(self, time_s: float) -> None:
        while self.frame is None or self._time_s() < time_s - self.near_s:
            following = next(self.frames, None)
            if following is None:
                if self.frame is None or self._time_s() < time_s - self.late_s:
                    raise _Lost("the file ends before it")
                break
            if following.is_corrupt:  # also where it is not asked for: the next ones build on it
                raise _Lost("it is painted over where it cannot be read")
            self.frame = following
        if self.may_seek and self._time_s() > time_s + self.near_s:
            raise _Lost("the file continues behind it")

    def _skip_to(self, time_s: float) -> None:
        """Go on from the last key frame before that time, where it is still ahead."""
        entries: Any = getattr(self.stream, "index_entries", ())  # not in PyAV before 16
        if not len(entries):
            return
        # The index counts in order of decoding, which runs ahead of that of showing from the first frame on.
        ahead = min(0, entries[0].timestamp - (self.stream.start_time or 0))
        number = entries.search_timestamp(int((time_s + self.start_s) / self.stream.time_base) + ahead)
        if number < 0 or self._index_time_s(entries[number].timestamp - ahead) <= (self._time_s() if self.frame else 0):
            return
        self.container.seek(entries[number].timestamp, stream=self.stream)
        self.frames, self.frame = self.container.decode(self.stream), None

    def _index_time_s(self, timestamp: int) -> float:
        return float(timestamp * self.stream.time_base) - self.start_s

    def _time_s(self) -> float:
        if self.frame.time is None:
            raise _Lost("it has no time")
        return self.frame.time - self.start_s


@contextmanager
def _opened(video: VideoRef) -> Iterator[tuple[Any, Any]]:
    """The container of a file and its first stream of moving pictures."""
    import av
    from av.error import FFmpegError
    from av.stream import Disposition

    assert isinstance(video.source, ImageRef), "a list of pictures has no container"
    try:
        with open_ref(video.source) as file, av.open(file) as container:
            # The cover picture of a song is a video stream too.
            moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not moving:
                kinds = " and ".join(sorted({stream.type for stream in container.streams}))
                sentence = f"holds no video{f', only {kinds}' if kinds else ''}; name another file, or remove the row."
                raise RowError(str(video), "unreadable_video", sentence)
            if moving[0].codec_context is None:
                sentence = "is in a format that FFmpeg does not know; encode it again as .mp4, or remove the row."
                raise RowError(str(video), "unreadable_video", sentence)
            # With threads, FFmpeg's decoders lose track of the frames that they painted over because of damage.
            moving[0].thread_type = "NONE"
            yield container, moving[0]
    except FileNotFoundError as cause:
        raise RowError(str(video), "missing_file", "there is no such file.") from cause
    except (FFmpegError, OSError, UnicodeDecodeError) as cause:  # the last: tags that are no text, which PyAV reads
        sentence = f"is not a video that FFmpeg can read ({cause}); encode it again as .mp4, or remove the row."
        raise RowError(str(video), "unreadable_video", sentence) from cause


def _picture(frame: Any) -> UInt8[np.ndarray, "height width 3"]:
    """A decoded frame in RGB and upright; what is clear is laid on white, as in pictures."""
    if any(part.is_alpha for part in frame.format.components):
        clear = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = clear[..., 3:]
        picture = ((clear[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        picture = frame.to_ndarray(format="rgb24")
    return np.rot90(picture, _quarter_turns(frame))


def _quarter_turns(frame: Any) -> int:
    """Quarter turns to the left that make a frame upright."""
    return round(frame.rotation / 90)


def _undecodable(video: VideoRef, frame: int, total: int, time_s: float, cause: Exception) -> RowError:
    return RowError(
        str(video),
        "unreadable_video",
        f"frame {frame + 1} of {total} at {time_s:.1f} s cannot be decoded ({cause}); the file is damaged or was cut off: "
        "fetch or encode it again, or remove the row.",
    )
