"""What an SGLang user may set, in the backend's extra config beside SGLang's own keys.

    --hicache-storage-backend-extra-config '{"backend_name": "tierloom",
        "module_path": "tierloom.adapters.sglang.hicache", "class_name": "TierloomHiCache",
        "interface_v1": 1, "hicache_storage_pass_prefix_keys": true,
        "tierloom.config": "tiered", "tiers.hot.capacity": "64 GiB"}'

Keys are spelled as in vLLM (`engine/extra_config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tierloom.adapters.engine.extra_config import ExtraConfig, read_extra_config
from tierloom.adapters.engine.http_option import http_address
from tierloom.stages.errors import ConfigError
from tierloom.stages.options import Seconds

HICACHE = "hicache_storage_backend_extra_config"
LINKER = "linker_extra_config"
_SGLANGS = {"backend_name", "class_name", "interface_v1", "module_path"}
"""Keys of the extra config that SGLang reads itself, and leaves in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The adapter's options."""

    min_tokens: int = 0
    """Loads of fewer tokens than this are not worth it."""
    wait: Seconds = 0.25
    """How long a question may take that only tiers without an index here can answer."""
    tags: dict[str, str] = field(default_factory=dict)
    """Names that keep the KV of this engine apart from that of others."""
    reset: Literal["local", "all", "none"] = "local"
    """What clearing the storage deletes: `local`, what only this engine has; `all`, what
    others can read as well; `none`."""
    name: str = ""
    """A name for the model in keys, besides the content id of its weights."""
    weights: str = ""
    """Content id of the weights, instead of one made from the files."""
    http: str = ""
    """Health, metrics and figures of the first rank over HTTP: `127.0.0.1:0`, a free port that the
    log tells, `HOST:PORT` or `https://HOST:PORT`. Token and certificate are those of the pipeline's
    `serve`; other hosts are let in only with a token. Empty: nowhere."""

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must not be negative, got {self.min_tokens}")
        if self.http:
            http_address(self.http)


def hicache_config(extra: Mapping[str, Any] | None) -> ExtraConfig[Settings]:
    """Read the extra config of a HiCache storage backend. Raises ConfigError, also where SGLang
    would copy each page through a tensor of its own."""
    given = dict(extra or {})
    if not given.get("interface_v1"):
        raise ConfigError(
            f'{HICACHE}: "interface_v1" is missing, without which SGLang copies every page once '
            'more: add "interface_v1": 1 (`tierloom sglang` prints the whole command)'
        )
    ours = {k: v for k, v in given.items() if k not in _SGLANGS}
    return read_extra_config(ours, Settings, HICACHE)


def linker_config(extra: Mapping[str, Any] | None) -> ExtraConfig[Settings]:
    """Read the `linker_extra_config` of an external cache linker. Raises ConfigError."""
    return read_extra_config(dict(extra or {}), Settings, LINKER)


def any_grain(conf: ExtraConfig[Settings]) -> dict[str, Any]:
    """The user's overrides, as long as SGLang's page size is not known."""
    return {**conf.overrides, "chunk.grain": 1}


def chunked(conf: ExtraConfig[Settings], page: int, *, chunk: int | None = None) -> dict[str, Any]:
    """The user's overrides, with SGLang's page as the grain and chunks of whole pages: of `chunk`
    tokens, or as the pipeline says. Raises ConfigError."""
    if page < 2:
        raise ConfigError(
            f"SGLang's page size is {page}, and each page would be an object: start it with "
            "--page-size 32 or more"
        )
    ours = {"chunk.grain": page, "chunk.keys": "sglang"}
    if chunk is not None:
        return patient(conf) | conf.overrides | ours | {"chunk.tokens": chunk}
    said = conf.pipeline(any_grain(conf))
    if said.chunk.tokens % page:
        fits = max(page, said.chunk.tokens // page * page)
        raise ConfigError(
            f"{conf.where}: SGLang's page of {page} tokens does not divide chunk.tokens "
            f"{said.chunk.tokens}: set chunk.tokens to {fits}, or --page-size to a divisor"
        )
    return patient(conf) | conf.overrides | ours


def patient(conf: ExtraConfig[Settings]) -> dict[str, Any]:
    """A longer deadline than a preset's: SGLang reads ahead, and up to 128 pages at once. A file
    of the user's says its own."""
    preset = isinstance(conf.source, str) and "." not in conf.source
    return {"graphs.retrieve.deadline": "5 s"} if preset else {}
