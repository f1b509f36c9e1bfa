"""`tierloom control serve`: from options to a server."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tierloom.adapters.controller.fleet_view import FleetView
from tierloom.adapters.controller.text_tokens import TextTokens
from tierloom.adapters.door.door_client import DoorClient
from tierloom.adapters.door.entrance import App, Entrance
from tierloom.adapters.door.http_door import HttpDoor
from tierloom.adapters.server.log_format import write_log
from tierloom.stages.directory.shared.named import EMBEDDED, named_directory
from tierloom.stages.errors import ConfigError
from tierloom.stages.tiers.server.client import read_token

if TYPE_CHECKING:
    from tierloom.stages.directory.shared.contract import Directory

log = logging.getLogger("tierloom.control")


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlOptions:
    """What the controller is started with."""

    directory: str
    """Where engines tell what they have."""
    host: str = "127.0.0.1"
    port: int = 9000
    token_file: str = ""
    """The token of whoever asks; also what engines' doors and a hosted directory are shown."""
    cert: Path | None = None
    key: Path | None = None
    ca_file: str = ""
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    lmcache_routes: bool = False
    """Answer LMCache's routes, too."""
    timeout: float = 1.0
    """Seconds that the directory may take."""


class ControlDoor(HttpDoor):
    """The controller, from `start` to `close`. Any number of them may run: what they know is in the
    directory and in the engines."""

    def __init__(self, options: ControlOptions, directory: Directory | None = None) -> None:
        """`directory`: in place of the one that options name. Raises ConfigError,
        MissingPackage."""
        if directory is None and options.directory == EMBEDDED:
            raise ConfigError(
                "--directory embedded: it would be empty; name the one that engines tell"
            )
        host = f"[{options.host}]" if ":" in options.host else options.host
        at = f"{'https' if options.cert else 'http'}://{host}:{options.port}"
        super().__init__(
            _no_figures,
            Entrance(
                at, option="--host", token_file=options.token_file, cert=options.cert,
                key=options.key,
            ),
        )  # fmt: skip
        self._options, self._texts = options, TextTokens(options.tokenizers)
        self._directory = directory or named_directory(
            options.directory, timeout=options.timeout, token_file=options.token_file,
            ca_file=options.ca_file,
        )  # fmt: skip

    def _app(self) -> App:
        from tierloom.adapters.controller.control_routes import ControlRoutes

        fleet = FleetView(self._directory, self._texts)
        routes = ControlRoutes(fleet, self._door_at, lambda: self.draining)
        if self._options.lmcache_routes:
            from tierloom.adapters.controller.lmcache_routes import LMCacheRoutes

            LMCacheRoutes(routes)
        return routes.app

    def _door_at(self, url: str, seconds: float) -> DoorClient:
        ca_file = self._options.ca_file
        return DoorClient(url, self._entrance.token, ca_file=ca_file, timeout=seconds)


async def _no_figures() -> dict[str, dict[str, object]]:
    return {}


def run_control(
    options: ControlOptions, *, log_level: str, log_format: str, say: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP has it read token and certificate anew. Raises
    ConfigError."""
    read_token(options.token_file)
    write_log(log_level, log_format)
    stop = threading.Event()
    with ControlDoor(options) as door:
        door.start()

        def renew(*_: object) -> None:
            try:
                door.renew()
                log.info("SIGHUP: token and certificate were read anew")
            except (ConfigError, OSError) as error:
                log.error("SIGHUP: %s; they are those of before", error)  # noqa: TRY400

        signal.signal(signal.SIGHUP, renew)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        say(f"listening on {door.url}")
        while not stop.wait(3600):
            pass
