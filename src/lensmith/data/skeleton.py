"""A chat template's output with holes: what it writes around the texts of one shape of conversation.

The template is rendered with a placeholder for each text, made of characters that no template looks for. Where the
template would treat a real text differently from its placeholder, `Skeleton.rewrites` says so, and the texts themselves
are rendered, with their special tokens broken up for as long as the template's own are being looked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lensmith.data.words import WordTokenizer
from lensmith.errors import ModelError, RowCode, RowError
from lensmith.types import ImageMark, Message, Text, VideoMark

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
"""As in transformers' Qwen3VLProcessor, for tokenizers that do not name their own."""

HOLE = re.compile("\ue000([0-9]+)\ue001")
"""A placeholder: the number of a text between two characters that Unicode keeps for private use."""
PRIVATE_USE = range(0xE000, 0xF900)
TAG = re.compile(r"</?[a-z_]+>")
"""Tags such as <think> that a template writes or looks for."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Ids that are the same for every sample of this shape."""

    ids: tuple[int, ...]
    learned: bool


@dataclass(frozen=True, slots=True)
class Run:
    """Text between two special tokens, cut into tokens as one string: fixed strings, and numbers of texts to fill in."""

    strings: tuple[str | int, ...]
    learned: bool

    def fill(self, texts: Sequence[str]) -> str:
        return "".join(part if isinstance(part, str) else texts[part] for part in self.strings)


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """As many image tokens as the next image costs, and its end mark."""

    closing: tuple[int, ...]
    learned: bool = False


@dataclass(frozen=True, slots=True)
class VideoSlot:
    """The moments of the next video, each under its time, and the end mark of the whole."""

    closing: tuple[int, ...]
    learned: bool = False


Piece = Fixed | Run | ImageSlot | VideoSlot


@dataclass(frozen=True, slots=True)
class Skeleton:
    pieces: tuple[Piece, ...]
    strips: bool = False
    """Whether the template takes white space off the ends of texts."""
    tags: re.Pattern[str] | None = None
    """What the template looks for in texts."""
    unlearned_answers: int = 0

    def rewrites(self, messages: Sequence[Message]) -> bool:
        """Whether the template might show these texts differently from how they are."""
        if self.tags is None and not self.strips:
            return False
        for message in messages:
            for part in message.parts:
                if isinstance(part, Text):
                    if self.tags is not None and self.tags.search(part.text):
                        return True
                    if self.strips and part.text != part.text.strip():
                        return True
        return False


