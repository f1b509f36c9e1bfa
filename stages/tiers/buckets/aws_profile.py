"""Credentials out of AWS's profile files, read again when they are some minutes old.

The client itself looks into the environment and asks the machine it runs on (web identity,
container, instance); `~/.aws/credentials` and `~/.aws/config` it does not know. What is read here
is handed to it and kept nowhere; no message repeats a line of these files.
"""

from __future__ import annotations

import configparser
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

from tierloom.stages.errors import ConfigError
from tierloom.stages.user_home import expanded

_ELSEWHERE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
"""Where one of these is set, the client finds credentials by itself."""
_FRESH = timedelta(minutes=5)


class AwsProfile:
    """One profile's keys; called by the client whenever it needs them."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError when the profile is not there, or has no keys."""
        self.name = name
        self.region = _section(name).get("region", "")
        self()

    def __call__(self) -> dict[str, str | datetime | None]:
        """What the files say now. Raises ConfigError."""
        found = _section(self.name)
        try:
            return {
                "access_key_id": found["aws_access_key_id"],
                "secret_access_key": found["aws_secret_access_key"],
                "token": found.get("aws_session_token"),
                "expires_at": datetime.now(timezone.utc) + _FRESH,
            }
        except KeyError:
            raise ConfigError(
                f"the AWS profile {self.name!r} does not exist, or has no keys of its own: run "
                f"aws configure export-credentials --profile {self.name} --format env"
            ) from None

    def __repr__(self) -> str:
        return f"AwsProfile({self.name!r})"


def find_profile(name: str) -> AwsProfile | None:
    """The profile called `name`; without a name, the one in force, if any. Raises ConfigError."""
    if name:
        return AwsProfile(name)
    if any(os.environ.get(each) for each in _ELSEWHERE):
        return None
    if chosen := os.environ.get("AWS_PROFILE"):
        return AwsProfile(chosen)
    return AwsProfile("default") if "aws_access_key_id" in _section("default") else None


def _section(name: str) -> dict[str, str]:
    """What both files say of a profile, the credentials file last."""
    config = expanded(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config")
    keys = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    sections = (config, f"profile {name}"), (config, name), (expanded(keys), name)
    return {k: v for file, section in sections for k, v in _read(file, section).items()}


def _read(path: Path, section: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False, default_section="\0")
    try:
        parser.read(path)
    except (configparser.Error, OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not a valid file of AWS profiles") from None
    return dict(parser[section]) if section in parser else {}
