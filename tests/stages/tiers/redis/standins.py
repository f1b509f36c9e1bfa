"""Servers in place of redis: one that holds answers back, and one that lies."""

from __future__ import annotations

import asyncio
import contextlib


class Valve:
    """A server in front of the server, which lets so many bytes of answers through."""

    def __init__(self, port):
        self._port, self.opened, self.connections = port, asyncio.Event(), 0
        self.left = 1 << 60
        self.shut = asyncio.Event()
        """Set when it has held something back."""

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._tasks = set()
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self.connections += 1
        self._tasks.add(asyncio.current_task())
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            await asyncio.gather(self._pipe(reader, up_writer), self._back(up_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, up_writer):
                each.transport.abort()

    async def _pipe(self, reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _back(self, reader, writer):
        while data := await reader.read(1 << 16):
            now = data[: self.left]
            writer.write(now)
            self.left -= len(now)
            if len(now) < len(data):
                self.shut.set()
                await self.opened.wait()
                writer.write(data[len(now) :])
            await writer.drain()
        writer.close()


class Liar:
    """A server that answers each command as `answer(words)` says; None: the connection ends."""

    def __init__(self, answer):
        self._answer, self.closed = answer, asyncio.Event()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            while True:
                count = int((await reader.readuntil(b"\r\n"))[1:])
                words = []
                for _ in range(count):
                    size = int((await reader.readuntil(b"\r\n"))[1:])
                    words.append((await reader.readexactly(size + 2))[:-2])
                said = self._answer(words)
                if said is None:
                    break
                writer.write(said)
        self.closed.set()
        writer.transport.abort()
