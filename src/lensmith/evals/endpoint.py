"""Answers from any OpenAI-compatible server, to the same rows and on the same pixels as ours.

Pictures are sent as PNG after our own resizing, never as they are on disk. A server resizes by limits of its own, four to
thirteen times as many pixels as data.image allows by default; the score would then be that of other pictures. What we have
resized has sides that Qwen3-VL's processor leaves alone, so a server of a Qwen3-VL sees, bit for bit, what training saw, as
long as its own limits are not narrower. Boxes are converted here, before and after, for the same reason.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from lensmith.data.boxes import convert_sample, restore_answer
from lensmith.data.encode import Encoder
from lensmith.data.images import MAX_ASPECT, open_image, resize_pictures
from lensmith.errors import ConfigError, EndpointError, readable
from lensmith.evals.predict import Progress
from lensmith.evals.results import Prediction, predict
from lensmith.types import ImageMark, ImageSize, Sample, Text

TRIES = 6
"""Of one request, while the server is busy or away: at most 31 s of waiting between them, unless it asks for more."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
TIMEOUT_S = 600.0
"""For one answer, waiting in the server's line included."""
BUSY = (408, 429, 500, 502, 503, 504)
"""Answers of HTTP that may be another one later."""
LONGEST_REPLY_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask, as what, and how many questions at once."""

    url: str
    """Its /v1, or the address alone, to which /v1 is then added."""
    model: str | None = None
    """None: the first that it lists."""
    token: str | None = None
    concurrency: int = 8


def answer_through_endpoint(
    endpoint: Endpoint,
    samples: Sequence[Sample],
    encoder: Encoder,
    *,
    max_new_tokens: int,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """The server's greedy answer to the last question of each sample; a final assistant turn is not shown to it.

    `Prediction.tokens` is what the server counts; vLLM counts the end mark, ours does not.

    Raises:
        ConfigError: the address is none.
        EndpointError: it cannot be reached, refuses, or does not answer as the OpenAI API does; or a row
            holds a video, which the API has no words for.
        RowError: a picture cannot be read.
    """
    for sample in samples:
        if sample.videos:
            raise EndpointError(
                f"{sample.where}: holds {len(sample.videos)} videos, and OpenAI's API has no words for them. "
                "Take such rows out of data.test, or evaluate without --endpoint."
            )
    sizes = [encoder.encode_prompt(sample).images for sample in samples]
    client = _Client(endpoint, say)
    model = endpoint.model or _first_model(client)
    done: dict[int, Prediction] = {}
    with ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="asking") as pool:
        asked = {
            pool.submit(_ask, client, model, sample, sizes[index], max_new_tokens): index
            for index, sample in enumerate(samples)
        }
        try:
            for future in as_completed(asked):
                done[asked[future]] = future.result()
                if progress is not None:
                    progress(len(done), len(samples))
        except BaseException:
            # The first failure ends the evaluation; the questions not yet asked would fail alike, each after its tries.
            pool.shutdown(wait=False, cancel_futures=True)
            client.closed = True
            raise
    return [done[index] for index in range(len(samples))]


def _first_model(client: _Client) -> str:
    # Asked once: who mistyped the address wants to know now.
    listed = client.call("models", None, "the list of models", tries=1)
    try:
        names = [str(entry["id"]) for entry in listed["data"]]
        name = names[0]
    except (TypeError, KeyError, IndexError) as cause:
        raise client.odd("the list of models", listed) from cause
    client.say(f"Asking {name!r} at {client.base}, the first of {', '.join(names)}; --endpoint-model names another.")
    return name


def _ask(client: _Client, model: str, sample: Sample, sizes: Sequence[ImageSize], max_new_tokens: int) -> Prediction:
    request = {
        "model": model,
        "messages": chat_messages(sample, sizes),
        "max_tokens": max_new_tokens,
        "temperature": 0,
    }
    reply = client.call("chat/completions", request, sample.where)
    try:
        choice = reply["choices"][0]
        text, stopped = choice["message"]["content"] or "", choice["finish_reason"] == "stop"
        tokens = int((reply.get("usage") or {}).get("completion_tokens") or 0)
    except (TypeError, KeyError, IndexError, AttributeError) as cause:
        raise client.odd(sample.where, reply) from cause
    answer = restore_answer(text, sample, sizes)
    return predict(sample, sizes, answer, tokens, stopped)


def chat_messages(sample: Sample, sizes: Sequence[ImageSize]) -> list[dict[str, Any]]:
    """The turns up to the last question as OpenAI's API writes them; `sizes` are those of `Encoded.images`."""
    spoken = convert_sample(sample, sizes, sample.boxes)
    turns = spoken.messages[:-1] if spoken.messages[-1].role == "assistant" else spoken.messages
    marks = iter(sizes)
    messages = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, Text):
                parts.append({"type": "text", "text": part.text})
            elif isinstance(part, ImageMark):
                parts.append({"type": "image_url", "image_url": {"url": picture_url(next(marks))}})
        only_text = len(parts) == 1 and parts[0]["type"] == "text"
        messages.append({"role": turn.role, "content": parts[0]["text"] if only_text else parts})
    return messages


