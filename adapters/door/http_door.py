"""HttpDoor: HTTP beside what a process does, on a thread with a loop of its own.

It reads counters where they are. No lock is taken that a request waits for, and what happens here
happens to nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierloom.adapters.door.entrance import App, Entrance, Guard
from tierloom.adapters.door.http_socket import http_socket, is_loopback
from tierloom.stages.errors import require

if TYPE_CHECKING:
    from uvicorn import Server

    from tierloom.adapters.door.routes import Act, Parts
    from tierloom.pipeline.pipeline import Pipeline

log = logging.getLogger("tierloom.http")

_AT_ONCE = 64
"""Connections, beyond which others are refused."""


class HttpDoor:
    """From `start` to `close`; also a context manager. Thread-safe."""

    def __init__(
        self, read: Callable[[], Awaitable[Parts]], entrance: Entrance, act: Act | None = None
    ) -> None:
        """`read`: the figures, `act`: gives orders, see `DoorRoutes`. Raises MissingPackage."""
        require("http", "fastapi", "uvicorn", "prometheus_client")
        self._read, self._entrance, self._act = read, entrance, act
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self.draining = ""
        """Why nothing new is taken: `/readyz` says it, with 503. Empty: it is."""
        self.url = ""

    def start(self) -> HttpDoor:
        """Listen. Raises ConfigError where that is not possible."""
        import uvicorn

        address = self._entrance.address
        app = self._app()
        listener = http_socket(address.host, address.port, f"{self._entrance.option} {address}")
        config = uvicorn.Config(
            Guard(app, self._entrance), loop="asyncio", http="h11", ws="none",
            lifespan="off", log_config=None, log_level="critical", access_log=False,
            server_header=False, date_header=False, limit_concurrency=_AT_ONCE,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        config.load()
        config.ssl = self._entrance.context  # ours, so that a certificate can be renewed
        host = f"[{address.host}]" if ":" in address.host else address.host
        scheme = "https" if address.tls else "http"
        self.url = f"{scheme}://{host}:{listener.getsockname()[1]}"
        if not address.tls and not is_loopback(address.host):
            log.warning("%s: the token goes over the network in plain; https:// hides it", self.url)
        self._server = server = uvicorn.Server(config)

        def run() -> None:
            try:
                with listener:
                    asyncio.run(server.serve(sockets=[listener]))
            except Exception:
                log.exception("%s: nothing is answered any more", self.url)

        self._thread = threading.Thread(target=run, name="tierloom-http", daemon=True)
        self._thread.start()
        return self

    def _app(self) -> App:
        """What is answered, to those who may come in."""
        from tierloom.adapters.door.routes import DoorRoutes

        routes = DoorRoutes(self._read, lambda: self.draining, self._own)
        if self._act is not None:
            from tierloom.adapters.door.admin_routes import AdminRoutes

            AdminRoutes(routes.app, self._act)
        return routes.app

    def renew(self) -> None:
        """Read token and certificate anew. Raises ConfigError, and all stays as it was."""
        self._entrance.renew()

    def close(self, timeout: float = 5.0) -> None:
        """Answer nobody any more. Idempotent."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout)
            self._server = None

    def __enter__(self) -> HttpDoor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _own(self) -> dict[str, tuple[str, float]]:
        if not self._entrance.ends:
            return {}
        return {"certificate_ends_seconds": ("End of the certificate, since 1970.",
                                             self._entrance.ends)}  # fmt: skip


def serve_http(
    pipe: Pipeline | Sequence[Pipeline], at: str = "127.0.0.1:0", *, token_file: str = "",
    cert: str | Path | None = None, key: str | Path | None = None,
) -> HttpDoor:  # fmt: skip
    """Health, metrics, figures and orders of pipelines over HTTP, from a thread of its own, until
    the door that is returned is closed; it begins to `measure` them.

    `at`: `HOST:PORT` or `https://HOST:PORT`, port 0: one that is free, which `HttpDoor.url` then
    says. Other hosts are let in only with a token: of `token_file`, or of the environment variable
    TIERLOOM_TOKEN; it is sent as `Authorization: Bearer`. `cert`, `key`: PEM files, for `https://`.
    Raises ConfigError, MissingPackage.
    """
    pipes = list(pipe) if isinstance(pipe, Sequence) else [pipe]
    files = [Path(file) if file is not None else None for file in (cert, key)]
    entrance = Entrance(at, option="serve_http", token_file=token_file, cert=files[0], key=files[1])
    for each in pipes:
        each.measure()

    async def read() -> dict[str, Any]:
        return {str(i): each.stats() for i, each in enumerate(pipes)}

    async def act(order: str, said: Mapping[str, Any], id: str) -> dict[str, Any]:
        return await ordered(pipes, order, said, id)

    door = HttpDoor(read, entrance, act).start()
    for each in pipes:
        each.introduce(door=door.url)
    return door


async def ordered(
    pipes: Sequence[Pipeline], order: str, said: Mapping[str, Any], id: str
) -> dict[str, dict[str, Any]]:
    """The same order to each pipeline, and what came of it. Raises InputError, Closed."""
    from tierloom.pipeline.pipeline_admin import begin_order
    from tierloom.pipeline.run.loop_thread import awaited

    begun = [begin_order(pipe, order, said, id) for pipe in pipes]
    return {str(i): await awaited(each) for i, each in enumerate(begun)}
