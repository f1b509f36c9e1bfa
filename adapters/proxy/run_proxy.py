"""`tierloom proxy`: from options to a server."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence

from tierloom.adapters.door.http_socket import http_socket, is_loopback
from tierloom.adapters.proxy.lmcache_side import ReceiverPorts
from tierloom.adapters.proxy.parts import ProxyParts
from tierloom.stages.errors import ConfigError
from tierloom.stages.tiers.net.credentials import secret_in_file

TOKEN_VARIABLE = "TIERLOOM_PROXY_TOKEN"


def run_proxy(
    parts: ProxyParts, prefill: Sequence[str], decode: Sequence[str], *, host: str, port: int,
    token_file: str, drain: float, say: Callable[[str], None], receivers: Sequence[str] = (),
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT; then `drain` seconds are left to what is under way.
    `receivers`: ports of each decoder, or of all, where engines are LMCache's. Raises
    ConfigError."""
    if missing := [name for name in ("starlette", "uvicorn") if not importlib.util.find_spec(name)]:
        raise ConfigError(f"proxy: {missing[0]} is not installed: pip install 'tierloom[http]'")
    import uvicorn

    from tierloom.adapters.proxy.http_app import ProxyRoutes

    token = secret_in_file("--token-file", token_file) if token_file else ""
    parts.token = (token or os.environ.get(TOKEN_VARIABLE, "")).strip().encode()
    if not is_loopback(host) and not parts.token:
        raise ConfigError(
            f"--host {host} can be reached from other hosts, which could change the engines: name "
            f"a --token-file, or set {TOKEN_VARIABLE}"
        )
    for url in prefill:
        parts.fleet.add(url, "prefill")
    ports = [ReceiverPorts.parsed(text) for text in receivers]
    if (parts.lmcache is not None) != bool(ports) or len(ports) not in (0, 1, len(decode)):
        raise ConfigError(
            "proxy: --lmcache HOST:PORT and --receiver INIT/ALLOC go together: name --receiver "
            "once, or as often as --decode"
        )
    for i, url in enumerate(decode):
        parts.fleet.add(url, "decode", ports[i % len(ports)] if ports else None)
    if not decode and not parts.token and not prefill:
        raise ConfigError("proxy: no engine: pass --decode http://HOST:PORT, and --prefill")
    listener = http_socket(host, port, f"--host {host} --port {port}")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # two for each stream
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = uvicorn.Config(
        ProxyRoutes(parts).app, log_config=None, log_level="critical", access_log=False, ws="none",
        server_header=False, date_header=False, timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(drain)),
    )  # fmt: skip
    say(f"listening on http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when done
    with listener, contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
