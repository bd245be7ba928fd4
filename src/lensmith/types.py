"""The nouns of the walk, with their shapes. Read this file first.

rows ──> samples ──> encoded ──> pack ──> model ──> loss ──> step ──> checkpoint

Everything here is frozen and slotted: a stage hands its noun to the next one and never changes it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int
    from torch import Tensor

    from lensmith.config.tree import Boxes

IGNORE = -100
"""Label of a token that is not learned; the value that torch's cross-entropy ignores by default."""

Component = Literal["vision", "merger", "language", "head"]
"""`vision`: the image tower; `merger`: its projector with the deepstack mergers; `language`: the decoder; `head`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record as found on disk, and where that was."""

    where: str
    """`file:line` (1-based), or `file#index` for formats without lines; every message about the row starts with it."""
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A picture that has not been opened yet."""

    source: Path | bytes | str
    """A file, an encoded image, or an address: hf://, s3://, gs://, or http(s) with data.allow_urls."""
    key: str
    """Equal keys mean the same picture: the resolved path, or a digest of the bytes."""
    member: str | None = None
    """Name of the picture inside `source`, where that is a .zip."""
    page: int | None = None
    """Page of the document, from 1, where the picture is one."""

    def __str__(self) -> str:
        place = f"{len(self.source)} bytes" if isinstance(self.source, bytes) else str(self.source)
        place = f"{place}/{self.member}" if self.member else place
        return f"{place}#page={self.page}" if self.page else place


@dataclass(frozen=True, slots=True)
class VideoRef:
    """A video that has not been opened yet."""

    source: ImageRef | tuple[ImageRef, ...]
    """A file, found as pictures are; or the frames, each a picture."""
    key: str
    """Equal keys mean the same video."""
    fps: float | None = None
    """Of a file: frames to take per second. Of frames: how many there are per second. None: as data.video says."""
    times_s: tuple[float, ...] | None = None
    """When each of the frames is shown, where the row says so."""

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, ImageRef) else f"{self.source[0]} and its following frames"


@dataclass(frozen=True, slots=True)
class Clip:
    """What is seen of one video: some of its frames."""

    video: VideoRef
    frames: tuple[int, ...]
    """Their numbers in the video, from 0; whole moments, the last frame twice where it would be alone."""
    times_s: tuple[float, ...]
    """When each is shown."""
    per_moment: int
    """Frames that the image tower sees as one patch in time: two for every Qwen3-VL."""

    @property
    def num_moments(self) -> int:
        return len(self.frames) // self.per_moment


@dataclass(frozen=True, slots=True)
class Moment:
    """Some neighbouring frames of a clip, seen as one picture under one time; to a clip what a page is to a document."""

    clip: Clip
    index: int

    @property
    def frames(self) -> tuple[int, ...]:
        return self.clip.frames[self.index * self.clip.per_moment :][: self.clip.per_moment]

    @property
    def time_s(self) -> float:
        """Halfway between its first and its last frame, as Qwen3VLProcessor counts."""
        times = self.clip.times_s[self.index * self.clip.per_moment :][: self.clip.per_moment]
        return (times[0] + times[-1]) / 2

    @property
    def key(self) -> str:
        """Equal keys mean the same frames of the same video."""
        return f"{self.clip.video.key}#{','.join(map(str, self.frames))}"

    def __str__(self) -> str:
        return f"{self.clip.video} at {self.time_s:.1f} s"


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class ImageMark:
    """The place of an image in a message; `Sample.images[index]` is the image."""

    index: int


@dataclass(frozen=True, slots=True)
class VideoMark:
    """The place of a video in a message; `Sample.videos[index]` is the video."""

    index: int


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """How many language tokens one picture may cost."""

    min_tokens: int | None
    """None: the checkpoint's own minimum."""
    max_tokens: int


Part = Text | ImageMark | VideoMark
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All text of the message, without its images."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """Checked messages and the images they mention, in order of first mention."""

    where: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else the row held, untouched: rewards and breakdowns by column read it."""
    limits: TokenLimits | None = None
    """Of its pictures, where its file has limits of its own."""
    thoughts: int = 0
    """<think> parts of its answers; with data.reasoning=drop they were taken out."""
    videos: tuple[VideoRef, ...] = ()
    """Those that the messages mention, in order of first mention."""
    boxes: Boxes | None = None
    """How boxes in its texts are written: declared in the config, or known from the file's format."""

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return next((m.text for m in reversed(self.messages) if m.role == "user"), "")

    @property
    def answer(self) -> str:
        """Text of the last turn where it is the assistant's, else an empty string."""
        return self.messages[-1].text if self.messages and self.messages[-1].role == "assistant" else ""


