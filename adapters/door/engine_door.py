"""The door beside an engine, whose adapter opens it: `tierloom.http`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tierloom.adapters.door.entrance import Entrance
from tierloom.adapters.door.http_door import HttpDoor
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.stages.errors import ConfigError
from tierloom.stages.user_home import expanded

if TYPE_CHECKING:
    from tierloom.adapters.door.routes import Act, Parts

log = logging.getLogger("tierloom.http")

OPTION = "tierloom.http"


def open_engine_door(
    at: str, spec: PipelineSpec, read: Callable[[], Awaitable[Parts]], act: Act | None = None
) -> HttpDoor | None:
    """Token and certificate are those of the pipeline's `serve`. None, and the log says why, where
    its port is another's: the engine goes on without. Raises ConfigError for what the user can
    mend."""
    files = [getattr(spec.serve, name, "") for name in ("token_file", "cert_file", "key_file")]
    cert, key = (Path(expanded(file)) if file else None for file in files[1:])
    door = HttpDoor(read, Entrance(at, option=OPTION, token_file=files[0], cert=cert, key=key), act)
    try:
        door.start()
    except ConfigError as error:
        log.warning("nothing is answered over HTTP: %s", error)
        return None
    log.info("health, metrics and figures at %s", door.url)
    return door
