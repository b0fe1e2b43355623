"""Fetching strangers' URLs: what is fetched, and above all what is not."""

import asyncio
import datetime
import ssl
import time
from pathlib import Path
from typing import Any

import httpcore
import pytest

from services.gateway.fetch import (
    MAX_REDIRECTS,
    CachedFetcher,
    Fetcher,
    FetchError,
    GuardedBackend,
    TooLarge,
    is_public,
)
from tests.gateway.web import Web, answer, redirect, web

LOCAL = frozenset({"127.0.0.1"})
PUBLIC = "93.184.216.34"


def fetcher(*, private_hosts: frozenset[str] = LOCAL, seconds: float = 60, **options: Any) -> Fetcher:
    return Fetcher(
        max_bytes=1000, connect_seconds=seconds / 2, total_seconds=seconds, private_hosts=private_hosts, **options
    )


async def fetch(url: str, **options) -> bytes:
    opened = fetcher(**options)
    try:
        return (await opened.get(url)).body
    finally:
        await opened.close()


async def refusal(url: str, **options) -> str:
    with pytest.raises(FetchError) as caught:
        await fetch(url, **options)
    return str(caught.value)


async def test_gives_the_body_and_asks_for_it_plainly():
    async with web(answer(b"picture")) as server:
        assert await fetch(server.url("/a%20b?c=d&e")) == b"picture"
    head = server.heads[0].lower()
    assert head.startswith("get /a%20b?c=d&e http/1.1")
    assert f"host: 127.0.0.1:{server.port}" in head
    assert "accept-encoding: identity" in head
    assert "cookie" not in head
    assert "authorization" not in head


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    async with web(answer(b"picture")) as server:
        assert await fetch(server.url()) == b"picture"


PRIVATE_ADDRESSES = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.100.100.200",
    "192.0.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "100::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", [*PRIVATE_ADDRESSES, "", "example.com", "127.1"])
def test_not_public(address: str):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", PUBLIC, "2606:2800:220:1:248:1893:25c8:1946", "2a00:1450:4001:80b::200e"]
)
def test_public(address: str):
    assert is_public(address)


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES)
async def test_a_name_that_answers_with_a_private_address(address: str):
    async def resolve(host: str, port: int) -> list[str]:
        return [PUBLIC, address]

    assert "public" in await refusal("http://images.test/a.png", resolve=resolve, private_hosts=frozenset())


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "017700000001",
        "0177.0.0.1",
        "0x7f000001",
        "0x7f.0.0.0x1",
        "127.0.0.1.",
        "0",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[fe80::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "169.254.169.254",
        "[fd00:ec2::254]",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "%31%32%37.0.0.1",
        "127.0.0.1%2f.example.com",
        "127.0.0.1%00.example.com",
        "xn--",
        "a" * 64 + ".com",
        "a..b",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_hosts_that_mean_this_machine_or_nothing(scheme: str, host: str):
    said = await refusal(f"{scheme}://{host}/x", private_hosts=frozenset())
    assert "public" in said or "malformed" in said or "no host" in said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "begin with https"),
        ("ftp://127.0.0.1/a", "begin with https"),
        ("gopher://127.0.0.1:6379/_a", "begin with https"),
        ("javascript:alert(1)", "begin with https"),
        ("s3://bucket/key", "begin with https"),
        ("//127.0.0.1/a", "begin with https"),
        ("/etc/passwd", "begin with https"),
        ("picture.png", "begin with https"),
        ("http:127.0.0.1", "no host"),
        ("http:///a", "no host"),
        ("http://", "no host"),
        ("http://user@127.0.0.1/", "user name"),
        ("http://user:password@127.0.0.1/", "user name"),
        ("http://example.com@127.0.0.1/", "user name"),
        ("http://127.0.0.1\\@example.com/", "backslash"),
        ("http://example.com\\.127.0.0.1/", "backslash"),
        ("http://127.0.0.1 /", "space"),
        (" http://127.0.0.1/", "space"),
        ("http://127.0.0.1/a\r\nHost: b", "control"),
        ("http://127.0.0.1/\x00", "control"),
        ("http://127.0.0.1:99999/", "malformed"),
        ("http://127.0.0.1:-1/", "malformed"),
        ("http://127.0.0.1:a/", "malformed"),
        ("http://[::1/", "malformed"),
        ("http://example.com:22/", "port 22"),
        ("http://example.com:6379/", "port 6379"),
        ("http://example.com:0/", "malformed"),
        ("http://127.0.0.1/" + "a" * 9000, "characters"),
    ],
)
async def test_urls_that_are_not_fetched(url: str, said: str):
    assert said in await refusal(url)


@pytest.mark.parametrize(
    "location",
    [
        "http://localhost:{port}/secret",
        "http://0.0.0.0:{port}/secret",
        "http://[::1]:8080/secret",
        "http://169.254.169.254/latest/meta-data/",
        "//10.0.0.1/secret",
        "http://2130706433/secret",
        "http://user@127.0.0.1:{port}/secret",
        "file:///etc/passwd",
        "ftp://127.0.0.1/secret",
        "http://example.com:25/secret",
        "http://[bad/",
        "data:image/png;base64,AAAA",
    ],
)
async def test_redirects_to_where_a_url_may_not_point(location: str):
    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        await redirect(location.format(port=server.port))(head, writer)

    async with web(handle) as server:
        await refusal(server.url("/first"))
    assert [head.split()[1] for head in server.heads] == ["/first"]


