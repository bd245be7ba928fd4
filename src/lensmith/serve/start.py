"""From a command line to a listening server: the address is taken before anything is loaded; only loopback goes unguarded."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lensmith.errors import ConfigError

TOKEN_VARIABLE = "LENSMITH_TOKEN"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
MAX_CONNECTIONS = 32
"""At once; each may hold one upload in memory."""
LEAVE_S = 3
"""Given to answers under way when the server is stopped."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a server did in its life."""

    url: str
    models: tuple[str, ...]
    answered: int

    def to_json(self) -> dict[str, Any]:
        return {"url": self.url, "models": list(self.models), "answered": self.answered}


def bind_address(host: str, port: int, token: str | None) -> socket.socket:
    """A socket bound to the address; 0 is any free port.

    Raises:
        ConfigError: the address is not this machine's or is taken, or others could reach it and there is no token.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as cause:
        raise ConfigError(
            f"--host {host}: no address of that name ({cause.strerror}). Use --host 127.0.0.1."
        ) from cause
    if not token and not is_loopback(str(address[0])):
        raise ConfigError(
            f"--host {host}: others can reach this address, and there is no token that they would have to send. "
            f"Set {TOKEN_VARIABLE} (or --token) to a secret of your choice, or stay with --host 127.0.0.1."
        )
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
    except OSError as cause:
        opened.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened on ({cause.strerror}). Use another port: --port {port + 1}."
        ) from cause
    return opened


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def serve_subject(
    subject: str,
    *,
    host: str,
    port: int,
    token: str | None,
    max_upload_mib: float,
    max_waiting: int,
    say: Callable[[str], None],
) -> Served:
    """Load the subject and answer until Ctrl-C.

    Raises:
        ConfigError: see `bind_address`; or fastapi or uvicorn is not installed.
        LensmithError: the subject cannot be loaded.
    """
    try:
        import uvicorn

        from lensmith.serve.app import Limits, build_app
    except ModuleNotFoundError as cause:
        if cause.name not in ("fastapi", "uvicorn", "starlette"):
            raise
        raise ConfigError(
            f"lensmith serve needs fastapi and uvicorn, and {cause.name} is not installed; pip install 'lensmith[serve]'."
        ) from cause
    from lensmith.serve.subject import open_subject

    with bind_address(host, port, token) as opened:
        address, port = opened.getsockname()[:2]
        hosts = sorted({*LOOPBACK_NAMES, host.lower()}) if is_loopback(address) else None
        served = open_subject(subject, say=say)
        app = build_app(served, Limits(max_upload_mib, max_waiting), token=token or None, hosts=hosts)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(
            f"Serving {served.name}, {' and '.join(served.kinds)}, {'with' if token else 'without'} a token. Try it: {url}/"
        )
        say(f"For OpenAI clients: base_url={url}/v1. Stop with Ctrl-C.")
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=LEAVE_S,
        )
        try:
            uvicorn.Server(settings).run(sockets=[opened])
        except KeyboardInterrupt:  # uvicorn has shut down by then, and passes the signal on
            say("Stopped.")
    return Served(url, tuple(served.names), app.state.chat.answered)
