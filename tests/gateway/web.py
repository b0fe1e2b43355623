"""A web server of raw bytes on a free local port, for answers no framework would give."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Handler = Callable[[str, asyncio.StreamWriter], Awaitable[None]]  # the request head, where to answer


@dataclass
class Web:
    port: int
    heads: list[str] = field(default_factory=list)  # of the requests so far
    connections: int = 0  # made so far

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@asynccontextmanager
async def web(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            running.heads.append(head)
            await handler(head, writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client had enough
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    running = Web(server.sockets[0].getsockname()[1])
    try:
        yield running
    finally:
        server.close()


def answer(body: bytes, status: str = "200 OK", **headers: str) -> Handler:
    """A handler that says one thing."""
    fields = {"Content-Length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"HTTP/1.1 {status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"

    async def handle(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(head.encode() + body)

    return handle


def redirect(location: str, status: str = "302 Found") -> Handler:
    return answer(b"", status, Location=location)
