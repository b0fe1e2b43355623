"""Strangers' images: what is taken, and everything that is refused with nothing connected that must not be."""

import asyncio
import base64
import io
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpcore
import pytest
import pytest_asyncio
from PIL import Image

from basalt.api_errors import APIError
from basalt.assistants import sha256
from basalt.auth import Caller
from basalt.data.images import ImageError
from basalt.object_store import DirectoryStore, image_key
from services.gateway.decoding import Decoders
from services.gateway.fetch import CachedFetcher, Fetcher
from services.gateway.images import ImageIntake
from services.gateway.limits import Buckets, Limits
from services.gateway.settings import Settings
from tests.gateway.test_fetch import PRIVATE_ADDRESSES, PUBLIC
from tests.gateway.web import Handler, Web, answer, redirect, web
from tests.tiny import picture

MAX_BYTES, MAX_PIXELS = 50_000, 1_000_000
ANYBODY = Caller("key-1")


class Dialler(httpcore.AsyncNetworkBackend):
    """Dials for real, and tells what it dialled."""

    def __init__(self) -> None:
        self.dialled: list[tuple[str, int]] = []
        self._real = httpcore.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, *rest: Any) -> httpcore.AsyncNetworkStream:
        self.dialled.append((host, port))
        return await self._real.connect_tcp(host, port, *rest)


NAMES = {f"private-{number}.test": [address] for number, address in enumerate(PRIVATE_ADDRESSES)} | {
    "web.test": ["127.0.0.1"],
    "one-is-private.test": [PUBLIC, "10.0.0.1"],
    "nowhere.test": [],
}


async def resolve(host: str, port: int) -> list[str]:
    """Names of the tests by the table; addresses as the system reads them."""
    if host in NAMES:
        return NAMES[host]
    found = await asyncio.get_running_loop().getaddrinfo(host, port)
    return [str(address[0]) for *_, address in found]


@dataclass
class Intake:
    take: Callable[..., Any]
    dialler: Dialler
    store: DirectoryStore


@pytest_asyncio.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Callable[..., Intake]]:
    running: list[ImageIntake] = []

    def start(*, memory: int = 1 << 30, seconds: float = 30, pixels: int = MAX_PIXELS, **limits: int) -> Intake:
        dialler, store = Dialler(), DirectoryStore(tmp_path)
        fetcher = Fetcher(
            max_bytes=MAX_BYTES,
            connect_seconds=2,
            total_seconds=4,
            private_hosts=frozenset({"web.test"}),
            resolve=resolve,
            dialler=dialler,
        )
        intake = ImageIntake(
            CachedFetcher(fetcher, 1_000_000),
            Decoders(1, memory, seconds),
            Limits(limits, Buckets(None)),
            store,
            Settings(max_image_bytes=MAX_BYTES, max_pixels=pixels),
        )
        running.append(intake)
        return Intake(intake.take, dialler, store)

    yield start
    for intake in running:
        await intake.close()


@pytest.fixture
def intake(opened: Callable[..., Intake]) -> Intake:
    return opened()


