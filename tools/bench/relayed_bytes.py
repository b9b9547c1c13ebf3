"""A server seen through a relay that counts what passes: bytes of requests and of answers, headers included."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

BLOCK = 2**16


@dataclass
class Relayed:
    """What has passed so far, and where the relay listens."""

    url: str
    asked: int = 0
    answered: int = 0


@contextmanager
def relayed(url: str) -> Iterator[Relayed]:
    """Inside, whoever asks `Relayed.url` asks the server at `url`. The relay has a thread of its own."""
    loop, found = asyncio.new_event_loop(), Relayed("")
    thread = threading.Thread(target=loop.run_forever, name="relay", daemon=True)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(_listen(url, found), loop).result()
        found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield found
        asyncio.run_coroutine_threadsafe(_close(server), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _listen(url: str, found: Relayed) -> asyncio.Server:
    where = urlsplit(url)

    def count(name: str, size: int) -> None:
        setattr(found, name, getattr(found, name) + size)

    async def carry(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while block := await reader.read(BLOCK):
                count(name, len(block))
                writer.write(block)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection(where.hostname, where.port)
        with suppress(asyncio.CancelledError):  # by `_close`, of which asyncio would complain
            await asyncio.gather(
                carry("asked", reader, their_writer), carry("answered", their_reader, writer)
            )

    return await asyncio.start_server(serve, "127.0.0.1", 0)


async def _close(server: asyncio.Server) -> None:
    """End it with its connections."""
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
