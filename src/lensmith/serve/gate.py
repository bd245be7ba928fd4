"""Who may come in, asked before anything of a request is read: the Host on loopback, the token, and how much is sent."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request

from lensmith.serve.refusal import Refused

MIB = 2**20
OPEN_PATHS = ("/", "/health")
"""The page holds no secret and asks for the token itself; whether the server lives is nobody's secret."""
DRAINED = 4
"""Times the limit that is read of too large an upload, and thrown away: most clients read an answer only after they have sent
all, and would see a broken connection instead of the sentence."""


class Gate:
    """ASGI middleware in front of everything."""

    def __init__(self, app: Any, *, token: str | None, hosts: Collection[str] | None) -> None:
        """`hosts`: names by which a browser may have come here; None for any, which needs a token."""
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            try:
                self._check_host(headers.get("host", ""))
                if scope["path"] not in OPEN_PATHS:
                    self._check_token(headers.get("authorization", ""))
            except Refused as refused:
                await refused.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        """A page of another site can have its own name lead to 127.0.0.1 (DNS rebinding); then its name stands in Host."""
        if self.hosts is None or host_name(host) in self.hosts:
            return
        raise Refused(
            421,
            "wrong_host",
            f"the request is meant for {host[:80]!a}, and this server listens on loopback for {', '.join(self.hosts)} only. "
            "Use one of these names; to serve others, start it with --host and a token.",
        )

    def _check_token(self, authorization: str) -> None:
        if self.token is None:
            return
        scheme, _, given = authorization.partition(" ")
        # compare_digest takes as long for a token that is right but for its last letter as for one that is all wrong.
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode()):
            return
        what = "the token is wrong" if authorization else "this server asks for a token"
        raise Refused(
            401,
            "wrong_token",
            f"{what}; send the one it was started with, as `Authorization: Bearer ...`.",
            headers={"WWW-Authenticate": "Bearer"},
        )


def host_name(host: str) -> str:
    """The name in a Host header, without its port and in lower case; empty where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


async def read_body(request: Request, max_upload_mib: float) -> bytes:
    """What was sent, never more than the limit in memory.

    Raises:
        Refused: it is over the limit, or not said to be JSON. (Another site's page can send any other type without asking
            first; JSON makes the browser ask, and it is told no.)
        starlette.requests.ClientDisconnect: the caller has gone.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "not_json", "the request is not said to be JSON; send `Content-Type: application/json`.")
    limit = int(max_upload_mib * MIB)
    declared = request.headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared) > limit
    if too_large and "expect" in request.headers:  # such a client waits for leave before it sends
        raise _too_large(limit, int(declared))
    read, body = 0, bytearray()
    async for piece in request.stream():
        read += len(piece)
        too_large = too_large or read > limit
        if too_large:
            body.clear()
        else:
            body += piece
        if read > DRAINED * limit:
            break
    if too_large:
        raise _too_large(limit, max(read, int(declared or 0)))
    return bytes(body)


def _too_large(limit: int, sent: int) -> Refused:
    return Refused(
        413,
        "too_large",
        f"the request is {sent / MIB:,.1f} MiB or more, and {limit / MIB:,.1f} MiB may be sent. Reduce the pictures, or start "
        "the server with a larger --max-upload-mib.",
    )
