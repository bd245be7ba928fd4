"""Videos: which frames are seen, when and how large, told without decoding them.

Qwen3-VL reads a video as pairs of frames, each pair under its own time, as if it were a picture:

    <|vision_start|><0.2 seconds><|vision_start|><|video_pad|>...<|vision_end|><1.2 seconds>...<|vision_end|>

So a video becomes a Clip of some of its frames, and each Moment of the clip an ImageSize like that of a picture: packs,
shared prefixes and plans need not know that there are videos. Frames, sizes and times are those of transformers'
Qwen3VLVideoProcessor under the limits that `write_video_policy` gives it (tests/reference/test_video_reference.py).
Decoding is in lensmith.data.frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.config.tree import Video
from lensmith.data.frames import SAME_TIME_S, VideoHeader, decode_last, probe_file
from lensmith.data.images import MAX_ASPECT, check_whole, header_px
from lensmith.errors import ConfigError, RowError
from lensmith.types import Clip, ImageRef, ImageSize, Moment, VideoRef, VisionGeometry

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """How many frames are taken and what they may cost."""

    fps: float
    """Frames taken per second."""
    min_frames: int
    """Fewest frames taken from a video that has as many; the checkpoint's own."""
    max_frames: int
    min_px: int
    """Smallest volume (frames x height x width) after resizing; the checkpoint's own."""
    max_tokens: int
    """Most language tokens of a whole video, its time marks not counted."""


def read_video_limits(processor: Any, settings: Video | None = None) -> VideoLimits:
    """The limits of data.video (None: its defaults), with what a loaded Qwen3VLProcessor says about the small end.

    Raises:
        ConfigError: max_tokens leaves less than one token to a pair of frames.
    """
    settings, videos = settings or Video(), processor.video_processor
    moments = math.ceil(settings.max_frames / videos.temporal_patch_size)
    if settings.max_tokens < moments:
        raise ConfigError(
            f"data.video.max_tokens is {settings.max_tokens}, but the {moments} pairs of data.video.max_frames="
            f"{settings.max_frames} need at least one token each; raise max_tokens or lower max_frames."
        )
    return VideoLimits(
        fps=settings.fps,
        min_frames=videos.min_frames,
        max_frames=settings.max_frames,
        # `shortest_edge` is a volume in this processor, despite its name.
        min_px=videos.size["shortest_edge"],
        max_tokens=settings.max_tokens,
    )


def write_video_policy(processor: Any, limits: VideoLimits) -> None:
    """Make the processor take and resize frames as training did, so that a saved copy serves with the same ones."""
    videos = processor.video_processor
    token_volume = videos.temporal_patch_size * (videos.patch_size * videos.merge_size) ** 2
    videos.size = {"shortest_edge": limits.min_px, "longest_edge": limits.max_tokens * token_volume}
    videos.fps, videos.min_frames, videos.max_frames = limits.fps, limits.min_frames, limits.max_frames
    # A second limit, per frame, which transformers means to turn on by default; longest_edge says it all.
    videos.cap_pixels_per_frame = False


def size_video(
    video: VideoRef, geometry: VisionGeometry, limits: VideoLimits, *, max_tokens: int | None = None
) -> tuple[ImageSize, ...]:
    """What the video will cost, moment by moment; reads its header (see `read_header`).

    Args:
        max_tokens: most tokens of one moment, where that is less than the limits give; at least 1.

    Raises:
        RowError: the video cannot be read, or its sides are over 200 : 1.
    """
    header = read_header(video)
    clip = take_clip(video, header, geometry, limits)
    most = limits.max_tokens if max_tokens is None else min(limits.max_tokens, max_tokens * clip.num_moments)
    try:
        seen = fit_clip_px(*header.size_px, len(clip.frames), geometry, limits.min_px, most)
    except RowError as cause:
        raise RowError(str(video), cause.code, cause.sentence) from None
    tokens = seen[0] * seen[1] // geometry.token_px**2
    return tuple(ImageSize(Moment(clip, number), header.size_px, seen, tokens) for number in range(clip.num_moments))


