"""Fetching a URL that a stranger wrote, without being turned against our own network.

One parser reads the URL; a name is resolved once, every answer must be a public address, and the address
that was checked is the one that is dialled: check and connection cannot come apart. Each redirect goes
through all of it again. TLS still verifies the name.

What is asked for by many at once is fetched once, and kept for a minute, unless its server says otherwise.
"""

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import httpcore
import httpx

from basalt.caching import ByteLRU
from basalt.flights import SingleFlight
from services.gateway import telemetry

MAX_URL_LENGTH = 8192
MAX_REDIRECTS = 3
MAX_CONNECTIONS = 64
MAX_ADDRESSES = 4  # of one name, tried in turn
PORTS = (80, 443, 8080, 8443)
REDIRECTS = (301, 302, 303, 307, 308)
FRESH_SECONDS = 60.0  # that a body is kept for at most

HEADERS = [(b"Accept", b"image/*"), (b"Accept-Encoding", b"identity"), (b"User-Agent", b"basalt")]

Resolver = Callable[[str, int], Awaitable[list[str]]]  # host, port → addresses


class FetchError(Exception):
    """The URL was not fetched. The message is for the client: it tells nothing of what the other server said."""


class TooLarge(FetchError):
    """There is more than the byte cap."""


@dataclass(frozen=True)
class Fetched:
    body: bytes
    fresh_seconds: float  # that it may be given to others for


class CachedFetcher:
    """`Fetcher`, asked once for what many ask for at a time, and not again for as long as the answer is fresh."""

    def __init__(self, fetcher: "Fetcher", cache_bytes: int) -> None:
        self._fetcher = fetcher
        self._bodies: ByteLRU[str, tuple[bytes, float]] = ByteLRU(cache_bytes)  # and until when
        self._fetching: SingleFlight[str, Fetched] = SingleFlight()

    async def close(self) -> None:
        await self._fetcher.close()

    def cached(self, url: str) -> bytes | None:
        """The body, where it need not be fetched."""
        body, until = self._bodies.get(url) or (None, 0.0)
        if body is None or time.monotonic() >= until:
            return None
        telemetry.FETCHES.labels("cached").inc()
        return body

    async def get(self, url: str) -> bytes:
        """See `Fetcher.get`."""
        telemetry.FETCHES.labels("shared" if url in self._fetching else "fetched").inc()
        try:
            fetched = await self._fetching.run(url, lambda: self._fetch(url))
        except FetchError:
            telemetry.FETCHES.labels("refused").inc()
            raise
        return fetched.body

    async def _fetch(self, url: str) -> Fetched:
        fetched = await self._fetcher.get(url)
        if fetched.fresh_seconds:
            self._bodies.put(url, (fetched.body, time.monotonic() + fetched.fresh_seconds), len(fetched.body))
        return fetched


class Fetcher:
    """GETs public http(s) URLs. Open for as long as the process runs; `close` at the end.

    Args:
        max_bytes: of one body.
        connect_seconds: for one connection.
        total_seconds: for one URL, redirects included.
        max_per_host: requests to one host at a time; the others wait within their `total_seconds`.
        private_hosts: hosts, as written in URLs, that may have any address and port.
        allowed_hosts: where this names any, only they and their subdomains are fetched.
        resolve: the name service.
        dialler: what connects to an address that has been checked.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        connect_seconds: float,
        total_seconds: float,
        max_per_host: int = 8,
        private_hosts: frozenset[str] = frozenset(),
        allowed_hosts: frozenset[str] = frozenset(),
        resolve: Resolver | None = None,
        dialler: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds
        self._hosts = Places(max_per_host)
        self._allowed_hosts = allowed_hosts
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
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=0,
            network_backend=GuardedBackend(
                resolve or self._names,
                private_hosts,
                dialler or cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend()),
            ),
        )

    async def close(self) -> None:
        await self._pool.aclose()
        self._names.close()

    async def get(self, url: str) -> Fetched:
        """The body behind `url`.

        Raises:
            FetchError: why not.
            TooLarge: it has more than `max_bytes`.
        """
        target = self._check(url)
        try:
            async with asyncio.timeout(self._total_seconds):
                for _ in range(1 + MAX_REDIRECTS):
                    async with self._hosts.place(target.host):
                        answer = await self._get(target)
                    if isinstance(answer, Fetched):
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
        if port is not None and not 0 < port < 65536:
            raise FetchError("the URL is malformed: ports are 1 to 65535")
        name = parsed.raw_host.decode()
        if self._allowed_hosts and name not in self._private_hosts and not _is_under(name, self._allowed_hosts):
            raise FetchError(f"images of {host} are not fetched here: send the image itself, as a data: URL")
        if port is not None and port not in PORTS and name not in self._private_hosts:
            raise FetchError(f"port {port} is not allowed: use one of {', '.join(map(str, PORTS))}")
        return parsed

    async def _get(self, url: httpx.URL) -> Fetched | httpx.URL:
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
            body = await self._read(response, answered.get(b"content-length", b"0"))
            return Fetched(body, _fresh_seconds(answered))

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


class Places:
    """So many at a time by name; names nobody is at are forgotten."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: dict[str, tuple[asyncio.Semaphore, int]] = {}  # and how many are there or wait

    @asynccontextmanager
    async def place(self, name: str) -> AsyncIterator[None]:
        places, users = self._taken.get(name) or (asyncio.Semaphore(self._size), 0)
        self._taken[name] = places, users + 1
        try:
            async with places:
                yield
        finally:
            places, users = self._taken.pop(name)
            if users > 1:
                self._taken[name] = places, users - 1


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


def _is_under(host: str, domains: frozenset[str]) -> bool:
    labels = host.removesuffix(".").split(".")
    return any(".".join(labels[start:]) in domains for start in range(len(labels)))


_MAX_AGE = re.compile(rb"max-age=(\d{1,9})")


def _fresh_seconds(answered: dict[bytes, bytes]) -> float:
    """As far as the server lets it be kept for others."""
    control = answered.get(b"cache-control", b"").lower()
    if any(word in control for word in (b"no-store", b"no-cache", b"private")) or b"vary" in answered:
        return 0.0
    stated = _MAX_AGE.search(control)
    return min(FRESH_SECONDS, float(stated[1])) if stated else FRESH_SECONDS


def _join(url: httpx.URL, location: bytes) -> httpx.URL:
    try:
        return url.join(location.decode("ascii"))
    except (httpx.InvalidURL, ValueError):
        raise FetchError("the URL redirects to something that is no URL") from None
