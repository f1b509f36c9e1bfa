"""Which directory a URL names, or the word `embedded`."""

from __future__ import annotations

import os

from tierloom.stages.directory.shared.contract import Directory
from tierloom.stages.directory.shared.hosted import HostedDirectory
from tierloom.stages.directory.shared.redis_directory import RedisDirectory
from tierloom.stages.errors import ConfigError
from tierloom.stages.options import masked
from tierloom.stages.tiers.redis.tier import RedisOptions

EMBEDDED = "embedded"
PASSWORD = "TIERLOOM_DIRECTORY_PASSWORD"
"""Environment variable with the directory's password, where its URL has none."""
_SCHEMES = tuple(
    f"{redis}{kind}" for redis in ("redis", "rediss") for kind in ("", "-sentinel", "-cluster")
)


def named_directory(
    url: str, *, timeout: float = 1.0, token_file: str = "", ca_file: str = ""
) -> Directory:
    """The directory at a URL: as the tier `redis` takes it, or `directory://HOST:PORT` of one that
    is hosted, whose token is in `token_file`; or one in this process. `ca_file`: whom to trust with
    TLS. Raises ConfigError."""
    if url == EMBEDDED:  # whose table is compiled: not for those who only ask
        from tierloom.stages.directory.shared.embedded import EmbeddedDirectory

        return EmbeddedDirectory.warm()
    scheme = url.partition("://")[0]
    if scheme.startswith("directory"):
        return HostedDirectory(url, timeout=timeout, token_file=token_file, ca_file=ca_file)
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"directory {masked(url)!r}: a directory is redis://, redis-sentinel:// or "
            "redis-cluster://, the same with rediss, or directory://, of an engine that hosts it"
        )
    own = "@" in url or PASSWORD not in os.environ
    ca_file = ca_file if scheme.startswith("rediss") else ""
    try:
        options = RedisOptions(url=url, password_env="" if own else PASSWORD, ca_file=ca_file)
    except ValueError as error:
        raise ConfigError(f"directory {masked(url)}: {error}") from None
    return RedisDirectory(options, timeout=timeout)
