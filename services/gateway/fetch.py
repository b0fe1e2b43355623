"""Fetching a URL that a stranger wrote, without being turned against our own network.

One parser reads the URL; a name is resolved once, every answer must be a public address, and the address
that was checked is the one that is dialled: check and connection cannot come apart. Each redirect goes
through all of it again. TLS still verifies the name.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast
from weakref import WeakValueDictionary

import httpcore
import httpx

MAX_URL_LENGTH = 8192
MAX_REDIRECTS = 3
MAX_ADDRESSES = 4  # of one name, tried in turn
PORTS = (80, 443, 8080, 8443)
PER_HOST = 8  # fetches from one host at a time: a slow one must not hold up those from others
REDIRECTS = (301, 302, 303, 307, 308)

HEADERS = [(b"Accept", b"image/*"), (b"Accept-Encoding", b"identity"), (b"User-Agent", b"basalt")]

Resolver = Callable[[str, int], Awaitable[list[str]]]  # host, port → addresses


class FetchError(Exception):
    """The URL was not fetched. The message is for the client: it tells nothing of what the other server said."""


class TooLarge(FetchError):
    """There is more than the byte cap."""


class Fetcher:
    """GETs public http(s) URLs. Open for as long as the process runs; `close` at the end.

    Args:
        max_bytes: of one body.
        connect_seconds: for one connection.
        total_seconds: for one URL, redirects included.
        private_hosts: hosts, as written in URLs, that may have any address and port.
        allowed_hosts: where there are any, no others are fetched, but for their subdomains.
        resolve: the name service.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        connect_seconds: float,
        total_seconds: float,
        private_hosts: frozenset[str] = frozenset(),
        allowed_hosts: frozenset[str] = frozenset(),
        resolve: Resolver | None = None,
    ) -> None:
        self._allowed_hosts = allowed_hosts
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds
        self._private_hosts = private_hosts
        self._timeouts = {
            "connect": connect_seconds,
            "read": connect_seconds,
            "write": connect_seconds,
            "pool": total_seconds,
        }
        self._names = SystemResolver()
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=32,
            max_keepalive_connections=0,
            network_backend=GuardedBackend(
                resolve or self._names, private_hosts, cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())
            ),
        )

    async def close(self) -> None:
        await self._pool.aclose()
        self._names.close()

    async def get(self, url: str) -> bytes:
        """The body behind `url`.

        Raises:
            FetchError: why not.
            TooLarge: it has more than `max_bytes`.
        """
        target = self._check(url)
        try:
            async with asyncio.timeout(self._total_seconds):
                for _ in range(1 + MAX_REDIRECTS):
                    async with self._hosts.setdefault(target.host, asyncio.Semaphore(PER_HOST)):
                        answer = await self._get(target)
                    if isinstance(answer, bytes):
                        return answer
                    target = self._check(str(answer))
        except (TimeoutError, httpcore.TimeoutException):
            raise FetchError(f"{target.host} did not answer in time") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError):
            raise FetchError(f"{target.host} cannot be reached, or does not speak {target.scheme}") from None
        raise FetchError(f"the URL redirects more than {MAX_REDIRECTS} times")

    def _check(self, url: str) -> httpx.URL:
        """The one reading of the URL that everything after it uses."""
        if len(url) > MAX_URL_LENGTH:
            raise FetchError(f"the URL has more than {MAX_URL_LENGTH} characters")
        if any(character <= " " or character in "\\\x7f" for character in url):
            raise FetchError("the URL holds a space, a control character or a backslash: percent-encode it")
        try:
            parsed = httpx.URL(url)
            host, port = parsed.host, parsed.port  # decoding an international name may fail too
        except (httpx.InvalidURL, ValueError):
            raise FetchError("the URL is malformed") from None
        if parsed.scheme not in ("http", "https"):
            raise FetchError("the URL must begin with https://, http:// or data:")
        if parsed.userinfo:
            raise FetchError("the URL must not hold a user name or password")
        if not host:
            raise FetchError("the URL names no host")
        if self._allowed_hosts and not self._is_allowed(parsed.raw_host.decode()):
            raise FetchError(f"images of {host} are not fetched here: send the image itself, as a data: URL")
        if port is not None and not 0 < port < 65536:
            raise FetchError("the URL is malformed: ports are 1 to 65535")
        if port is not None and port not in PORTS and parsed.raw_host.decode() not in self._private_hosts:
            raise FetchError(f"port {port} is not allowed: use one of {', '.join(map(str, PORTS))}")
        return parsed

    def _is_allowed(self, host: str) -> bool:
        host = host.rstrip(".").lower()
        return any(host == allowed or host.endswith(f".{allowed}") for allowed in self._allowed_hosts)

    async def _get(self, url: httpx.URL) -> bytes | httpx.URL:
        """One hop: the body, or where it redirects to."""
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        headers = [(b"Host", url.netloc), *HEADERS]
        async with self._pool.stream(
            "GET", target, headers=headers, extensions={"timeout": self._timeouts}
        ) as response:
            answered = {name.lower(): value for name, value in response.headers}
            if response.status in REDIRECTS and b"location" in answered:
                return _join(url, answered[b"location"])
            if response.status != 200:
                raise FetchError(f"{url.host} did not give the file: the URL must be public and need no login")
            if answered.get(b"content-encoding", b"identity").lower() not in (b"identity", b""):
                raise FetchError(f"{url.host} sent the file compressed although it was asked not to")
            return await self._read(response, answered.get(b"content-length", b"0"))

    async def _read(self, response: httpcore.Response, stated_length: bytes) -> bytes:
        too_large = TooLarge(f"the file has more than {self._max_bytes:,} bytes")
        if stated_length.isdigit() and int(stated_length[:20]) > self._max_bytes:
            raise too_large
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) > self._max_bytes:
                raise too_large
        return bytes(body)


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves, checks and dials in one step."""

    def __init__(self, resolve: Resolver, private_hosts: frozenset[str], dialler: httpcore.AsyncNetworkBackend) -> None:
        self._resolve = resolve
        self._private_hosts = private_hosts
        self._dialler = dialler

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's interface)
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            raise FetchError(f"there is no host {host}") from None
        if host not in self._private_hosts and not all(is_public(address) for address in addresses):
            raise FetchError(f"{host} is not on the public internet: only public addresses are fetched")
        failure: Exception = httpcore.ConnectError("no address")
        for address in addresses[:MAX_ADDRESSES]:
            try:
                return await self._dialler.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SystemResolver:
    """getaddrinfo in threads of its own: names that hang must not hold up other work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(16, "resolve")

    async def __call__(self, host: str, port: int) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(address[0]) for *_, address in found]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
RELAY_ANYCAST = ipaddress.IPv4Network("192.88.99.0/24")


def is_public(address: str) -> bool:
    """Whether an address lies on the public internet, and leads nowhere else by being mapped or tunnelled."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved and parsed not in RELAY_ANYCAST
    # v4-mapped and NAT64 addresses lie outside 2000::/3; 6to4 and Teredo inside it.
    tunnelled = parsed.sixtofour is not None or parsed.teredo is not None
    return parsed in GLOBAL_UNICAST and parsed.is_global and not tunnelled and parsed.scope_id is None


def _join(url: httpx.URL, location: bytes) -> httpx.URL:
    try:
        return url.join(location.decode("ascii"))
    except (httpx.InvalidURL, ValueError):
        raise FetchError("the URL redirects to something that is no URL") from None
