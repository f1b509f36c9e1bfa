"""A server that speaks as an engine with a connector does; its text is a formula of the prompt.

python stub_engine.py COUNT          (prints COUNT ports, which are served until it is killed)
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import uvicorn
import zmq
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "stub"
COMPUTED: dict[str, asyncio.Event] = {}
"""Of each transfer: a prefiller of this process is through with its prompt."""


def prompt_of(body: dict[str, Any]) -> str:
    said = body.get("prompt", body.get("messages"))
    return said if isinstance(said, str) else json.dumps(said)


def words(prompt: str, count: int, choice: int = 0) -> list[str]:
    """What any engine answers to a prompt."""
    seed = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return [f" {seed[i % 60 : i % 60 + 4]}{i}{choice or ''}" for i in range(count)]


def completion(body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a body, as one object."""
    chat, prompt = "messages" in body, prompt_of(body)
    count = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    choices = []
    for i in range(body.get("n") or 1):
        text = "".join(words(prompt, count, i))
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        end = {"logprobs": body.get("logprobs"), "finish_reason": "length"}
        choices.append({"index": i, **said, **end})
    used = {"prompt_tokens": len(prompt) // 4, "completion_tokens": count}
    used |= {"total_tokens": sum(used.values()), "prompt_tokens_details": {"cached_tokens": 5}}
    kind = "chat.completion" if chat else "text_completion"
    return {
        "id": "x", "object": kind, "created": 1, "model": MODEL, "choices": choices, "usage": used,
    }  # fmt: skip


def refusal(text: str, status: int) -> JSONResponse:
    said = {"message": text, "type": "NotFoundError", "param": None, "code": status}
    return JSONResponse({"error": said}, status)


class StubEngine:
    """`seen`: what it was asked, in order. `faults`: what it does to the next requests, one each:
    a status, a delay in seconds, "garbage", "half" (of a stream), "no params", "at once". `notes`:
    where LMCache's prefiller tells its proxy, and the seconds after which it does; None: never."""

    def __init__(self, pace: float = 0.0) -> None:
        self.pace = pace
        self.seen: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.faults: list[Any] = []
        self.keep = True
        self.notes: tuple[str, float | None] = ("", None)
        self.noted: dict[str, float] = {}
        both = [f"/v1/{chat}completions" for chat in ("", "chat/")]
        self.app = Starlette(
            routes=[
                *(Route(path, self.generate, methods=["POST"]) for path in both),
                Route("/v1/responses", self.respond, methods=["POST"]),
                Route("/v1/responses/{id}", self.respond),
                Route("/v1/embeddings", self.embed, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
            ]
        )
        self.port = 0

    async def health(self, _: Request) -> Response:
        return Response()

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def embed(self, request: Request) -> Response:
        text = (await request.json())["input"]
        return JSONResponse({"data": [{"embedding": [len(text)]}], "at": self.port})

    async def respond(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"id": request.path_params["id"], "at": self.port})
        number = len(self.seen)
        self.seen.append({"body": await request.json()})
        return JSONResponse({"id": f"resp_{self.port}_{number}", "at": self.port})

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        if self.keep:
            headers = dict(request.headers)
            said = {"path": request.url.path, "body": body, "headers": headers}
            self.seen.append(said | {"at": time.monotonic()})
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return refusal(f"as told: {fault}", fault)
        if isinstance(fault, float):
            await self._wait(request, fault)
        if fault == "garbage":
            return Response(b"\xff\xfe{{", media_type="application/json")
        if body.get("model") != MODEL:
            return refusal("no such model", 404)
        params = body.get("kv_transfer_params") or {}
        transfer = params.get("transfer_id")
        computed = COMPUTED.setdefault(transfer, asyncio.Event()) if transfer else None
        if computed and params.get("do_remote_prefill") and fault != "at once":
            with contextlib.suppress(asyncio.TimeoutError):  # a decoder waits for what is to land
                await asyncio.wait_for(computed.wait(), 1)
        if body.get("stream"):
            return StreamingResponse(
                self._stream(body, fault == "half", request), media_type="text/event-stream"
            )
        answer = completion(body)
        if computed:
            computed.set()
        if params.get("do_remote_decode") and fault != "no params":
            answer["kv_transfer_params"] = self.params(request.headers.get("x-request-id", ""))
        if (spec := params.get("disagg_spec")) and fault != "no params":
            answer["kv_transfer_params"] = {"first_tok": 42}
            self._noting = asyncio.create_task(self._note(spec))
        return JSONResponse(answer)

    async def _note(self, spec: dict[str, Any]) -> None:
        """As LMCache's does when its ranks have written all to those of the decoder."""
        at, seconds = self.notes
        if seconds is None:
            return
        await asyncio.sleep(seconds)
        with zmq.Context.instance().socket(zmq.PUSH) as sock:
            sock.connect(f"tcp://{at}")
            name = spec["req_id"].encode()
            note = b"\x82\xa4type\xaaProxyNotif\xa6req_id\xd9" + bytes([len(name)]) + name
            for _ in spec["receiver_init_port"]:
                self.noted[spec["req_id"]] = time.monotonic()
                sock.send(note)
            sock.close(1000)

    def params(self, request_id: str) -> dict[str, Any]:
        """What a prefiller hands over."""
        return {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [],
            "remote_engine_id": f"engine-{self.port}", "remote_request_id": request_id,
            "remote_host": "127.0.0.1", "remote_port": self.port + 1, "remote_num_tokens": 7,
            "tp_size": 1,
        }  # fmt: skip

    async def _wait(self, request: Request, seconds: float) -> None:
        """Raises ClientDisconnect if the client goes meanwhile."""
        gone = asyncio.ensure_future(self._gone(request))
        done, _ = await asyncio.wait([gone], timeout=seconds)
        gone.cancel()
        if done:
            self.aborted.append(request.headers.get("x-request-id", ""))
            raise ClientDisconnect

    async def _gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def _stream(self, body: dict[str, Any], half: bool, request: Request) -> Any:
        whole = completion(body)
        chat = "messages" in body
        count, prompt = whole["usage"]["completion_tokens"], prompt_of(body)
        done = False
        try:
            for i, word in enumerate(words(prompt, count)):
                if half and i == count // 2:
                    raise OSError("as told")
                if self.pace:
                    await asyncio.sleep(self.pace)
                said = {"delta": {"content": word}} if chat else {"text": word}
                yield event({**whole, "choices": [{"index": 0, **said}], "usage": None})
            if (body.get("stream_options") or {}).get("include_usage"):
                yield event({**whole, "choices": []})
            yield b"data: [DONE]\n\n"
            done = True
        finally:
            if not done:
                self.aborted.append(request.headers.get("x-request-id", ""))


def event(said: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(said)}\n\n".encode()


class InThread:
    """ASGI applications, each on a free loopback port, on a loop in a thread of their own."""

    def __init__(self, apps: Iterable[Any], lifespan: str = "off", port: int = 0) -> None:
        self.servers, self.sockets, self.ports = [], [], []
        for app in apps:
            # of a socket whose protocol is not said asyncio does not know that it is TCP's
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            sock.listen(1024)
            config = uvicorn.Config(
                app, log_level="critical", lifespan=lifespan, timeout_graceful_shutdown=1
            )
            self.servers.append(uvicorn.Server(config))
            self.sockets.append(sock)
            self.ports.append(sock.getsockname()[1])
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)

    async def run(self) -> None:
        self.loop = asyncio.get_running_loop()
        for server in self.servers:
            server.capture_signals = contextlib.nullcontext
        pairs = zip(self.servers, self.sockets, strict=True)
        await asyncio.gather(*(server.serve([sock]) for server, sock in pairs))

    def do(self, call: Callable[[], None]) -> None:
        """Call in the loop's thread."""

        async def called() -> None:
            call()

        asyncio.run_coroutine_threadsafe(called(), self.loop).result(20)

    def __enter__(self) -> InThread:
        self.thread.start()
        while not all(server.started for server in self.servers):
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.should_exit = True
        self.thread.join(20)
        for sock in self.sockets:
            sock.close()


def main(count: int, pace: float = 0.0, port: int = 0) -> None:
    engines = [StubEngine(pace) for _ in range(count)]
    threads = InThread((e.app for e in engines), port=port)
    for engine, port in zip(engines, threads.ports, strict=True):
        engine.port, engine.keep = port, False
    print(*threads.ports, flush=True)
    asyncio.run(threads.run())


if __name__ == "__main__":
    numbers = zip((int, float, int), sys.argv[1:], strict=False)
    main(*(number(word) for number, word in numbers))
