"""Which directory a URL names."""

from __future__ import annotations

import os

from tierloom.stages.directory.shared.contract import Directory
from tierloom.stages.directory.shared.redis_directory import RedisDirectory
from tierloom.stages.errors import ConfigError
from tierloom.stages.options import masked
from tierloom.stages.tiers.redis.tier import RedisOptions

PASSWORD = "TIERLOOM_DIRECTORY_PASSWORD"
"""Environment variable with the directory's password, where its URL has none."""
_SCHEMES = tuple(
    f"{redis}{kind}" for redis in ("redis", "rediss") for kind in ("", "-sentinel", "-cluster")
)


def named_directory(url: str, *, timeout: float = 1.0) -> Directory:
    """The directory at a URL as the tier `redis` takes it, not opened. Raises ConfigError."""
    if url.partition("://")[0] not in _SCHEMES:
        raise ConfigError(
            f"directory {masked(url)!r}: a directory is redis://, rediss://, redis-sentinel:// or "
            "redis-cluster://"
        )
    own = "@" in url or PASSWORD not in os.environ
    try:
        options = RedisOptions(url=url, password_env="" if own else PASSWORD)
    except ValueError as error:
        raise ConfigError(f"directory {masked(url)}: {error}") from None
    return RedisDirectory(options, timeout=timeout)
