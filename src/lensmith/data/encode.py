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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.data.images import check_policy, read_geometry, size_image
from lensmith.data.skeleton import Fixed, Run, Skeleton, Templater
from lensmith.errors import ModelError, RowError
from lensmith.types import IGNORE, Encoded, ImageMark, ImageSize, Message, Sample, Text, TokenLimits, VisionGeometry

if TYPE_CHECKING:
    from lensmith.config.tree import Images

MAX_SKELETONS = 4096
"""Shapes of conversation kept; past it the store is emptied, so that odd data cannot fill the memory."""


class Encoder:
    """Turns samples into ids and labels for one checkpoint; picklable, for data workers."""

    def __init__(
        self, tokenizer: Any, chat_template: str, geometry: VisionGeometry, *, min_tokens: int, max_tokens: int
    ) -> None:
        """`tokenizer`: the checkpoint's fast tokenizer; `min_tokens`, `max_tokens`: what one image may cost.

        Raises:
            ConfigError: min_tokens is over max_tokens.
            ModelError: the tokenizer has no fast form, or lacks the special tokens of Qwen3-VL.
        """
        check_policy(min_tokens, max_tokens)
        self.geometry, self.min_tokens, self.max_tokens = geometry, min_tokens, max_tokens
        self.tokenizer = tokenizer
        self._templater = Templater(tokenizer, chat_template)
        self.image_token_id = self._templater.image_token_id
        self.end_token_id = self._templater.end_token_id
        self._skeletons: dict[object, Skeleton] = {}

    @classmethod
    def from_processor(cls, processor: Any, images: Images) -> Encoder:
        """For a loaded Qwen3VLProcessor and the image section of a config.

        Raises:
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
        return cls(processor.tokenizer, template, geometry, min_tokens=least, max_tokens=images.max_tokens)

    def limits(self, own: TokenLimits | None) -> tuple[int, int]:
        """Fewest and most tokens of an image, where its file may have limits of its own."""
        if own is None:
            return self.min_tokens, self.max_tokens
        return self.geometry.min_tokens if own.min_tokens is None else own.min_tokens, own.max_tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_skeletons": {}}

    def encode(self, sample: Sample, image_sizes: Sequence[ImageSize] | None = None) -> Encoded:
        """Ids and labels of all turns. `image_sizes`: those of `sample.images` where they are already known.

        Raises:
            RowError: an image's header cannot be read, or the template does not take these turns.
        """
        return self._fill(sample, sample.messages, image_sizes, prompt_only=False)

    def encode_prompt(self, sample: Sample, image_sizes: Sequence[ImageSize] | None = None) -> Encoded:
        """Ids that ask for the sample's last answer, that answer left out; nothing is learned."""
        last = sample.messages[-1].role == "assistant"
        return self._fill(sample, sample.messages[:-1] if last else sample.messages, image_sizes, prompt_only=True)

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
        self,
        sample: Sample,
        messages: Sequence[Message],
        image_sizes: Sequence[ImageSize] | None,
        *,
        prompt_only: bool,
    ) -> Encoded:
        skeleton = self._skeleton(sample, messages, prompt_only=prompt_only)
        marks = [part.index for message in messages for part in message.parts if isinstance(part, ImageMark)]
        sizes = tuple(self._size(sample, mark) if image_sizes is None else image_sizes[mark] for mark in marks)
        texts = [part.text for message in messages for part in message.parts if isinstance(part, Text)]
        ids: list[int] = []
        learned: list[slice] = []
        pictures = iter(sizes)
        prefix_tokens = 0
        for piece in skeleton.pieces:
            start = len(ids)
            if isinstance(piece, Fixed):
                ids += piece.ids
            elif isinstance(piece, Run):
                ids += self._templater.tokenise(piece.fill(texts))
            else:
                ids += [self.image_token_id] * next(pictures).tokens
                ids += piece.closing
                # A prefix with an answer inside could not be shared: its labels would be lost in the branches.
                prefix_tokens = 0 if learned else len(ids)
            if piece.learned:
                learned.append(slice(start, len(ids)))
        input_ids = np.array(ids, dtype=np.int32)
        labels = np.full_like(input_ids, IGNORE)
        for span in learned:
            labels[span] = input_ids[span]
        return Encoded(sample.where, input_ids, labels, sizes, prefix_tokens)

    def _size(self, sample: Sample, mark: int) -> ImageSize:
        least, most = self.limits(sample.limits)
        try:
            return size_image(sample.images[mark], self.geometry, min_tokens=least, max_tokens=most)
        except RowError as fault:
            raise fault.at(sample.where) from fault


def encode_sample(sample: Sample, encoder: Encoder) -> Encoded:
    """One sample as ids and labels; the public verb for `encoder.encode(sample)`."""
    return encoder.encode(sample)


def _kind(part: Text | ImageMark) -> str:
    return "image" if isinstance(part, ImageMark) else "text" if part.text else "nothing"
