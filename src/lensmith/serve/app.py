"""The endpoint: what is at which path, and how a question goes through.

body ──> request ──> sample ──> a place in the line ──> pieces of text ──> reply
bounded  strict      headers    429 beyond it           one thread         whole or streamed
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import ClientDisconnect

from lensmith.errors import LensmithError, ModelError, RowError
from lensmith.serve.gate import Gate, read_body
from lensmith.serve.generate import Answer
from lensmith.serve.line import Line, while_connected
from lensmith.serve.page import page_headers, render_page
from lensmith.serve.refusal import Refused
from lensmith.serve.reply import Streamed, Whole
from lensmith.serve.schema import ChatRequest, read_chat
from lensmith.serve.subject import Subject
from lensmith.types import Sample


@dataclass(frozen=True, slots=True)
class Limits:
    """What callers may use."""

    max_upload_mib: float = 20
    """2**20 bytes of one request, pictures and all."""
    max_waiting: int = 8
    """Questions that wait while one is answered."""


def build_app(subject: Subject, limits: Limits, *, token: str | None, hosts: Collection[str] | None) -> FastAPI:
    """The application; `token` and `hosts` as for Gate."""
    # FastAPI's own documentation pages load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    chat = Chat(subject, limits)
    page = render_page(subject)
    created_s = int(time.time())

    async def show_page(_: Request) -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers(page))

    async def list_models(_: Request) -> JSONResponse:
        own = {"object": "model", "created": created_s, "owned_by": "lensmith"}
        return JSONResponse({"object": "list", "data": [{"id": name, **own} for name in subject.names]})

    async def tell_health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "inside": chat.line.inside})

    async def refuse(_: Request, error: Any) -> JSONResponse:
        known = "GET /, GET /health, GET /v1/models and POST /v1/chat/completions"
        return Refused(error.status_code, "not_found", f"there is no such place here; there are {known}.").response()

    app.add_route("/", show_page, methods=["GET"])
    app.add_route("/health", tell_health, methods=["GET"])
    app.add_route("/v1/models", list_models, methods=["GET"])
    app.add_route("/v1/chat/completions", chat, methods=["POST"])  # pyright: ignore[reportArgumentType]  (an ASGI app)
    for status in (404, 405):
        app.add_exception_handler(status, refuse)
    app.add_middleware(Gate, token=token, hosts=hosts)
    app.state.chat = chat
    return app


class Chat:
    """POST /v1/chat/completions, as an ASGI application: it must hear a caller leave at any moment."""

    def __init__(self, subject: Subject, limits: Limits) -> None:
        self.subject, self.limits, self.line = subject, limits, Line(limits.max_waiting)
        self.answered = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            body = await read_body(Request(scope, receive), self.limits.max_upload_mib)
            asked, sample = await asyncio.to_thread(read_chat, body)
            reply = self._reply(asked, scope, send)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 (as in _answer)
            await explain(error).response()(scope, receive, send)
        else:
            await while_connected(receive, self._answer(asked, sample, reply))

    def _reply(self, asked: ChatRequest, scope: Any, send: Any) -> Whole:
        try:
            name = asked.model or self.subject.find(None)
            self.subject.find(name)
        except ModelError as cause:
            raise Refused(404, "model_not_found", str(cause), param="model") from cause
        if not asked.stream:
            return Whole(name, scope, send)
        return Streamed(
            name, scope, send, wants_usage=bool(asked.stream_options and asked.stream_options.include_usage)
        )

    async def _answer(self, asked: ChatRequest, sample: Sample, reply: Whole) -> None:
        work = partial(self.subject.answer, self.subject.find(reply.model), sample, asked.sampling)
        try:
            with self.line.place():
                async with aclosing(self.line.pieces(work)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Answer):
                            self.answered += 1
                            await reply.end(piece)
                        else:
                            await reply.add(piece)
        except Exception as error:  # noqa: BLE001 (whatever goes wrong becomes a reply; bugs are shown on stderr)
            await reply.fail(explain(error))


def explain(error: Exception) -> Refused:
    """Whatever ended an answer, as what the caller is told; a bug is shown on stderr with its traceback."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, RowError):
        return Refused(400, error.code, str(error), param="messages")
    if isinstance(error, LensmithError):
        return Refused(400, "not_possible", str(error), param="messages")
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        sentence = f"GPU memory ran out: {str(error).splitlines()[0]} Send fewer pictures, or lower max_tokens."
        return Refused(503, "out_of_memory", sentence)
    traceback.print_exception(error, file=sys.stderr)
    # Not what the error says: it may hold what is none of the caller's business.
    sentence = (
        f"a bug in Lensmith ({type(error).__name__}); what the server prints has the traceback, please report it."
    )
    return Refused(500, "bug", sentence)
