"""What a vLLM user may set: the connector's own options, and the pipeline's, in one mapping.

    "kv_connector_extra_config": {"tierloom.config": "tiered", "tierloom.load": "layer",
                                  "tiers.warm.path": "/data/kv"}

Keys that begin with `tierloom.` are the fields of `Settings`; every other key is the dotted path of
one value of the pipeline's configuration. vLLM makes mappings of its own dotted flags
(`--kv-transfer-config.kv_connector_extra_config.tierloom.load layer`): they mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tierloom.adapters.engine.extra_config import (
    PREFIX,
    ExtraConfig,
    own_options,
    read_extra_config,
    set_twice,
)
from tierloom.adapters.engine.http_option import http_address
from tierloom.adapters.engine.pipeline_parts import lookup_node
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.stages.errors import ConfigError
from tierloom.stages.options import Seconds

WHERE = "kv_connector_extra_config"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The connector's options."""

    load: Literal["async", "layer"] = "async"
    """`async`: a request waits for its load while others are computed; `layer`: its load runs ahead
    of its own computation, layer by layer."""
    save: Literal["auto", "layer", "step"] = "auto"
    """`layer`: after each layer, on a separate stream; `step`: all at once after the step; `auto`:
    by layer on a GPU and where `kv_role` is `kv_producer`, else by step."""
    save_decode: bool = False
    """Store what is generated too, so that the next turn of a chat hits all of this one."""
    keys: Literal["own", "engine", "sglang"] = "own"
    """`own`: keys that vLLM and transformers share; `engine`: from vLLM's block hashes, so that no
    token is hashed twice, and only vLLM engines share; `sglang`: SGLang's page hashes, to share
    with it as well (`chunk.grain` must be its page size)."""
    min_tokens: int = 0
    """Loads of fewer tokens than this are not worth it."""
    wait: Seconds = 0.25
    """How long a request may wait to learn what is stored of it."""
    hold: Seconds = 0.5
    """How long a finished request's blocks may be held until they are saved."""
    failure: Literal["recompute", "keep"] = "recompute"
    """`recompute`: what cannot be loaded is computed, whatever `kv_load_failure_policy` says;
    `keep`: that policy applies, and its default fails the request."""
    reset: Literal["local", "all", "none"] = "local"
    """What vLLM's resets (`/reset_prefix_cache?reset_external=true`, `/pause`, `/sleep?level=1`)
    delete: `local`, what only this engine has; `all`, also tiers that others share; `none`."""
    blend: Literal["off", "ask", "on"] = "off"
    """Reuse text that was captured elsewhere, approximately: `ask`: for requests that say
    `tierloom.blend: true`; `on`: for all that do not say false. Wants a pipeline that finds text
    anywhere, such as `tierloom.config: blend`."""
    name: str = ""
    """A name for the model in keys, besides the content id of its weights."""
    weights: str = ""
    """Content id of the weights, instead of one made from the files."""
    http: str = ""
    """Health, metrics and figures of the engine over HTTP: `127.0.0.1:0`, a free port that the log
    tells, `HOST:PORT` or `https://HOST:PORT`. Token and certificate are those of the pipeline's
    `serve`; other hosts are let in only with a token. Empty: nowhere."""
    trace: bool = False
    """Record how long each hook of the scheduler's thread takes."""

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must not be negative, got {self.min_tokens}")
        if self.http:
            http_address(self.http)
        if self.blend != "off" and self.load == "layer":
            raise ValueError(f"blend: {self.blend} wants load: async: tokens are computed in steps")

    def saves_by_layer(self, device: str) -> bool:
        """Whether KV on `device` is saved by layer."""
        return self.save == "layer" or (self.save == "auto" and device != "cpu")


