"""Secrets out of a file or an environment variable; no message repeats one."""

from __future__ import annotations

import os

from tierloom.stages.errors import ConfigError
from tierloom.stages.user_home import expanded


def secret_in_file(option: str, file: str) -> str:
    """What a file holds, without the end of its line. `option`: what named the file. Raises
    ConfigError."""
    try:
        secret = expanded(file).read_text("utf-8").strip("\r\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        cure = "write the secret into it"
        if isinstance(error, PermissionError):
            cure = f"let user {os.getuid()}, who runs this, read it"
        raise ConfigError(f"{option} {file}: {reason}; {cure}") from None
    if not secret:
        raise ConfigError(f"{option} {file} is empty: write the secret into it")
    return secret


def secret_in_env(option: str, name: str) -> str:
    """What an environment variable holds. Raises ConfigError."""
    secret = os.environ.get(name, "")
    if not secret:
        raise ConfigError(f"{option}: environment variable {name} is not set")
    return secret
