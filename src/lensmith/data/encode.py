"""Samples to token ids and labels, by the checkpoint's own chat template; labels by construction, never by search.

What a template writes depends on who speaks and where images stand, not on the words. So each shape of conversation is
rendered once, with a placeholder for every text, and cut at the placeholders into a skeleton; a sample is the skeleton
with its texts filled in. The prompt of each answer is what the template renders for generating it, and what follows the
prompt, up to and with the end mark, is learned:

    <|im_start|>user\\n <|vision_start|><|image_pad|><|vision_end|> {text 0} <|im_end|>\\n<|im_start|>assistant\\n
    {text 1} <|im_end|>                                                                              learned
    \\n

Three things follow. Prompt ids are the ids that serving sees, and answers are cut into tokens as generation would: on
their own. Special tokens written in a text stay plain characters, so no text can open an image or end a turn. And a
template that rewrites texts (drops earlier reasoning, strips white space) is noticed, and then given the real ones.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.data.boxes import convert_messages
from lensmith.data.images import check_policy, read_geometry, size_image
from lensmith.data.skeleton import Fixed, ImageSlot, Run, Skeleton, Templater
from lensmith.data.video import VideoLimits, read_video_limits, size_video
from lensmith.errors import ModelError, RowError
from lensmith.types import (
    IGNORE,
    Encoded,
    ImageMark,
    ImageSize,
    Message,
    Moment,
    Part,
    Sample,
    Text,
    TokenLimits,
    VideoMark,
    VideoRef,
    VisionGeometry,
)

if TYPE_CHECKING:
    from lensmith.config.tree import Images, Video

VideoSizes = tuple[ImageSize, ...]
"""What the moments of one video cost."""

MAX_SKELETONS = 4096
"""Shapes of conversation kept; past it the store is emptied, so that odd data cannot fill the memory."""


class Encoder:
    """Turns samples into ids and labels for one checkpoint; picklable, for data workers."""

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str,
        geometry: VisionGeometry,
        *,
        min_tokens: int,
        max_tokens: int,
        video: VideoLimits | None = None,
    ) -> None:
        """`tokenizer`: the checkpoint's fast tokenizer; `min_tokens`, `max_tokens`: what one image may cost; `video`: what one
        video may, where there are any.

        Raises:
            ConfigError: min_tokens is over max_tokens.
            ModelError: the tokenizer has no fast form, or lacks the special tokens of Qwen3-VL.
        """
        check_policy(min_tokens, max_tokens)
        self.geometry, self.min_tokens, self.max_tokens, self.video = geometry, min_tokens, max_tokens, video
        self.tokenizer = tokenizer
        self._templater = Templater(tokenizer, chat_template)
        self.image_token_id, self.video_token_id = self._templater.image_token_id, self._templater.video_token_id
        self.end_token_id = self._templater.end_token_id
        self._skeletons: dict[object, Skeleton] = {}

    @classmethod
    def from_processor(cls, processor: Any, images: Images, videos: Video | None = None) -> Encoder:
        """For a loaded Qwen3VLProcessor and the image and video sections of a config (None: the defaults of data.video).

        Raises:
            ConfigError: limits that contradict each other.
            ModelError: the processor has no chat template.
        """
        template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
        if not isinstance(template, str):
            found = "none" if template is None else f"several ({', '.join(template)})"
            raise ModelError(
                f"the checkpoint's processor must have one chat template and has {found}; "
                "use the checkpoint's own chat_template.jinja"
            )
        geometry = read_geometry(processor)
        least = geometry.min_tokens if images.min_tokens is None else images.min_tokens
        return cls(
            processor.tokenizer,
            template,
            geometry,
            min_tokens=least,
            max_tokens=images.max_tokens,
            video=read_video_limits(processor, videos),
        )

    def limits(self, own: TokenLimits | None) -> tuple[int, int]:
        """Fewest and most tokens of an image, where its file may have limits of its own."""
        if own is None:
            return self.min_tokens, self.max_tokens
        return self.geometry.min_tokens if own.min_tokens is None else own.min_tokens, own.max_tokens

    def size_video(self, video: VideoRef, max_tokens: int | None = None) -> VideoSizes:
        """What the video costs, moment by moment; see `lensmith.data.video.size_video`."""
        assert self.video is not None, "an encoder without limits for videos was given one"
        return size_video(video, self.geometry, self.video, max_tokens=max_tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_skeletons": {}}

    def encode(
        self,
        sample: Sample,
        image_sizes: Sequence[ImageSize] | None = None,
        video_sizes: Sequence[VideoSizes] | None = None,
    ) -> Encoded:
        """Ids and labels of all turns. The sizes are those of `sample.images` and `sample.videos` where they are known.

        Raises:
            RowError: an image's or video's header cannot be read, or the template does not take these turns.
        """
        sizes = self._sizes(sample, sample.messages, image_sizes, video_sizes)
        return self._fill(sample, sample.messages, sizes, prompt_only=False)

    def encode_prompt(
        self,
        sample: Sample,
        image_sizes: Sequence[ImageSize] | None = None,
        video_sizes: Sequence[VideoSizes] | None = None,
    ) -> Encoded:
        """Ids that ask for the sample's last answer, that answer left out; nothing is learned."""
        last = sample.messages[-1].role == "assistant"
        messages = sample.messages[:-1] if last else sample.messages
        sizes = self._sizes(sample, messages, image_sizes, video_sizes)
        return self._fill(sample, messages, sizes, prompt_only=True)

    def unlearned_answers(self, sample: Sample) -> int:
        """Earlier answers that are context only, because the template shows them differently once they are past.

        Thinking checkpoints do so: their generation prompt opens a thought, and earlier turns are shown without any.
        """
        return self._skeleton(sample, sample.messages, prompt_only=False).unlearned_answers

    def _skeleton(self, sample: Sample, messages: Sequence[Message], *, prompt_only: bool) -> Skeleton:
        shape = (prompt_only, *((message.role, *map(_kind, message.parts)) for message in messages))
        try:
            skeleton = self._skeletons.get(shape)
            if skeleton is None:
                if len(self._skeletons) >= MAX_SKELETONS:
                    self._skeletons.clear()
                skeleton = self._skeletons[shape] = self._templater.skeleton(messages, prompt_only=prompt_only)
            if skeleton.rewrites(messages):
                return self._templater.literal_skeleton(messages, prompt_only=prompt_only)
        except RowError as cause:
            raise RowError(sample.where, cause.code, cause.sentence) from cause.__cause__
        return skeleton

    def _fill(
        self, sample: Sample, messages: Sequence[Message], sizes: Sequence[VideoSizes], *, prompt_only: bool
    ) -> Encoded:
        """`sizes`: of each image and video, in the order of their marks."""
        messages = convert_messages(messages, sample, [size[0] for size in sizes], sample.boxes)
        skeleton = self._skeleton(sample, messages, prompt_only=prompt_only)
        texts = [part.text for message in messages for part in message.parts if isinstance(part, Text)]
        ids = array("i")  # grows in a fraction of the time that a list takes to become a numpy array
        learned: list[slice] = []
        marks = iter(sizes)
        prefix_tokens = 0
        for piece in skeleton.pieces:
            start = len(ids)
            if isinstance(piece, Fixed):
                ids.extend(piece.ids)
            elif isinstance(piece, Run):
                ids.extend(self._templater.tokenise(piece.fill(texts)))
            else:
                if isinstance(piece, ImageSlot):
                    ids += array("i", (self.image_token_id,)) * next(marks)[0].tokens
                else:
                    ids.extend(self._video_ids(next(marks)))
                ids.extend(piece.closing)
                # A prefix with an answer inside could not be shared: its labels would be lost in the branches.
                prefix_tokens = 0 if learned else len(ids)
            if piece.learned:
                learned.append(slice(start, len(ids)))
        labels = array("i", (IGNORE,)) * len(ids)
        for span in learned:
            labels[span] = ids[span]
        input_ids, labels = np.frombuffer(ids, np.int32), np.frombuffer(labels, np.int32)
        return Encoded(sample.where, input_ids, labels, tuple(itertools.chain.from_iterable(sizes)), prefix_tokens)

    def _video_ids(self, moments: VideoSizes) -> Iterator[int]:
        """As Qwen3VLProcessor writes a video: each moment under its time, between marks of its own."""
        templater = self._templater
        for size in moments:
            assert isinstance(size.ref, Moment)
            yield from templater.tokenise(f"<{size.ref.time_s:.1f} seconds>")
            yield templater.start_token_id
            yield from itertools.repeat(templater.video_token_id, size.tokens)
            yield templater.stop_token_id

    def _sizes(
        self,
        sample: Sample,
        messages: Sequence[Message],
        image_sizes: Sequence[ImageSize] | None,
        video_sizes: Sequence[VideoSizes] | None,
    ) -> list[VideoSizes]:
        """Of each image and video that the messages show, in order; an image is as a video of one moment."""
        sizes: list[VideoSizes] = []
        for part in (part for message in messages for part in message.parts):
            if isinstance(part, ImageMark):
                sizes.append((self._size(sample, part.index) if image_sizes is None else image_sizes[part.index],))
            elif isinstance(part, VideoMark):
                known = None if video_sizes is None else video_sizes[part.index]
                sizes.append(self._size_video(sample, part.index) if known is None else known)
        return sizes

    def _size(self, sample: Sample, mark: int) -> ImageSize:
        least, most = self.limits(sample.limits)
        try:
            return size_image(sample.images[mark], self.geometry, min_tokens=least, max_tokens=most)
        except RowError as fault:
            raise fault.at(sample.where) from fault

    def _size_video(self, sample: Sample, mark: int) -> VideoSizes:
        try:
            return self.size_video(sample.videos[mark])
        except RowError as fault:
            raise fault.at(sample.where) from fault


def encode_sample(sample: Sample, encoder: Encoder) -> Encoded:
    """One sample as ids and labels; the public verb for `encoder.encode(sample)`."""
    return encoder.encode(sample)


def _kind(part: Part) -> str:
    if isinstance(part, Text):
        return "text" if part.text else "nothing"
    return "image" if isinstance(part, ImageMark) else "video"
