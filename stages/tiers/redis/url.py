"""What a Redis URL says, and the secrets that go with it.

    redis://[user[:password]@]host[:port][/db]          rediss:// with TLS
    unix://[user[:password]@]/path/to/socket[?db=0]
    redis-sentinel://[user[:password]@]host[:port],host[:port]/service[/db]
    redis-cluster://[user[:password]@]host[:port],host[:port]

`rediss-sentinel` and `rediss-cluster` with TLS. User and password are percent-encoded.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple
from urllib.parse import unquote

from tierloom.stages.errors import ConfigError
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.net.credentials import secret_in_env, secret_in_file

Topology = Literal["single", "sentinel", "cluster"]

_SCHEMES: dict[str, tuple[Topology, bool]] = {
    "redis": ("single", False), "rediss": ("single", True), "unix": ("single", False),
    "redis-sentinel": ("sentinel", False), "rediss-sentinel": ("sentinel", True),
    "redis-cluster": ("cluster", False), "rediss-cluster": ("cluster", True),
}  # fmt: skip
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::([0-9]{1,5}))?")


class Url(NamedTuple):
    """The parts of a URL."""

    kind: Topology
    tls: bool
    hosts: tuple[Address, ...]
    service: str
    """The service's name at the sentinels."""
    db: int
    user: str
    password: str


def parse_url(text: str) -> Url:
    """Raises ValueError, which never quotes what may be a password."""
    scheme, mark, rest = text.partition("://")
    scheme = scheme.lower()
    if not mark or scheme not in _SCHEMES:
        raise ValueError(f"url must begin with one of {', '.join(f'{s}://' for s in _SCHEMES)}")
    kind, tls = _SCHEMES[scheme]
    who, _, rest = rest.rpartition("@")
    user, _, password = who.partition(":")
    place, _, query = rest.partition("?")
    if scheme == "unix":
        if not place.startswith("/"):
            raise ValueError(
                "url needs the absolute path of a socket, as in unix:///run/redis.sock"
            )
        hosts, path = [Address("", path=unquote(place))], query.removeprefix("db=")
        query = "" if query.startswith("db=") else query
    else:
        names, _, path = place.partition("/")
        port = 26379 if kind == "sentinel" else 6379
        hosts = [_host(name, port) for name in names.split(",")]
    if query:
        raise ValueError("url has a query, which is not supported: give options beside the url")
    service = ""
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not service:
            raise ValueError(
                "url needs the service's name, as in redis-sentinel://h1,h2,h3/mymaster"
            )
    if len(hosts) > 1 and kind == "single":
        raise ValueError("url names several hosts: use redis-sentinel:// or redis-cluster://")
    if path and not (path.isdigit() and len(path) < 6):
        raise ValueError("database in url must be a number")
    if path.strip("0") and kind == "cluster":
        raise ValueError("url names a database, but a cluster has only database 0")
    return Url(
        kind, tls, tuple(hosts), unquote(service), int(path or 0), unquote(user), unquote(password)
    )


def _host(text: str, port: int) -> Address:
    found = _HOST.fullmatch(text)
    if found is None or int(found[2] or 1) not in range(1, 65536):
        raise ValueError("invalid host in url; write host or host:port")
    return Address(found[1].strip("[]"), int(found[2] or port))


def password_of(url: Url, env: str, file: str) -> str:
    """The password: a file's before a variable's before the URL's; read anew at each connect, so
    that it may change. Raises ConfigError for a variable or a file that is not there."""
    password = url.password
    if env:
        password = secret_in_env("password_env", env)
    if file:
        password = secret_in_file("password_file", file)
    if url.user and not password:
        raise ConfigError(f"user {url.user!r} has no password; set password_env or password_file")
    return password
