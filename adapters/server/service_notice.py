"""What systemd is told of a service (sd_notify(3)): that it is ready, alive, about to end. Nothing
where systemd did not start it, or did not ask."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

import anyio


class ServiceNotice:
    """Messages to the socket that NOTIFY_SOCKET names. Never waits, never raises."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self._at = f"\0{path[1:]}" if path.startswith("@") else path
        asked = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self._period = int(asked) / 2e6 if self._at and ours and asked.isdigit() else 0.0

    def tell(self, state: str) -> None:
        """`READY=1`, `STOPPING=1`."""
        if not self._at:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), self._at)

    async def stay_alive(self) -> None:
        """Say so twice in each period after which systemd would kill and restart the service; a
        loop that hangs does not."""
        while self._period:
            self.tell("WATCHDOG=1")
            await anyio.sleep(self._period)