def data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = b"\0" * 1000, depth: int = 8) -> bytes:
    """A PNG that says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in every)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def bmp(width: int, height: int, bits: int = 24) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, width, height, 1, bits, 0, 100, 1, 1, 0, 0)
        + b"\0" * 100
    )


def tiff(*tags: tuple[int, int, int, int], following: int = 0) -> bytes:
    """(tag, type, count, value) in one directory at 8."""
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + struct.pack("<I", following)
    )


def jpeg_of(width: int, height: int) -> bytes:
    whole = encoded(Image.new("RGB", (16, 16)), "JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


def gif_of(width: int, height: int) -> bytes:
    whole = encoded(Image.new("P", (16, 16)), "GIF")
    return whole[:6] + struct.pack("<HH", width, height) + whole[10:]


PNG = picture(1)
WEB = "http://web.test:{port}"

Case = tuple[str, int, str, str]  # URL, with {port} of the web server; status, code, part of the message


def ssrf() -> dict[str, Case]:
    not_fetched = (400, "image_not_fetched")
    cases: dict[str, Case] = {}
    for name, (address,) in ((name, found) for name, found in NAMES.items() if name.startswith("private-")):
        cases[f"a name of {address}"] = (f"http://{name}/a.png", *not_fetched, "not on the public internet")
    for host in (
        *("127.0.0.1", "127.1", "127.0.1", "2130706433", "017700000001", "0x7f000001", "0x7f.0.0.0x1"),
        *("0", "localhost", "LOCALHOST", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
        *("[::127.0.0.1]", "[fe80::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254", "[fd00:ec2::254]"),
        *("10.0.0.1", "192.168.0.1", "172.16.0.1", "100.100.100.200", "127。0。0。1", "one-is-private.test"),
    ):
        cases[f"host {host}"] = (f"http://{host}/latest/meta-data/", *not_fetched, "not on the public internet")
    for url, said in {
        "file:///etc/passwd": "begin with https",
        "FILE:///etc/passwd": "begin with https",
        "ftp://127.0.0.1/a": "begin with https",
        "gopher://127.0.0.1:6379/_SLAVEOF": "begin with https",
        "dict://127.0.0.1:11211/stats": "begin with https",
        "jar:http://127.0.0.1!/a": "begin with https",
        "ldap://127.0.0.1/": "begin with https",
        "javascript:alert(1)": "begin with https",
        "s3://basalt/images/sha256/" + "a" * 64: "begin with https",
        "images/sha256/" + "a" * 64: "begin with https",
        "sha256:" + "a" * 64: "begin with https",
        "file-abc123": "begin with https",
        "//127.0.0.1/a": "begin with https",
        "/etc/passwd": "begin with https",
        "http://": "no host",
        "http:///a": "no host",
        "http:127.0.0.1": "no host",
        "http://user@example.com/": "user name",
        "http://user:secret@example.com/": "user name",
        "http://example.com:80@127.0.0.1/": "user name",
        "http://example.com\\@127.0.0.1/": "backslash",
        "http://127.0.0.1 /": "space",
        "http://example.com/a\r\nHost: inner": "control",
        "http://example.com/\x00": "control",
        "http://example.com:99999/": "malformed",
        "http://example.com:-1/": "malformed",
        "http://[::1/": "malformed",
        "http://[fe80::1%25eth0]/": "",
        "http://example.com:22/": "port 22",
        "http://example.com:25/": "port 25",
        "http://example.com:6379/": "port 6379",
        "http://example.com:9000/": "port 9000",
        "http://127.0.0.1%2f.example.com/": "",
        "http://" + "a" * 64 + ".test/": "",
        "http://a..b/": "",
        "http://0177.0.0.1/": "",
        "http://127.0.0.1./": "",
        "http://localhost./": "",
        "http://①②⑦.⓪.⓪.①/": "",
        "http://example.com/" + "a" * 9000: "characters",
        "http://no-such-name.invalid/": "no host",
    }.items():
        cases[url[:60]] = (url, *not_fetched, said)
    return cases


def served() -> dict[str, tuple[Handler, Case]]:
    """What a web server may do: its handlers by path, and what is told."""

    async def endless(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x" * 10_000)
            await writer.drain()

    async def slow(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.1)

    async def around(head: str, writer: asyncio.StreamWriter) -> None:
        await redirect(head.split()[1])(head, writer)

    async def silent(_: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    def raw(said: bytes) -> Handler:
        async def handle(_: str, writer: asyncio.StreamWriter) -> None:
            writer.write(said)

        return handle

    not_fetched = (400, "image_not_fetched")
    invalid = (400, "invalid_image")
    too_large = (413, "image_too_large")
    handlers: dict[str, tuple[Handler, int, str, str]] = {
        "an endless body": (endless, *too_large, "50,000 bytes"),
        "a body that drips": (slow, *not_fetched, "in time"),
        "silence": (silent, *not_fetched, "in time"),
        "a length beyond the cap": (answer(b"", Content_Length="9999999999"), *too_large, "50,000 bytes"),
        "a length that is none": (answer(b"", Content_Length="-1"), *not_fetched, "does not speak"),
        "a compressed body": (answer(zlib.compress(PNG), Content_Encoding="deflate"), *not_fetched, "compressed"),
        "a bomb by gzip": (answer(b"\x1f\x8b" + b"\0" * 90, Content_Encoding="gzip"), *not_fetched, "compressed"),
        "not found": (answer(b"secret", "404 Not Found"), *not_fetched, "did not give the file"),
        "forbidden": (answer(b"secret", "403 Forbidden"), *not_fetched, "did not give the file"),
        "a server's error": (answer(b"secret", "500 Oops"), *not_fetched, "did not give the file"),
        "a part only": (answer(PNG[:50], "206 Partial Content"), *not_fetched, "did not give the file"),
        "HTML that says it is an image": (answer(b"<html>" * 9, Content_Type="image/png"), *invalid, "not a JPEG"),
        "an SVG": (answer(b"<svg/>", Content_Type="image/svg+xml"), *invalid, "not a JPEG"),
        "half an image": (answer(PNG[: len(PNG) // 2]), *invalid, "damaged"),
        "nothing": (answer(b""), *invalid, "empty"),
        "a bomb": (answer(png(50_000, 50_000)), *invalid, "pixels"),
        "another protocol": (raw(b"SSH-2.0-OpenSSH_9\r\n"), *not_fetched, "does not speak"),
        "an endless head": (raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40_000), *not_fetched, "does not speak"),
        "less than it said": (answer(b"half", Content_Length="400"), *not_fetched, "cannot be reached"),
        "a redirect without an end": (around, *not_fetched, "redirects more than"),
        "a redirect to nothing": (answer(b"", "302 Found"), *not_fetched, "did not give the file"),
    }
    for location in (
        *("http://127.0.0.1:8080/", "http://localhost/", "http://[::1]:8080/", "http://169.254.169.254/latest/"),
        *("//10.0.0.1/", "http://2130706433/", "http://private-3.test/", "https://192.168.0.1/", "http://0/"),
        *("file:///etc/passwd", "gopher://127.0.0.1:6379/_a", "data:image/png;base64,AAAA", "ftp://example.com/a"),
        *("http://user@web.test/", "http://example.com:22/", "http://[bad/", "http://one-is-private.test/"),
    ):
        handlers[f"a redirect to {location}"] = (redirect(location), *not_fetched, "")
    return {
        name: (handler, (f"{WEB}/{number}", status, code, said))
        for number, (name, (handler, status, code, said)) in enumerate(handlers.items())
    }


def media() -> dict[str, Case]:
    invalid = (400, "invalid_image")
    bad_url = (400, "invalid_data_url")
    size = ((256, 4, 1, 70_000), (257, 4, 1, 70_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8))
    noise = Image.effect_noise((64, 64), 90)
    files: dict[str, tuple[bytes, str]] = {
        "nothing": (b"", "empty"),
        "one byte": (b"\x89", "not a JPEG"),
        "zeroes": (b"\0" * 1000, "not a JPEG"),
        "text": (b"hello " * 50, "not a JPEG"),
        "SVG that reads files": (b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>', "not a JPEG"),
        "HTML": (b"<script>alert(1)</script>", "not a JPEG"),
        "PDF": (b"%PDF-1.7\n%%EOF", "not a JPEG"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run", "not a JPEG"),
        "ZIP": (b"PK\x03\x04" + b"\0" * 90, "not a JPEG"),
        "ELF": (b"\x7fELF" + b"\0" * 90, "not a JPEG"),
        "PPM": (encoded(noise, "PPM"), "not a JPEG"),
        "ICO": (encoded(noise, "ICO"), "not a JPEG"),
        "TGA": (encoded(noise, "TGA"), "not a JPEG"),
        "PCX": (encoded(noise, "PCX"), "not a JPEG"),
        "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 90, "not a JPEG"),
        "HEIC": (b"\0\0\0\x18ftypheic" + b"\0" * 90, "not a JPEG"),
        "gzip of an image": (zlib.compress(PNG), "not a JPEG"),
        "GIF and script in one": (b"GIF89a=1;alert(1)//" + b" " * 50, ""),
        "PNG bomb": (png(7_000, 7_000), "pixels"),
        "PNG bomb beyond the warning": (png(12_000, 12_000), "pixels"),
        "PNG bomb beyond all": (png(2_000_000_000, 2_000_000_000), ""),
        "PNG of no width": (png(0, 100), ""),
        "PNG of no pixels": (png(100, 100, pixels=b""), "damaged"),
        "PNG of too few pixels": (png(100, 100, pixels=b"\0" * 99), "damaged"),
        "PNG of an odd depth": (png(10, 10, depth=7), ""),
        "PNG with a text bomb": (png(10, 10, (b"zTXt", b"k\0\0" + zlib.compress(b"a" * 30_000_000))), ""),
        "PNG with a colour profile bomb": (png(10, 10, (b"iCCP", b"p\0\0" + zlib.compress(b"a" * 30_000_000))), ""),
        "PNG with a broken checksum": (PNG[:40] + bytes([PNG[40] ^ 255]) + PNG[41:], ""),
        "PNG cut off": (PNG[:-30], "damaged"),
        "JPEG bomb": (jpeg_of(65_000, 65_000), "pixels"),
        "JPEG of no height": (jpeg_of(100, 0), ""),
        "JPEG cut off": (encoded(noise, "JPEG")[:300], "damaged"),
        "JPEG's first bytes": (b"\xff\xd8\xff\xe0", ""),
        "GIF bomb": (gif_of(65_000, 65_000), "pixels"),
        "GIF cut off": (encoded(noise.convert("P"), "GIF")[:900], "damaged"),
        "WebP cut off": (encoded(noise, "WEBP", lossless=True)[:900], ""),
        "WebP's first bytes": (b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 50, ""),
        "WebP bomb": (b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + b"\0" * 8, ""),
        "BMP bomb": (bmp(60_000, 60_000), "pixels"),
        "BMP of a negative width": (bmp(-100, 100), ""),
        "BMP of too few pixels": (bmp(500, 500), "damaged"),
        "BMP of odd bits": (bmp(10, 10, 99), ""),
        "TIFF bomb": (tiff(*size), "pixels"),
        "TIFF whose directories go in a circle": (tiff(following=8), ""),
        "TIFF of endless tags": (tiff(*[(256, 4, 0xFFFFFFFF, 0)] * 30), ""),
        "one pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), "at least 2 pixels"),
        "a line": (encoded(Image.new("RGB", (1, 500)), "PNG"), "at least 2 pixels"),
        "a ribbon": (encoded(Image.new("RGB", (2, 900)), "PNG"), "times the other"),
    }
    urls: dict[str, tuple[str, str]] = {
        "no base64": ("data:image/png;base64,@@@@", "base64"),
        "cut base64": ("data:image/png;base64,abc", "base64"),
        "base64 that is not ASCII": ("data:image/png;base64,ä", "base64"),
        "base64 of URLs": ("data:image/png;base64,-_-_", "base64"),
        "not base64 at all": ("data:image/png,%89PNG", "base64"),
        "no comma": ("data:image/png;base64", "base64"),
        "data alone": ("data:", "base64"),
        "an endless type": ("data:" + "a" * 5000 + ";base64,AAAA", "base64"),
    }
    return (
        {name: (data(content), *invalid, said) for name, (content, said) in files.items()}
        | {name: (url, *bad_url, said) for name, (url, said) in urls.items()}
        | {"too many bytes": (data(b"\0" * (MAX_BYTES + 1)), 413, "image_too_large", "50,000 bytes")}
    )


SERVED = served()
CASES = (
    {f"URL: {name}": case for name, case in ssrf().items()}
    | {f"web: {name}": case for name, (_, case) in SERVED.items()}
    | {f"file: {name}": case for name, case in media().items()}
)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 180
    assert len(ssrf()) >= 80 and len(SERVED) + len(media()) >= 80


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Web]:
    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        await handlers[int(head.split()[1].strip("/"))](head, writer)

    handlers = [handler for handler, _ in SERVED.values()]
    async with web(handle) as running:
        yield running


@pytest.mark.parametrize("name", CASES)
async def test_hostile_images_are_refused_and_nothing_forbidden_is_connected(
    name: str, intake: Intake, server: Web
) -> None:
    url, status, code, said = CASES[name]
    began = time.monotonic()
    with pytest.raises(APIError) as refused:
        await intake.take(url.format(port=server.port), "messages[0]", ANYBODY)
    assert (refused.value.status, refused.value.code) == (status, code), refused.value.message
    assert said in refused.value.message
    assert refused.value.param == "messages[0]"
    assert "secret" not in refused.value.message
    assert time.monotonic() - began < 20
    assert set(intake.dialler.dialled) <= {("127.0.0.1", server.port)}
    assert bool(intake.dialler.dialled) == url.startswith(WEB)
    assert await intake.store.keys("images") == []  # nothing of it is kept


async def test_what_a_file_is_its_content_says(intake: Intake, tmp_path: Path) -> None:
    content = picture(3, format="JPEG")
    async with web(answer(content, Content_Type="text/html")) as server:
        taken = await intake.take(f"http://web.test:{server.port}/page.html", "here", ANYBODY)
    assert taken.data == content and taken.id == sha256(content)
    assert (await intake.take(data(content, "application/pdf"), "here", ANYBODY)).id == taken.id
    assert await intake.store.get(image_key(taken.id)) == content


async def test_one_url_asked_by_a_hundred_at_once_is_fetched_and_stored_once(opened: Callable[..., Intake]) -> None:
    async def slowly(head: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await answer(PNG)(head, writer)

    intake = opened()
    async with web(slowly) as server:
        url = f"http://web.test:{server.port}/a.png"
        taken = await asyncio.gather(*(intake.take(url, "here", Caller(f"key-{n}")) for n in range(100)))
        assert {each.data for each in taken} == {PNG}
        await intake.take(url, "here", ANYBODY)
        assert server.connections == 1 and len(intake.dialler.dialled) == 1


async def test_fetches_are_counted_by_key_and_what_is_cached_costs_nothing(opened: Callable[..., Intake]) -> None:
    intake = opened(fetches_per_minute=2)
    async with web(answer(PNG)) as server:
        url = f"http://web.test:{server.port}"
        for path in ("/a", "/a", "/b", "/a", "/b"):
            await intake.take(url + path, "here", ANYBODY)
        with pytest.raises(APIError, match="2 fetches a minute") as refused:
            await intake.take(f"{url}/c", "here", ANYBODY)
        assert refused.value.status == 429 and server.connections == 2
        await intake.take(f"{url}/c", "here", Caller("key-2"))
        await intake.take(data(picture(5)), "here", ANYBODY)  # nothing is fetched


async def test_a_decoder_has_little_memory(opened: Callable[..., Intake]) -> None:
    intake = opened(memory=300 << 20, pixels=40_000_000)
    large = encoded(Image.new("P", (6000, 6000)), "PNG", transparency=0)  # 36 million pixels, laid on white
    assert len(large) < MAX_BYTES
    with pytest.raises(APIError, match="memory") as refused:
        await intake.take(data(large), "here", ANYBODY)
    assert refused.value.code == "invalid_image"
    await intake.take(data(PNG), "here", ANYBODY)


async def test_a_decoder_has_little_time(opened: Callable[..., Intake]) -> None:
    intake = opened(seconds=0.05, pixels=40_000_000)
    large = encoded(Image.new("L", (6000, 6000)), "PNG")
    with pytest.raises(APIError, match="seconds to decode"):
        await intake.take(data(large), "here", ANYBODY)


async def test_a_decoder_that_is_killed_is_started_again(opened: Callable[..., Intake]) -> None:
    decoders = Decoders(1, 1 << 30, 30)
    await decoders.check(PNG, MAX_PIXELS)
    process = decoders._idle.get_nowait()
    assert process is not None
    process.kill()
    decoders._idle.put_nowait(process)
    with suppress(ImageError):  # it may be found dead or die meanwhile
        await decoders.check(PNG, MAX_PIXELS)
    await decoders.check(PNG, MAX_PIXELS)
    await decoders.close()


async def test_frames_beyond_the_first_are_not_looked_at(intake: Intake) -> None:
    """A thousand frames of a million pixels each cost no more than one."""
    first = Image.new("P", (1000, 1000))
    frame = encoded(first, "GIF")
    blocks = frame[frame.index(b",") : -1]
    began = time.monotonic()
    await intake.take(data(frame[:-1] + blocks * (30_000 // len(blocks)) + b";"), "here", ANYBODY)
    assert time.monotonic() - began < 10


async def test_an_object_store_that_is_frozen_is_waited_for_once(tmp_path: Path) -> None:
    class Frozen(DirectoryStore):
        async def exists(self, key: str) -> bool:
            asked.append(key)
            await asyncio.sleep(60)
            return False

    asked: list[str] = []
    decoders, limits = Decoders(1, 1 << 30, 30), Limits({}, Buckets(None))
    fetcher = Fetcher(max_bytes=MAX_BYTES, connect_seconds=1, total_seconds=1)
    settings = Settings(max_image_bytes=MAX_BYTES, store_seconds=0.3)
    intake = ImageIntake(CachedFetcher(fetcher, 0), decoders, limits, Frozen(tmp_path), settings)
    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(APIError, match="object store") as refused:
            await intake.take(data(PNG), "here", ANYBODY)
        assert refused.value.status == 503
    assert len(asked) == 1 and time.monotonic() - began < 2
    await intake.close()