async def test_redirects_are_followed_so_far():
    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        left = int(head.split()[1].strip("/"))
        await (redirect(f"/{left - 1}") if left else answer(b"there"))(head, writer)

    async with web(handle) as server:
        assert await fetch(server.url(f"/{MAX_REDIRECTS}")) == b"there"
        assert "redirects more than" in await refusal(server.url(f"/{MAX_REDIRECTS + 1}"))


async def test_a_name_that_changes_its_answer_is_asked_once_and_the_checked_address_is_dialled():
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return [PUBLIC] if len(asked) == 1 else ["127.0.0.1"]

    class Dialler(httpcore.AsyncNetworkBackend):
        async def connect_tcp(self, host: str, *_: object) -> httpcore.AsyncNetworkStream:
            dialled.append(host)
            raise httpcore.ConnectError

    dialled: list[str] = []
    backend = GuardedBackend(resolve, frozenset(), Dialler())
    with pytest.raises(httpcore.ConnectError):
        await backend.connect_tcp("rebinding.test", 80)
    assert (asked, dialled) == (["rebinding.test"], [PUBLIC])
    with pytest.raises(FetchError, match="public"):
        await backend.connect_tcp("rebinding.test", 80)
    assert dialled == [PUBLIC]


async def test_each_hop_resolves_and_checks_anew():
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        await redirect("http://second.test:8080/")(head, writer)

    async with web(handle) as server:
        said = await refusal(server.url(host="first.test"), resolve=resolve, private_hosts=frozenset({"first.test"}))
    assert asked == ["first.test", "second.test"]
    assert "second.test is not on the public internet" in said
    assert len(server.heads) == 1


async def local(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


@pytest.mark.parametrize(
    ("host", "fetched"),
    [
        ("example.com", True),
        ("images.example.com", True),
        ("EXAMPLE.com", True),
        ("example.com.", True),
        ("badexample.com", False),
        ("example.com.evil.test", False),
        ("com", False),
        ("93.184.216.34", False),
    ],
)
async def test_where_hosts_are_named_only_they_are_fetched(host: str, fetched: bool):
    class Dialler(httpcore.AsyncNetworkBackend):
        async def connect_tcp(self, host: str, *_: object) -> httpcore.AsyncNetworkStream:
            dialled.append(host)
            raise httpcore.ConnectError

    async def resolve(host: str, port: int) -> list[str]:
        return [PUBLIC]

    dialled: list[str] = []
    allowed = frozenset({"example.com"})
    said = await refusal(f"http://{host}/a", allowed_hosts=allowed, resolve=resolve, dialler=Dialler())
    assert dialled == ([PUBLIC] if fetched else [])
    assert ("not fetched here" in said) == (not fetched)


async def test_an_allow_list_holds_at_each_redirect():
    async with web(redirect("http://elsewhere.test:8080/")) as server:
        said = await refusal(server.url(), allowed_hosts=frozenset({"example.com"}), resolve=local)
    assert "images of elsewhere.test are not fetched here" in said and len(server.heads) == 1


def cached(size: int = 10_000, **options: Any) -> CachedFetcher:
    return CachedFetcher(fetcher(**options), size)


async def test_what_a_hundred_ask_for_at_once_is_fetched_once():
    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await answer(b"picture")(head, writer)

    opened = cached()
    async with web(handle) as server:
        bodies = await asyncio.gather(*(opened.get(server.url()) for _ in range(100)))
        assert bodies == [b"picture"] * 100
        assert opened.cached(server.url()) == b"picture"
        assert opened.cached(server.url("/other")) is None
        assert server.connections == 1
    await opened.close()


async def test_a_failure_is_everybodys_and_is_not_kept():
    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        await answer(b"", "404 Not Found")(head, writer)

    opened = cached()
    async with web(handle) as server:
        results = await asyncio.gather(*(opened.get(server.url()) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(result, FetchError) for result in results)
        with pytest.raises(FetchError):
            await opened.get(server.url())
        assert server.connections == 2
    await opened.close()


async def test_who_gives_up_does_not_take_the_others_along():
    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await answer(b"picture")(head, writer)

    opened = cached()
    async with web(handle) as server:
        first, second = (asyncio.create_task(opened.get(server.url())) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        assert await second == b"picture"
        assert server.connections == 1
    await opened.close()


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        ({}, True),
        ({"Cache_Control": "public, max-age=3600"}, True),
        ({"Cache_Control": "no-store"}, False),
        ({"Cache_Control": "No-Cache"}, False),
        ({"Cache_Control": "private"}, False),
        ({"Cache_Control": "max-age=0"}, False),
        ({"Vary": "Cookie"}, False),
    ],
)
async def test_servers_say_what_may_be_kept(headers: dict[str, str], kept: bool):
    opened = cached()
    async with web(answer(b"picture", **headers)) as server:
        await opened.get(server.url())
        assert (opened.cached(server.url()) is not None) == kept
    await opened.close()


async def test_the_cache_has_a_bound():
    opened = cached(2500)
    async with web(answer(b"x" * 900)) as server:
        for number in range(5):
            await opened.get(server.url(f"/{number}"))
        there = [opened.cached(server.url(f"/{number}")) is not None for number in range(5)]
    assert there == [False, False, False, True, True]
    await opened.close()


async def test_one_host_takes_so_many_requests_at_a_time():
    now, most = 0, 0

    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.05)
        now -= 1
        await answer(b"picture")(head, writer)

    opened = fetcher(max_per_host=3)
    async with web(handle) as server:
        await asyncio.gather(*(opened.get(server.url(f"/{number}")) for number in range(12)))
    assert most == 3
    assert not opened._hosts._taken  # nothing is remembered of hosts
    await opened.close()


