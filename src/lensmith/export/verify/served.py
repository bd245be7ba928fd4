"""What a server of the merged model answers: vLLM, llama.cpp's llama-server, Ollama, or anything else that speaks OpenAI.

A server's own processor reads the pictures, and its own kernels compute; so its answers are compared, not its logits, and a
few may differ. A server that has the base behind the right name gives the base's answers.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lensmith.data.boxes import restore_answer
from lensmith.data.encode import Encoder
from lensmith.errors import ConfigError, RunError
from lensmith.export.verify.inputs import as_user
from lensmith.types import Sample

LEAST_SAME = 0.75
"""Share of answers that have to be the same: rounding turns a few answers in eight, another model turns most."""
TIMEOUT_S = 120.0
ENGINES = {"vllm": "vLLM", "llama_cpp": "llama.cpp"}
"""Modules that would serve the model, by name."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server's answers, judged."""

    ok: bool
    told: str
    fix: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that answered once."""

    url: str
    """Up to and with its /v1."""
    model: str
    """The name under which it serves."""

    def ask(self, samples: Sequence[Sample], encoder: Encoder, *, max_new_tokens: int) -> list[str]:
        """Its greedy answers, boxes as the data writes them.

        Raises:
            RunError: it does not answer, or not as OpenAI's API does.
        """
        answers = []
        for sample in samples:
            encoded = encoder.encode_prompt(sample)
            turns = as_user(sample, encoded, opened=True)
            messages = [{**turn, "content": [_sent(part) for part in turn["content"]]} for turn in turns]
            given = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_new_tokens}
            reply = _call(f"{self.url}/chat/completions", given)
            try:
                text = reply["choices"][0]["message"]["content"]
            except (KeyError, IndexError, TypeError) as cause:
                raise RunError(
                    f"{self.url}: its reply has no choices[0].message.content: {str(reply)[:200]}"
                ) from cause
            answers.append(restore_answer(text or "", sample, encoded.images))
        return answers


def open_endpoint(url: str) -> Endpoint:
    """The server, asked for the name of what it serves.

    Raises:
        ConfigError: `url` is no http(s) address.
        RunError: nothing answers there.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--endpoint {url}: not an http or https address. Write it as http://localhost:8000/v1.")
    url = url.rstrip("/")
    listed = _call(f"{url}/models")
    try:
        return Endpoint(url, listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as cause:
        raise RunError(
            f"{url}: lists no model at /models: {str(listed)[:200]}. Does the address end with /v1?"
        ) from cause


def judge_served(endpoint: Endpoint, answers: Sequence[str], *, merged: Sequence[str], base: Sequence[str]) -> Served:
    """Hold answers against those of the merged model; where the base answers otherwise, they may not be the base's."""
    ours, merged, base = ([text.strip() for text in texts] for texts in (answers, merged, base))
    telling = [index for index in range(len(merged)) if merged[index] != base[index]]
    same = sum(map(str.__eq__, ours, merged))
    like_merged = sum(ours[index] == merged[index] for index in telling)
    like_base = sum(ours[index] == base[index] for index in telling)
    ok = same >= LEAST_SAME * len(merged) and like_merged >= like_base
    fix = (
        f"{endpoint.url} ({endpoint.model}) gives {same} of the merged model's {len(merged)} answers, and where the base "
        f"answers otherwise {like_base} of {len(telling)} times the base's: it serves another model, or reads pictures or the "
        "chat template otherwise. Give the server the merged folder with its processor_config.json and chat_template.jinja."
    )
    told = f"{endpoint.url} gives {same} of {len(merged)} answers word for word"
    if not telling:
        told += ", which are the base's as well, so that which of the two it serves cannot be told"
    return Served(ok, told, "" if ok else fix)


def not_asked() -> str:
    """Why no server was compared."""
    found = [name for module, name in ENGINES.items() if importlib.util.find_spec(module) is not None]
    if found:
        return f"{' and '.join(found)}: not asked; serve the merged model and add --endpoint URL"
    return f"{' and '.join(ENGINES.values())}: not asked, not installed"


def _sent(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message as OpenAI's API has it; a picture as a PNG inside the request."""
    if part["type"] != "image":
        return part
    buffer = io.BytesIO()
    part["image"].save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _call(url: str, given: dict[str, Any] | None = None) -> Any:
    """The JSON answer of a GET, or of a POST of `given`. Raises RunError."""
    data = None if given is None else json.dumps(given).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=TIMEOUT_S) as reply:
            return json.loads(reply.read())
    except HTTPError as cause:
        said = cause.read().decode(errors="replace")[:200]
        raise RunError(f"{url}: answers {cause.code} {cause.reason}: {said}") from cause
    except (URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as cause:
        raise RunError(f"{url}: no answer ({cause}). Start the server, or leave --endpoint out.") from cause