def picture_url(size: ImageSize) -> str:
    """The picture as the model shall see it, as a data URL; PNG, because every lossy copy is another picture.

    A strip that resizing made longer than MAX_ASPECT : 1 would be refused by processors and goes as it is.
    """
    picture = open_image(size.ref)  # pyright: ignore[reportArgumentType]  (no moments: videos were refused)
    if max(size.seen_px) <= MAX_ASPECT * min(size.seen_px):
        resized = resize_pictures(np.array(picture)[None], size.seen_px)[0]
        picture = Image.fromarray(resized.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, and the token with it, wherever the redirect leads."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


class _Client:
    """Asks one server, again where it is busy; may be used by several threads."""

    def __init__(self, endpoint: Endpoint, say: Callable[[str], None]) -> None:
        self.say, self._has_waited = say, False
        parts = urlsplit(endpoint.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"--endpoint {endpoint.url}: not the address of a server. Write it as http://127.0.0.1:8000/v1."
            )
        self.base = endpoint.url.rstrip("/") if parts.path.strip("/") else f"{endpoint.url.rstrip('/')}/v1"
        self.closed = False
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if endpoint.token:
            self._headers["Authorization"] = f"Bearer {endpoint.token}"
        # A proxy of the environment cannot reach this machine's own loopback.
        proxies = [urllib.request.ProxyHandler({})] if _is_loopback(parts.hostname) else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def call(self, path: str, content: dict[str, Any] | None, where: str, *, tries: int = TRIES) -> Any:
        """The JSON object that the server answers with; None as content makes it a GET.

        Raises:
            EndpointError: after `tries`, or at once where asking again would not help.
        """
        body = None if content is None else json.dumps(content, ensure_ascii=False).encode()
        for tried in range(1, tries + 1):
            wait_s = min(FIRST_WAIT_S * 2 ** (tried - 1), LONGEST_WAIT_S)
            try:
                request = urllib.request.Request(f"{self.base}/{path}", body, self._headers)
                with self._opener.open(request, timeout=TIMEOUT_S) as reply:
                    return self._parse(reply.read(LONGEST_REPLY_BYTES), where)
            except urllib.error.HTTPError as cause:
                what, fault = f"{cause.code} {_message(cause)}", cause
                if cause.code not in BUSY:
                    raise self._refused(where, cause.code, what) from cause
                wait_s = _asked_wait_s(cause) or wait_s
            except (urllib.error.URLError, http.client.HTTPException, OSError) as cause:
                what, fault = str(getattr(cause, "reason", cause) or type(cause).__name__), cause
            if tried == tries or self.closed:
                raise EndpointError(
                    f"{where}: {self.base} did not answer in {tried} {'try' if tried == 1 else 'tries'}; at last: {what}. "
                    "Look whether the server runs and at this address; where it is busy, lower --endpoint-concurrency."
                ) from fault
            if not self._has_waited:
                self._has_waited = True
                self.say(f"{where}: {what}. Asking again in {wait_s:.0f} s; further waits are not told.")
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def odd(self, where: str, found: object) -> EndpointError:
        return EndpointError(
            f"{where}: {self.base} answered with {readable(json.dumps(found, ensure_ascii=False)[:200])}, which is not how "
            "OpenAI's API answers. Give the address of its /v1."
        )

    def _parse(self, body: bytes, where: str) -> Any:
        try:
            return json.loads(body)
        except ValueError as cause:
            raise self.odd(where, body[:200].decode(errors="replace")) from cause

    def _refused(self, where: str, status: int, what: str) -> EndpointError:
        ways = {
            401: "Give the token it was started with: LENSMITH_TOKEN, or --endpoint-token.",
            403: "Give a token that may ask: LENSMITH_TOKEN, or --endpoint-token.",
            404: "Look at the address and at --endpoint-model.",
        }
        redirected = "It redirects; give the address that it leads to." if 300 <= status < 400 else None
        way = redirected or ways.get(status, "Asking again would not help.")
        return EndpointError(f"{where}: {self.base} refused: {what}. {way}")


def _message(cause: urllib.error.HTTPError) -> str:
    """What the server says went wrong, in OpenAI's format or as it stands."""
    try:
        text = cause.read(LONGEST_REPLY_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(cause.reason)
    try:
        found = json.loads(text)
        said = found["error"]["message"] if isinstance(found["error"], dict) else found["error"]
    except (ValueError, TypeError, KeyError):
        said = text or cause.reason
    return readable(str(said).strip().rstrip("."))


def _asked_wait_s(cause: urllib.error.HTTPError) -> float | None:
    """What Retry-After asks for, in seconds; a date, its other form, is not read."""
    asked = cause.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT_S) if asked.isdigit() else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
