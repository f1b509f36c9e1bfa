"""HTTP/1.1 as an engine's server may send it, cut into packets anywhere."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings, strategies as st

from tierloom.adapters.proxy.upstream import EngineFailed, Upstream
from tierloom.stages.errors import ConfigError

BODY = st.lists(st.binary(min_size=1, max_size=40) | st.just(b"x" * 70000), max_size=4)


def framed(chunks: list[bytes], kind: str) -> bytes:
    body = b"".join(chunks)
    if kind == "chunks":
        parts = [b"%X;a=b\r\n%s\r\n" % (len(c), c) for c in chunks]
        sent = b"transfer-encoding: chunked\r\n\r\n" + b"".join(parts) + b"0\r\nTrailer: x\r\n\r\n"
    elif kind == "length":
        sent = b"content-length: %d\r\n\r\n" % len(body) + body
    else:
        sent = b"\r\n" + body
    return b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nX-Y:  z \r\n" + sent


async def served(sent: bytes, cuts: list[int], count: int, close: bool) -> tuple[list[bytes], int]:
    """Bodies of `count` requests to a server that sends this for each; connections it took."""
    taken = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        taken += 1
        while await reader.readline():
            while await reader.readline() not in (b"\r\n", b""):
                pass
            at = 0
            for cut in [*sorted(c % (len(sent) + 1) for c in cuts), len(sent)]:
                writer.write(sent[at:cut])
                at = cut
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            if close:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/")
        got = []
        try:
            for _ in range(count):
                with await upstream.ask(b"GET", b"/x") as answer:
                    assert (answer.status, answer.headers[0]) == (200, (b"x-y", b"z"))
                    await answer.begin(1 << 20)
                    rest = [piece async for piece in answer.rest or _none()]
                    got.append(answer.first + b"".join(rest))
        finally:
            upstream.close(for_good=True)
            await asyncio.sleep(0.005)
    return got, taken


async def _none():  # type: ignore[no-untyped-def]
    for piece in ():
        yield piece


@settings(max_examples=35, deadline=None)
@given(BODY, st.lists(st.integers(0, 1 << 17), max_size=6), st.sampled_from(["chunks", "length"]))
def test_bodies_come_as_they_were_and_the_connection_is_kept(chunks, cuts, kind) -> None:
    got, taken = asyncio.run(served(framed(chunks, kind), cuts, 3, close=False))
    assert (got, taken) == ([b"".join(chunks)] * 3, 1)


@settings(max_examples=20, deadline=None)
@given(BODY, st.lists(st.integers(0, 1 << 17), max_size=6))
def test_a_body_that_ends_with_the_connection(chunks, cuts) -> None:
    got, taken = asyncio.run(served(framed(chunks, "end"), cuts, 2, close=True))
    assert (got, taken) == ([b"".join(chunks)] * 2, 2)


@settings(max_examples=35, deadline=None)
@given(BODY, st.integers(1, 1 << 17), st.sampled_from(["chunks", "length"]))
def test_an_answer_that_is_cut_short_is_no_answer(chunks, end, kind) -> None:
    sent = framed(chunks, kind)
    with pytest.raises(EngineFailed):
        asyncio.run(served(sent[: -1 - end % (len(sent) - 1)], [], 1, close=True))


@pytest.mark.parametrize("more", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad"])
def test_a_kept_connection_is_given_up(more) -> None:
    """Closed by a server that thought it idle just then; with an answer that nobody asked for."""

    async def main() -> int:
        taken = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal taken
            taken += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 204 None\r\n\r\n" + more)
            await reader.readuntil(b"\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            for _ in range(4):
                with await upstream.ask(b"GET", b"/x") as answer:
                    assert answer.status == 204
                    await answer.begin(1)
            upstream.close(for_good=True)
            await asyncio.sleep(0.01)
        return taken

    assert asyncio.run(main()) == 4


def test_nobody_takes_the_connection() -> None:
    with pytest.raises(EngineFailed, match="takes no connection"):
        asyncio.run(Upstream("http://127.0.0.1:1").ask(b"GET", b"/"))


@pytest.mark.parametrize(
    "url",
    ["", "x", "ftp://x:1", "http://", "http://x:1/path", "http://x:1?q", "http://u:p@x:1",
     "http://x:port", "http://x y:1", "http://x\"y:1", "http://ü:1", "http://x:1\r\na: b"],
)  # fmt: skip
def test_what_is_no_engine(url) -> None:
    with pytest.raises(ConfigError, match="engine "):
        Upstream(url)