def read_header(video: VideoRef) -> VideoHeader:
    """Size, number and times of the frames; of a file one frame is decoded, to learn how it is turned.

    Raises:
        RowError: `unreadable_video`, `missing_file`, `decompression_bomb`; `malformed_row` where the pictures of a list
            differ in size.
    """
    if isinstance(video.source, ImageRef):
        return probe_file(video)
    sizes = [header_px(ref) for ref in video.source]
    odd = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
    if odd is not None:
        (height, width), (first_height, first_width) = sizes[odd], sizes[0]
        raise RowError(
            str(video),
            "malformed_row",
            f"frame {odd + 1} is {width} x {height} px but frame 1 is {first_width} x {first_height}; "
            "the frames of a video must have one size, and pictures that differ belong in an image column.",
        )
    times = None if video.times_s is None else np.array(video.times_s, dtype=np.float64)
    return VideoHeader(sizes[0], len(sizes), video.fps, times)


def take_clip(video: VideoRef, header: VideoHeader, geometry: VisionGeometry, limits: VideoLimits) -> Clip:
    """The frames to see and their times. An odd last frame is seen twice, so that all moments are whole.

    Of a file, frames are taken at the row's rate, else at that of the limits; of a list, all are (up to max_frames).
    """
    fps = (video.fps or limits.fps) if isinstance(video.source, ImageRef) else None
    frames = choose_frames(header, limits, fps)
    times = frames / (header.fps or limits.fps) if header.times_s is None else header.times_s[frames]
    padding = (0, -len(frames) % geometry.frames)
    frames, times = np.pad(frames, padding, mode="edge"), np.pad(times, padding, mode="edge")
    return Clip(video, tuple(frames.tolist()), tuple(times.tolist()), geometry.frames)


def choose_frames(header: VideoHeader, limits: VideoLimits, fps: float | None) -> Int[np.ndarray, " frames"]:
    """Numbers of the frames to see, spread evenly from the first to the last.

    As `sample_frames` of transformers' video_processing_qwen3_vl.py. Where the rate changes they are spread over time:
    spread over numbers, as there, most frames would come from where there is most movement.

    Args:
        fps: frames to take per second; None for all.
    """
    total, last = header.num_frames, header.num_frames - 1
    wanted = total if fps is None or header.fps is None else int(total / header.fps * fps)
    count = min(max(wanted, limits.min_frames), limits.max_frames, total)
    if header.times_s is None or fps is None:
        return np.linspace(0, last, count).round().astype(int)
    moments = np.linspace(header.times_s[0], header.times_s[last], count)
    # What is on the screen at a moment is the last frame that began by then; a frame that stays is taken once.
    return np.unique(np.searchsorted(header.times_s, moments + SAME_TIME_S, side="right") - 1)


def fit_clip_px(
    height: int, width: int, num_frames: int, geometry: VisionGeometry, min_px: int, max_tokens: int
) -> tuple[int, int]:
    """Height and width of every frame after resizing: multiples of token_px, the clip within max_tokens.

    This is `smart_resize` of transformers' video_processing_qwen3_vl.py, which counts the frames into its limits: a longer
    clip is seen smaller. `num_frames` is even here. There an odd last frame is doubled only after resizing, which can go
    over the maximum by one moment; so can narrow strips. Both stay within it here.

    Raises:
        RowError: `extreme_aspect`, for sides of over 200 : 1.
    """
    side, moments = geometry.token_px, num_frames // geometry.frames
    max_px = max_tokens * geometry.frames * side**2
    if min(height, width) < side:
        scale = max(side / height, side / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise RowError(
            "video",
            "extreme_aspect",
            f"is {width} x {height} px, longer than {MAX_ASPECT} : 1, which the model cannot see; crop it.",
        )
    rows, columns = round(height / side), round(width / side)
    if num_frames * rows * columns * side**2 > max_px:
        shrink = math.sqrt(num_frames * height * width / max_px)
        rows = max(1, math.floor(height / shrink / side))
        columns = max(1, math.floor(width / shrink / side))
    elif num_frames * rows * columns * side**2 < min_px:
        stretch = math.sqrt(min_px / (num_frames * height * width))
        rows, columns = math.ceil(height * stretch / side), math.ceil(width * stretch / side)
    most = max_tokens // moments
    rows, columns = min(rows, most // min(columns, most)), min(columns, most)
    return rows * side, columns * side


def check_video(sizes: tuple[ImageSize, ...]) -> None:
    """Raise RowError where a video was cut off, which its header cannot tell: its last frame is decoded."""
    for size in sizes[-1:]:
        assert isinstance(size.ref, Moment)
        clip = size.ref.clip
        if isinstance(clip.video.source, ImageRef):
            decode_last(clip)
        else:
            for number in set(clip.frames):
                check_whole(clip.video.source[number])
