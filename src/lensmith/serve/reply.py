"""Answers as OpenAI's API writes them: whole, or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

from lensmith.serve.generate import Answer
from lensmith.serve.refusal import Refused


@dataclass
class Whole:
    """Collects nothing on the way and sends one JSON object at the end."""

    model: str
    """The name that the caller asked for."""
    scope: Any
    send: Any
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created_s: int = field(default_factory=lambda: int(time.time()))

    async def add(self, piece: str) -> None:
        """A whole answer is sent when it is whole."""

    async def end(self, answer: Answer) -> None:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": finish_reason(answer),
        }
        content = self._head("chat.completion") | {"choices": [choice], "usage": usage(answer)}
        await JSONResponse(content)(self.scope, _nothing, self.send)

    async def fail(self, refused: Refused) -> None:
        await refused.response()(self.scope, _nothing, self.send)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created_s, "model": self.model}


@dataclass
class Streamed(Whole):
    """Sends each piece at once. What fails before the first piece is an ordinary error, with its status."""

    wants_usage: bool = False
    _started: bool = False

    async def add(self, piece: str) -> None:
        await self._chunk({"content": piece})

    async def end(self, answer: Answer) -> None:
        await self._chunk({}, finish_reason(answer))
        if self.wants_usage:
            await self._event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage(answer)})
        await self._finish()

    async def fail(self, refused: Refused) -> None:
        if not self._started:
            await super().fail(refused)
            return
        await self._event(refused.to_json())
        await self._finish()

    async def _finish(self) -> None:
        await self._event("[DONE]")
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunk(self, delta: dict[str, str], reason: str | None = None) -> None:
        if not self._started:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
            self._started = True
            delta = {"role": "assistant", "content": "", **delta}
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        await self._event(self._head("chat.completion.chunk") | {"choices": [choice]})

    async def _event(self, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        await self.send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


def finish_reason(answer: Answer) -> str:
    return "stop" if answer.stopped else "length"


def usage(answer: Answer) -> dict[str, int]:
    """Tokens, those of the answer without its end mark."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
    }


async def _nothing() -> dict[str, Any]:
    """Stands for `receive` of responses, which read nothing."""
    return {"type": "http.disconnect"}