@dataclass(frozen=True, slots=True)
class VisionGeometry:
    """How the model's image tower cuts a picture; read from the checkpoint, never typed in."""

    patch_px: int
    """Side of one patch."""
    merge: int
    """Patches per side that become one language token."""
    frames: int
    """Frames per patch in time (temporal_patch_size); a still picture is repeated."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_tokens: int
    """The checkpoint's smallest image, in language tokens."""

    @property
    def token_px(self) -> int:
        """Side of the square that one language token covers: 32 for every Qwen3-VL."""
        return self.patch_px * self.merge

    @property
    def patch_values(self) -> int:
        """Numbers per patch: channels x frames x patch x patch."""
        return 3 * self.frames * self.patch_px**2


@dataclass(frozen=True, slots=True)
class ImageSize:
    """What one image of a sample, or one moment of a video, will cost; known from its file's header alone."""

    ref: ImageRef | Moment
    original_px: tuple[int, int]
    """Height and width upright, that is after the EXIF rotation."""
    seen_px: tuple[int, int]
    """Height and width after resizing: multiples of token_px."""
    tokens: int

    @property
    def scale(self) -> float:
        """Side length seen / side length on disk; below 1 the picture was reduced."""
        (h, w), (H, W) = self.seen_px, self.original_px
        return ((h * w) / (H * W)) ** 0.5


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as token ids and labels; its pixels are still on disk."""

    where: str
    input_ids: Int[np.ndarray, " tokens"]
    labels: Int[np.ndarray, " tokens"]
    """Equal to input_ids where learned, IGNORE elsewhere (not shifted)."""
    images: tuple[ImageSize, ...]
    """Images and the moments of videos, in the order of their tokens."""
    prefix_tokens: int
    """Leading tokens up to and including the last image's end mark, none of them learned; 0 without images."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_learned(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def prefix_key(self) -> tuple[Any, ...] | None:
        """Samples with equal keys start with the same tokens and the same pixels, so they may share that prefix."""
        if not self.prefix_tokens:
            return None
        seen = tuple((image.ref.key, image.seen_px) for image in self.images)
        return (*seen, self.input_ids[: self.prefix_tokens].tobytes())


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens in a pack: a whole sample, a shared prefix, or a branch that attends to its parent's prefix."""

    start: int
    length: int
    parent: int | None = None
    """Index of the prefix segment in `Pack.segments`, or None for a segment that stands alone."""

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Pack:
    """Several samples laid end to end; attention stays inside each, or inside its branch of a shared prefix."""

    input_ids: Int[Tensor, " tokens"]
    labels: Int[Tensor, " tokens"]
    """IGNORE where nothing is learned."""
    positions: Int[Tensor, "4 tokens"]
    """Text, time, height, width; restart with each sample and go on from the prefix in a branch."""
    segments: tuple[Segment, ...]
    pixels: Float[Tensor, "patches values"]
    """One row per patch; an image stands once, however many branches look at it."""
    grids: Int[Tensor, "images 3"]
    """Patches in time, height, width."""
    wheres: tuple[str, ...]
    """The rows in this pack, for messages."""
    pictures: tuple[str, ...] = ()
    """Digests of the pictures, one per grid: equal ones mean equal pixels. Empty where nobody needs to know."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_samples(self) -> int:
        return len(self.wheres)

    def pin_memory(self) -> Pack:
        """The same pack in page-locked host memory, so that copies to a GPU overlap with its work."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


def _map_tensors(pack: Pack, change: Any) -> Pack:
    names = [item.name for item in fields(pack)]
    return replace(pack, **{n: change(v) for n in names if hasattr(v := getattr(pack, n), "data_ptr")})


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss as a sum and a count; only the trainer divides, once per optimizer step."""

    nats: Float[Tensor, ""]
    tokens: int


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one optimizer step cost and did; one line of metrics.jsonl."""

    step: int
    loss: float
    """Nats per learned token, over all packs of the step."""
    grad_norm: float
    learning_rate: float
    samples: int
    tokens: int
    learned_tokens: int
    step_s: float
    data_wait_s: float
    peak_gib: float
    """torch's reserved memory on the GPU, 2**30 bytes; 0 on CPU."""


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`: for sentences."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
