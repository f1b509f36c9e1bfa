"""Asking a door: what commands and the controller do."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from tierloom.stages.errors import ConfigError, TierDown

_MOST = 64 << 20
"""Bytes of an answer, at most."""


class DoorClient:
    """No proxy of the environment is asked. Any thread."""

    def __init__(
        self, url: str, token: bytes = b"", *, ca_file: str = "", timeout: float = 600.0
    ) -> None:
        """`url`: `http://HOST:PORT` or `https://HOST:PORT`. Raises ConfigError."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"door {url!r}: write http://HOST:PORT")
        self._url, self._timeout = url.rstrip("/"), timeout
        self._headers = {"content-type": "application/json"}
        if token:
            self._headers["authorization"] = f"Bearer {token.decode()}"
        how: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if url.startswith("https://"):
            context = ssl.create_default_context(cafile=ca_file or None)
            how.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*how)

    def call(
        self, path: str, body: Mapping[str, Any] | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and answer: of GET, or POST where there is a body. Raises TierDown where there is
        none."""
        raw = json.dumps(body).encode() if body is not None else None
        asked = urllib.request.Request(self._url + path, raw, self._headers | headers)
        try:
            try:
                with self._opener.open(asked, timeout=self._timeout) as answer:
                    return answer.status, json.loads(answer.read(_MOST))
            except urllib.error.HTTPError as refused:
                with refused:
                    return refused.code, json.loads(refused.read(_MOST))
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or error
            raise TierDown(f"no answer from {self._url}{path}: {why}") from None
