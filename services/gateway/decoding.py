"""Strangers' images are decoded in processes of their own, with little memory and an end to their time.

What kills a decoder kills one of these, and the image is refused. `python -m services.gateway.decoding` is one.
"""

import asyncio
import os
import resource
import signal
import struct
import sys

from basalt.data.images import ImageError, decode_image

HEADER = struct.Struct("<II")  # bytes that follow, pixels allowed
ANSWER = struct.Struct("<I")  # bytes that follow: why the image is refused; 0 where it is good


class Decoders:
    """Checks images, so many at a time. Use from one event loop; `close` at the end.

    Args:
        memory_bytes: of each process, its Python included.
        seconds: for one image.
    """

    def __init__(self, count: int, memory_bytes: int, seconds: float) -> None:
        self._memory_bytes, self._seconds = memory_bytes, seconds
        self._idle: asyncio.LifoQueue[asyncio.subprocess.Process | None] = asyncio.LifoQueue()
        for _ in range(count):
            self._idle.put_nowait(None)  # started when it is first needed

    async def close(self) -> None:
        while not self._idle.empty():
            process = self._idle.get_nowait()
            if process is not None:
                await _end(process)

    async def check(self, data: bytes, max_pixels: int) -> None:
        """
        Raises:
            ImageError: it cannot be decoded, or not within memory and time.
        """
        process = await self._idle.get()
        usable: asyncio.subprocess.Process | None = None
        try:
            if process is None or process.returncode is not None:
                process = await self._start()
            async with asyncio.timeout(self._seconds):
                why = await _ask(process, data, max_pixels)
            usable = process
        except TimeoutError:
            raise ImageError(
                f"the image takes more than {self._seconds:g} seconds to decode: send a simpler one"
            ) from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ImageError("the image cannot be decoded: it is damaged, or takes too much memory") from None
        finally:
            self._idle.put_nowait(usable)
            if usable is None and process is not None:
                await asyncio.shield(_end(process))
        if why:
            raise ImageError(why)

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        command = ("-m", "services.gateway.decoding", str(self._memory_bytes))
        environment = {"PYTHONPATH": os.pathsep.join(sys.path)}  # and none of our secrets
        return await asyncio.create_subprocess_exec(sys.executable, *command, stdin=pipe, stdout=pipe, env=environment)


async def _ask(process: asyncio.subprocess.Process, data: bytes, max_pixels: int) -> str:
    """Why the image is refused; empty where it is good."""
    assert process.stdin and process.stdout
    process.stdin.write(HEADER.pack(len(data), max_pixels))
    process.stdin.write(data)
    await process.stdin.drain()
    (length,) = ANSWER.unpack(await process.stdout.readexactly(ANSWER.size))
    return (await process.stdout.readexactly(length)).decode()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


def serve(memory_bytes: int) -> None:
    """Answers for as long as somebody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all; the gateway finishes what it has begun
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked, answered = sys.stdin.buffer, sys.stdout.buffer
    while header := asked.read(HEADER.size):
        length, max_pixels = HEADER.unpack(header)
        why = b""
        try:
            decode_image(asked.read(length), max_pixels=max_pixels)
        except ImageError as error:
            why = str(error).encode()
        answered.write(ANSWER.pack(len(why)) + why)
        answered.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