class Templater:
    """One checkpoint's template and tokenizer."""

    def __init__(self, tokenizer: Any, chat_template: str) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} has no fast form; save it with a tokenizer.json"
            )
        self._tokenizer, self._template = tokenizer, chat_template
        self.tokenise = WordTokenizer(backend)
        """Ids of a text, special tokens in it as plain characters."""
        self._special = {
            token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special
        }
        image, end = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN, tokenizer.eos_token
        video = getattr(tokenizer, "video_token", None) or VIDEO_TOKEN
        missing = [token for token in (image, video, VISION_START, VISION_END, end) if token not in self._special]
        if missing:
            raise ModelError(
                f"the tokenizer has no special token {missing[0]!r}, which Qwen3-VL's format needs; "
                "use the tokenizer that came with the checkpoint"
            )
        self._end = end
        self._slots: dict[str, type[ImageSlot] | type[VideoSlot]] = {image: ImageSlot, video: VideoSlot}
        self.image_token_id, self.video_token_id = self._special[image], self._special[video]
        self.start_token_id, self.stop_token_id = self._special[VISION_START], self._special[VISION_END]
        self.end_token_id = self._special[end]
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_re = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        tags = sorted({tag for tag in TAG.findall(chat_template) if tag not in self._special})
        self._tags = re.compile("|".join(map(re.escape, tags))) if tags else None

    def skeleton(self, messages: Sequence[Message], *, prompt_only: bool) -> Skeleton:
        """What the template writes around texts in messages of this shape; their words do not matter."""
        pieces, unlearned = self._cut(messages, prompt_only, lambda number, _: f"\ue000{number}\ue001")
        held = [string for piece in pieces if isinstance(piece, Run) for string in piece.strings]
        texts = [part for message in messages for part in message.parts if isinstance(part, Text)]
        for number, part in enumerate(texts):
            if part.text and held.count(number) != 1:
                raise self._fault(f"it shows text {number + 1} of the row {held.count(number)} times instead of once")

        def padded(number: int, _: str = "") -> str:
            return f"\n \ue000{number}\ue001 \n"

        whole = self._render(self._turns(messages, padded), prompt_only)
        strips = any(padded(number) not in whole for number, part in enumerate(texts) if part.text)
        return Skeleton(pieces, strips, self._tags, unlearned)

    def literal_skeleton(self, messages: Sequence[Message], *, prompt_only: bool) -> Skeleton:
        """What the template makes of these very texts; nothing is left to fill in."""
        everything = "".join(message.text for message in messages)
        breaker = next(char for char in map(chr, PRIVATE_USE) if char not in everything)

        def show(_: int, text: str) -> str:
            return self._special_re.sub(lambda token: token[0][0] + breaker + token[0][1:], text)

        pieces, unlearned = self._cut(messages, prompt_only, show, breaker)
        return Skeleton(pieces, unlearned_answers=unlearned)

    def _cut(
        self,
        messages: Sequence[Message],
        prompt_only: bool,
        show: Callable[[int, str], str],
        breaker: str | None = None,
    ) -> tuple[tuple[Piece, ...], int]:
        """Pieces of the rendered text, and how many answers could not be told apart from their context."""
        turns = self._turns(messages, show)
        rendered = self._render(turns, prompt_only)
        answers, unlearned = ([], 0) if prompt_only else self._answers(turns, rendered)
        pieces: list[Piece] = []
        stop = 0
        for start, end in answers:
            pieces += self._pieces(rendered[stop:start], breaker, learned=False)
            pieces += self._pieces(rendered[start:end], breaker, learned=True)
            stop = end
        pieces += self._pieces(rendered[stop:], breaker, learned=False)
        for kind, mark, slot in (("images", ImageMark, ImageSlot), ("videos", VideoMark, VideoSlot)):
            num_marks = sum(isinstance(part, mark) for message in messages for part in message.parts)
            num_slots = sum(isinstance(piece, slot) for piece in pieces)
            if num_slots != num_marks:
                raise self._fault(f"it shows {num_slots} {kind} where the row has {num_marks}", "marks_mismatch")
        return tuple(_merged(pieces)), unlearned

    def _answers(self, turns: list[dict[str, Any]], rendered: str) -> tuple[list[tuple[int, int]], int]:
        """From the end of each answer's prompt to the end of its end mark, as offsets into the rendered text."""
        spans: list[tuple[int, int]] = []
        unlearned = 0
        numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        for number in numbers:
            prompt = self._render(turns[:number], True)
            if rendered.startswith(prompt):
                end = rendered.find(self._end, len(prompt))
                if end < 0:
                    raise self._fault(f"it writes no end mark {self._end} after the answer in turn {number + 1}")
                spans.append((len(prompt), end + len(self._end)))
            elif number != numbers[-1]:
                unlearned += 1
            else:
                raise self._fault("the prompt that it renders for the last answer is not how it then shows that answer")
        return spans, unlearned

    def _pieces(self, rendered: str, breaker: str | None, *, learned: bool) -> Iterator[Piece]:
        # The pattern has one group, so that every second part is a special token.
        parts = self._special_re.split(rendered)
        number = 0
        while number < len(parts):
            part = parts[number]
            if number % 2 == 0:
                if part:
                    yield self._run(part, breaker, learned)
            elif slot := self._slots.get(part):
                # Whatever special token stands right behind the image tokens ends the image: <|vision_end|>.
                has_closing = not parts[number + 1] and number + 2 < len(parts)
                yield slot((self._special[parts[number + 2]],) if has_closing else ())
                number += 2 * has_closing
            else:
                yield Fixed((self._special[part],), learned)
            number += 1

    def _run(self, text: str, breaker: str | None, learned: bool) -> Fixed | Run:
        if breaker is not None:
            return Fixed(tuple(self.tokenise(text.replace(breaker, ""))), learned)
        strings = [int(part) if number % 2 else part for number, part in enumerate(HOLE.split(text)) if part]
        if all(isinstance(part, str) for part in strings):
            return Fixed(tuple(self.tokenise(text)), learned)
        return Run(tuple(strings), learned)

    def _turns(self, messages: Sequence[Message], show: Callable[[int, str], str]) -> list[dict[str, Any]]:
        number = -1
        turns: list[dict[str, Any]] = []
        for message in messages:
            content: list[dict[str, str]] = []
            for part in message.parts:
                if isinstance(part, Text):
                    number += 1
                    content.append({"type": "text", "text": show(number, part.text) if part.text else ""})
                else:
                    content.append({"type": "image" if isinstance(part, ImageMark) else "video"})
            turns.append({"role": message.role, "content": content})
        return turns

    def _render(self, turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as cause:
            raise self._fault(f"it does not take these turns: {cause}") from cause

    def _fault(self, what: str, code: RowCode = "template_refused") -> RowError:
        name = getattr(self._tokenizer, "name_or_path", "") or "this checkpoint"
        return RowError("", code, f"the chat template of {name} cannot be used for this row: {what}.")


def _merged(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The same pieces, neighbours of fixed ids joined."""
    ids: list[int] = []
    learned = False
    for piece in (*pieces, None):
        if ids and (not isinstance(piece, Fixed) or piece.learned != learned):
            yield Fixed(tuple(ids), learned)
            ids = []
        if isinstance(piece, Fixed):
            ids += piece.ids
            learned = piece.learned
        elif piece is not None:
            yield piece