class Configured(ExtraConfig[Settings]):
    """What `kv_connector_extra_config` means."""

    def of_role(self, role: str) -> Configured:
        """The same for a `kv_role`: what is computed for others goes out layer by layer."""
        if role != "kv_producer" or self.settings.save != "auto" or not self.hands_over:
            return self
        by_layer = replace(self.settings, save="layer")
        return Configured(by_layer, self.source, self.where, self.overrides)

    @property
    def hands_over(self) -> bool:
        """Requests may be computed at one engine and answered at another."""
        spec = self.pipeline()
        return spec.serve is not None or spec.handoff is not None

    def pipeline(self, overrides: Mapping[str, Any] | None = None) -> PipelineSpec:
        spec = super().pipeline(overrides)
        keys = self.settings.keys
        if keys != "own" and (keys == "sglang") != (spec.chunk.keys == "sglang"):
            raise ConfigError(
                f"{WHERE}: tierloom.keys: {keys} and chunk.keys: {spec.chunk.keys} contradict each "
                "other: `engine` names KV by vLLM's block hashes, `sglang` by SGLang's page hashes;"
                " set tierloom.keys alone"
            )
        plan = lookup_node(spec)
        if self.settings.blend != "off" and (plan is None or plan.options.want != "anywhere"):
            raise ConfigError(
                f"{WHERE}: tierloom.blend: {self.settings.blend}, but {spec.source} finds no text "
                "anywhere: set tierloom.config: blend, or `want: anywhere` in its retrieve graph "
                "and `by: content` in its store graph"
            )
        return spec


def configured(extra: Mapping[str, Any]) -> Configured:
    """Read `kv_connector_extra_config`. Raises ConfigError with every problem of our own keys."""
    said = read_extra_config(extra, Settings, WHERE)
    overrides = {"graphs.retrieve.pace.by": "layer"} if said.settings.load == "layer" else {}
    overrides |= {"chunk.keys": "sglang"} if said.settings.keys == "sglang" else {}
    return Configured(said.settings, said.source, WHERE, overrides | said.overrides)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """Options of one request, in its `kv_transfer_params`."""

    skip_save: bool = False
    skip_load: bool = False
    tags: tuple[tuple[str, str], ...] = ()
    """Names that separate its KV from that of other requests."""
    max_tokens: int | None = None
    """Tokens of it that may be loaded and saved."""
    blend: bool | None = None
    """Text that was captured elsewhere will do for it; None: as the server says."""


def request_options(params: Mapping[str, Any] | None) -> RequestOptions:
    """Read a request's options. Raises ValueError, naming the one that cannot be used."""
    own = own_options(params) if params else {}
    if not own:
        return RequestOptions()
    assert params is not None
    if twice := set_twice(params):
        raise ValueError(f"{', '.join(twice)}: set twice")
    known = {"skip_save", "skip_load", "tags", "max_tokens", "blend"}
    if unknown := own.keys() - known:
        said, ours = (", ".join(f"{PREFIX}{n}" for n in sorted(s)) for s in (unknown, known))
        raise ValueError(f"unknown {said}; known: {ours}")
    tags, most = own.get("tags") or {}, own.get("max_tokens")
    skip_save, skip_load = own.get("skip_save", False), own.get("skip_load", False)
    blend = own.get("blend")
    for name, value, kind, wants in (
        ("tags", tags, dict, "a mapping"),
        ("skip_save", skip_save, bool, "true or false"),
        ("skip_load", skip_load, bool, "true or false"),
        ("max_tokens", 0 if most is None else most, int, "a whole number"),
        ("blend", blend is not None and blend, bool, "true or false"),
    ):
        if type(value) is not kind:
            raise ValueError(f"{PREFIX}{name} wants {wants}, got {value!r}")
    if most is not None and most < 0:
        raise ValueError(f"{PREFIX}max_tokens must not be negative, got {most}")
    pairs = tuple(sorted((str(k), str(v)) for k, v in tags.items()))
    return RequestOptions(
        skip_save=skip_save, skip_load=skip_load, tags=pairs, max_tokens=most, blend=blend
    )
