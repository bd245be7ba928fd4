"""Pictures at http(s) addresses, downloaded once into a bounded cache; only with data.allow_urls.

A data file from elsewhere must not make this machine ask its own network for something. So a name is resolved here, every
address it resolves to is checked, and the connection goes to a checked address and not to the name, which could resolve
differently a moment later. A redirect is a new address and checked as one. Proxies of the environment are not used: the
check would then be about the proxy.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from io import BytesIO
from typing import BinaryIO
from urllib.parse import quote, urljoin, urlsplit

from lensmith.data.cache import open_cached
from lensmith.errors import RowError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

TIMEOUT_S = 30
MAX_BYTES = 64 * 2**20
"""A larger download is refused: it is hardly one picture."""
MAX_REDIRECTS = 5
PIECE_BYTES = 2**16
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones (RFC 6052)."""
PORTS = {"http": 80, "https": 443}
HEADERS = {"User-Agent": "lensmith", "Accept-Encoding": "identity"}
AS_WRITTEN = "/?%:@!$&'()*+,;=~-._[]"
"""Characters of a path and query that are sent as they are; others, such as blanks and umlauts, in percent signs."""
REDIRECTS = (301, 302, 303, 307, 308)


def is_public(address: Address) -> bool:
    """Whether the address belongs to the open internet; one that carries another inside is as public as that."""
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if inside is None and address in NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(inside)
    return address.is_global and not address.is_multicast


def fetch_image(
    url: str, *, may_reach: Callable[[Address], bool] = is_public, timeout_s: float = TIMEOUT_S
) -> BinaryIO:
    """The downloaded file. Every process and epoch after the first finds it on disk, until the cache needs its room.

    Args:
        may_reach: whether a connection to this address is allowed.
        timeout_s: for each request from start to end, however slowly the server drips.

    Raises:
        RowError: `private_address`; `missing_file` where the address does not answer; `unreadable_image` where it
            answers too much.
    """
    return open_cached(url, lambda: _download(url, may_reach, timeout_s))


def _download(url: str, may_reach: Callable[[Address], bool], timeout_s: float) -> BytesIO:
    address = url
    for _ in range(MAX_REDIRECTS + 1):
        try:
            with (
                closing(_connect(url, address, may_reach, timeout_s)) as connection,
                _ended_after(timeout_s, connection),
            ):
                found = _ask(url, address, connection)
        except (OSError, ValueError, http.client.HTTPException) as cause:
            raise _unreachable(url, cause) from cause
        if isinstance(found, BytesIO):
            return found
        address = found
    raise _unreachable(url, f"more than {MAX_REDIRECTS} redirects")


def _ask(url: str, address: str, connection: http.client.HTTPConnection) -> BytesIO | str:
    """What lies at the address, or the address that it redirects to."""
    target = urlsplit(address)
    path = f"{target.path or '/'}{f'?{target.query}' if target.query else ''}"
    connection.request("GET", quote(path, safe=AS_WRITTEN), headers=HEADERS)
    answer = connection.getresponse()
    if answer.status in REDIRECTS and (location := answer.getheader("Location")):
        return urljoin(address, location)
    if answer.status != http.HTTPStatus.OK:
        raise _unreachable(url, f"HTTP {answer.status} {answer.reason}")
    content = BytesIO()
    while piece := answer.read1(PIECE_BYTES):
        content.write(piece)
        if content.tell() > MAX_BYTES:
            raise RowError(url, "unreadable_image", f"is over {MAX_BYTES // 2**20} MiB; download it and name the file.")
    if answer.length:
        raise OSError(f"cut off, {answer.length:,} bytes before the end")
    content.seek(0)
    return content


@contextmanager
def _ended_after(timeout_s: float, connection: http.client.HTTPConnection) -> Iterator[None]:
    """Shuts the connection down when its time is over: a time limit per read would let a server drip for ever."""
    open_socket = connection.sock
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        with suppress(OSError):  # already closed
            open_socket.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, end)
    timer.start()
    try:
        yield
        if is_over.is_set():
            raise TimeoutError(f"not done after {timeout_s:g} s")
    finally:
        timer.cancel()


def _connect(
    url: str, address: str, may_reach: Callable[[Address], bool], timeout_s: float
) -> http.client.HTTPConnection:
    """A connection to a checked address of the host. Raises RowError, OSError or ValueError."""
    target = urlsplit(address)
    if target.scheme not in PORTS or not target.hostname:
        raise ValueError(f"it leads to {address[:80]!a}, which is no http(s) address")
    port = target.port or PORTS[target.scheme]
    found = socket.getaddrinfo(target.hostname, port, type=socket.SOCK_STREAM)
    places = [ipaddress.ip_address(str(place[4][0]).partition("%")[0]) for place in found]
    for place in places:
        if not may_reach(place):
            raise RowError(
                url,
                "private_address",
                f"{target.hostname} is {place}, inside a private network or this machine, where data.allow_urls does not "
                "reach; copy the picture into data.image_root and name the file.",
            )
    connection = http.client.HTTPConnection(target.hostname, port, timeout=timeout_s)
    connection.default_port = PORTS[target.scheme]  # which the Host header leaves out
    connection.sock = socket.create_connection((str(places[0]), port), timeout=timeout_s)
    if target.scheme == "https":
        connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=target.hostname)
    return connection


def _unreachable(url: str, reason: object) -> RowError:
    return RowError(url, "missing_file", f"cannot be fetched ({reason}); download it and name the file.")