async def test_unknown_host():
    assert "no host" in await refusal("http://no-such-host.invalid/a.png")


async def test_refused_connection():
    async with web(answer(b"")) as server:
        pass
    assert "cannot be reached" in await refusal(server.url())


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", "500 Oops", "204 No Content", "304 Not Modified"])
async def test_what_the_other_server_says_is_not_passed_on(status: str):
    async with web(answer(b"internal secret", status)) as server:
        said = await refusal(server.url())
    assert "secret" not in said
    assert status[:3] not in said


async def test_redirect_without_a_location():
    async with web(answer(b"", "302 Found")) as server:
        assert "did not give the file" in await refusal(server.url())


async def test_stated_length_over_the_cap_is_not_read():
    async with web(answer(b"", Content_Length="99999999999")) as server:
        with pytest.raises(TooLarge):
            await fetch(server.url())


async def test_body_of_exactly_the_cap():
    async with web(answer(b"x" * 1000)) as server:
        assert len(await fetch(server.url())) == 1000


async def test_endless_body_is_cut():
    async def handle(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x" * 100)
            await writer.drain()
            await asyncio.sleep(0)

    async with web(handle) as server:
        with pytest.raises(TooLarge):
            await fetch(server.url())


async def test_slow_body_ends_at_the_total_deadline():
    async def handle(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with web(handle) as server:
        started = time.monotonic()
        assert "in time" in await refusal(server.url(), seconds=1)
        assert time.monotonic() - started < 30


async def test_silent_server_and_slow_names_end_too():
    async def handle(_: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    async with web(handle) as server:
        assert "in time" in await refusal(server.url(), seconds=0.5)
    assert "in time" in await refusal("http://slow.test/", resolve=resolve, seconds=0.5)


async def test_compressed_answer_is_refused():
    async with web(answer(b"zzzz", Content_Encoding="gzip")) as server:
        assert "compressed" in await refusal(server.url())


@pytest.mark.parametrize(
    "raw",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b"", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000],
    ids=["ssh", "nothing", "garbage", "endless head"],
)
async def test_what_is_no_http(raw: bytes):
    async def handle(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)

    async with web(handle) as server:
        assert "does not speak http" in await refusal(server.url())


async def test_truncated_body():
    async with web(answer(b"half", Content_Length="400")) as server:
        assert "cannot be reached" in await refusal(server.url())


def certificate(directory: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for `name`, and a server's context with it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = directory / "certificate.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return pem, context


async def test_https_dials_the_address_and_verifies_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("cryptography", reason="makes the certificate")
    pem, context = certificate(tmp_path, "images.test")
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)  # type: ignore[assignment]

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    def url(server: Web, host: str) -> str:
        return server.url("/a", host).replace("http:", "https:")

    both = frozenset({"images.test", "other.test"})
    async with web(answer(b"picture"), context) as server:
        assert "cannot be reached" in await refusal(url(server, "images.test"), resolve=resolve, private_hosts=both)
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        assert await fetch(url(server, "images.test"), resolve=resolve, private_hosts=both) == b"picture"
        assert "cannot be reached" in await refusal(url(server, "other.test"), resolve=resolve, private_hosts=both)
    assert names == ["images.test", "images.test", "other.test"]
    assert [head.split("\r\n")[1] for head in server.heads] == [f"Host: images.test:{server.port}"]


async def test_a_slow_host_does_not_hold_up_others():
    async def hang(_: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(600)

    opened = fetcher(private_hosts=frozenset({"127.0.0.1", "localhost"}))
    try:
        async with web(hang) as slow, web(answer(b"picture")) as quick:
            waiting = [asyncio.create_task(opened.get(slow.url(f"/{n}"))) for n in range(40)]
            while len(slow.heads) < 8:  # noqa: ASYNC110 (there is no event to wait for)
                await asyncio.sleep(0.01)
            assert (await asyncio.wait_for(opened.get(quick.url(host="localhost")), 20)).body == b"picture"
            assert len(slow.heads) == 8
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
    finally:
        await opened.close()
