"""What POST /v1/chat/completions takes, and how it becomes a sample.

A field that would change nothing here is refused by name: a caller who sets it expects something of it.
"""

from __future__ import annotations

import base64
import binascii
from hashlib import blake2b
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lensmith.data.headers import read_header
from lensmith.data.json_text import NotJson, parse_json
from lensmith.errors import RowError, readable
from lensmith.evals.predict import ASK_TOKENS
from lensmith.serve.generate import Sampling
from lensmith.serve.refusal import Refused
from lensmith.types import ImageMark, ImageRef, Message, Part, Sample, Text

MAX_NEW_TOKENS = 4096
"""Longest answer that may be asked for; it holds the one place there is for as long as it takes."""
MAX_PICTURES = 64
"""Per request, all turns together."""
MAX_PICTURE_PIXELS = 64_000_000
"""Of one picture as sent. The largest cameras of phones make 50 million; files of a few KiB can claim any number, and Pillow
refuses from 179 million only, which are 0.5 GiB of RGB."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")
"""Pillow reads forty more, some through programs of their own (EPS starts Ghostscript); no caller of an API sends them."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Address(Strict):
    url: str
    detail: Literal["auto"] = "auto"
    """A picture costs what it cost in training; low and high have no meaning here."""


class PicturePart(Strict):
    type: Literal["image_url"]
    image_url: Address


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Turn(Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Annotated[TextPart | PicturePart, Field(discriminator="type")]], BeforeValidator(_as_parts)]


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Strict):
    """The fields of OpenAI's chat completions that mean something here, and those whose neutral value clients send anyway."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    user: str | None = None
    """For the books of OpenAI's customers; nothing is kept here."""
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.max_completion_tokens or self.max_tokens or ASK_TOKENS,
            0.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.seed,
        )


def read_chat(body: bytes) -> tuple[ChatRequest, Sample]:
    """The request and the sample it asks about. Pictures are decoded from base64 and their headers read, no pixels.

    Raises:
        Refused: anything in it is not as it should be.
    """
    try:
        fields = parse_json(body.decode())
    except (NotJson, UnicodeDecodeError) as cause:
        raise Refused(400, "not_json", f"the request is not JSON ({cause}); send one JSON object.") from cause
    if not isinstance(fields, dict):
        raise Refused(400, "not_json", f"the request is a JSON {type(fields).__name__}; send one JSON object.")
    try:
        asked = ChatRequest.model_validate(fields)
    except ValidationError as cause:
        raise _explain(cause) from cause
    if asked.max_tokens and asked.max_completion_tokens and asked.max_tokens != asked.max_completion_tokens:
        raise Refused(
            400,
            "contradiction",
            f"max_tokens is {asked.max_tokens} and max_completion_tokens is {asked.max_completion_tokens}, and both mean "
            "the longest answer; send one of the two.",
            param="max_tokens",
        )
    return asked, _to_sample(asked)


def _explain(cause: ValidationError) -> Refused:
    """Its first fault as a sentence."""
    fault = cause.errors(include_url=False)[0]
    place = _place(fault["loc"])
    if fault["type"] == "extra_forbidden":
        inside, _, name = place.rpartition(".")
        where = f" in {inside}" if inside else ""
        known = f" This endpoint takes {', '.join(ChatRequest.model_fields)}." if not inside else ""
        sentence = f"unknown field {name!r}{where}; it would have no effect here, so leave it out.{known}"
        return Refused(400, "unknown_field", readable(sentence), param=place)
    if fault["type"] == "missing":
        return Refused(400, "missing_field", f"{place} is missing; add it.", param=place)
    scalar = isinstance(fault["input"], str | int | float | bool | None)
    given = f", and it is {fault['input']!r}" if scalar else ""
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    return Refused(400, "invalid_value", readable(f"{place}: {message}{given}."), param=place)


def _place(steps: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].image_url`; the tags that pydantic puts between are left out."""
    place = ""
    for number, step in enumerate(steps):
        is_tag = step in ("text", "image_url") and number and isinstance(steps[number - 1], int)
        if isinstance(step, int):
            place += f"[{step}]"
        elif not is_tag:
            place += f".{step}" if place else step
    return place


def _to_sample(asked: ChatRequest) -> Sample:
    pictures: list[ImageRef] = []
    messages = []
    for number, turn in enumerate(asked.messages):
        where = f"messages[{number}]"
        if turn.role == "system" and number:
            # Qwen3-VL's template drops a system turn anywhere else without a word.
            raise Refused(400, "invalid_value", f"{where} is a system turn; only the first can be one.", param=where)
        parts: list[Part] = []
        for index, part in enumerate(turn.content):
            if isinstance(part, PicturePart):
                place = f"{where}.content[{index}]"
                if turn.role != "user":
                    sentence = (
                        f"{place} is a picture in a turn by the {turn.role}; Qwen3-VL sees them in user turns only."
                    )
                    raise Refused(400, "invalid_value", sentence, param=place)
                parts.append(ImageMark(len(pictures)))
                pictures.append(_read_picture(part.image_url.url, place))
            elif part.text:
                parts.append(Text(part.text))
        if not parts:
            raise Refused(400, "invalid_value", f"{where} holds neither text nor a picture; leave it out.", param=where)
        messages.append(Message(turn.role, tuple(parts)))
    if messages[-1].role != "user":
        sentence = f"the last turn is by the {messages[-1].role}; it must be a user's, to be answered."
        raise Refused(400, "invalid_value", sentence, param="messages")
    if len(pictures) > MAX_PICTURES:
        sentence = f"{len(pictures)} pictures in one request, and {MAX_PICTURES} may be; send fewer."
        raise Refused(400, "too_many_pictures", sentence, param="messages")
    return Sample("the request", tuple(messages), tuple(pictures))


def _read_picture(url: str, place: str) -> ImageRef:
    start, _, encoded = url.partition(",")
    if not start.startswith("data:"):
        raise Refused(
            400,
            "url_not_allowed",
            f"{place}: {readable(url[:80])} is an address. This server fetches nothing on behalf of its callers, who could "
            "reach through it what they cannot reach themselves; send the picture itself, as data:image/png;base64,...",
            param=place,
        )
    if not start.endswith(";base64"):
        sentence = f"{place}: a data URL without ;base64; write it as data:image/png;base64,..."
        raise Refused(400, "invalid_value", sentence, param=place)
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as cause:
        sentence = f"{place}: the picture's base64 is broken ({cause}); encode it again."
        raise Refused(400, "unreadable_image", sentence, param=place) from cause
    ref = ImageRef(content, blake2b(content, digest_size=16).hexdigest())
    try:
        header = read_header(ref)
    except RowError as fault:
        raise Refused(400, fault.code, f"{place}: {fault}", param=place) from fault
    if header.format not in FORMATS:
        sentence = f"{place}: the picture is {header.format}; send one of {', '.join(FORMATS)}."
        raise Refused(400, "unreadable_image", sentence, param=place)
    if header.width * header.height > MAX_PICTURE_PIXELS:
        raise Refused(
            400,
            "too_many_pixels",
            f"{place}: the picture has {header.width:,} x {header.height:,} pixels, {header.width * header.height:,} in all, "
            f"and one may have {MAX_PICTURE_PIXELS:,}; reduce it. The model sees far fewer anyway.",
            param=place,
        )
    return ref
