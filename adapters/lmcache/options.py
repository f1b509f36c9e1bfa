"""What an LMCache user has written, in a file or in LMCACHE_* variables, as typed values.

Read as LMCache 0.5.6 reads it: a file, then the environment on top; only `true` and `1` are true.
What cannot be read, or is not an option of LMCache, is noted and left out; only a file that is not
YAML is fatal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from tierloom.adapters.lmcache.values import (
    read_count,
    read_flag,
    read_folders,
    read_number,
    read_policy,
    read_ports,
    read_share,
    read_table,
    read_whole,
    read_words,
)
from tierloom.stages.errors import ConfigError
from tierloom.stages.user_home import expanded

PREFIX = "LMCACHE_"
_SURE = 0.8
"""How much a name must be like an option's to be taken for a mistake: LMCache reads variables that
are no options, too."""

P2P = "without enable_p2p nothing is shared"
PD = "without enable_pd nothing is handed over"
ASKED = "a decoder asks for what there is, and waits `handoff.wait`; nothing is allocated ahead"
CONTROLLER = "the controller: there is none yet; a directory tells engines what others have"
HIDDEN = "hidden states are not kept"
API = "a running engine has no port of its own; metrics are in the engine's own /metrics"
PLUGIN = "a store of your own is a tier in ten lines: docs/extending.md"
STATISTICS = "`tierloom` counts hits by tier; there is no chunk statistic"
MEMORY = "memory is taken as it is used, in huge pages where there are any"
LOOKUP = "each tier answers for itself"
PINS = "what is being read is held until it is read, without a time limit"
REMOTE = "configuration is read from files, not from a service"

TOGGLES = {CONTROLLER: "enable_controller", HIDDEN: "enable_hidden_state_cache"}
"""The option that switches on what has no counterpart."""

ALIASES = {
    "controller_url": "controller_pull_url", "cufile_buffer_size": "gds_buffer_size",
    "enable_nixl": "enable_pd", "enable_xpyd": "enable_pd", "external_backends": "storage_plugins",
    "lmcache_worker_port": "lmcache_worker_ports", "nixl_peer_alloc_port": "pd_peer_alloc_port",
    "nixl_peer_host": "pd_peer_host", "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_proxy_host": "pd_proxy_host", "nixl_proxy_port": "pd_proxy_port", "nixl_role": "pd_role",
    "peer_init_ports": "p2p_init_ports", "peer_lookup_ports": "p2p_lookup_ports",
    "plugin_locations": "runtime_plugin_locations", "weka_path": "gds_path",
}  # fmt: skip
"""Names of former versions."""


CONVERTED: dict[str, Callable[[Any], Any]] = {
    "blend_min_tokens": read_whole, "blend_recompute_ratios": read_share,
    "blocking_timeout_secs": read_number, "cache_policy": read_policy, "chunk_size": read_count,
    "enable_async_loading": read_flag, "enable_blending": read_flag, "enable_p2p": read_flag,
    "enable_pd": read_flag, "lmcache_instance_id": str, "pd_bidirectional": read_flag,
    "pd_buffer_size": read_whole, "pd_peer_alloc_port": read_ports, "pd_peer_host": str,
    "pd_peer_init_port": read_ports, "pd_proxy_host": str, "pd_proxy_port": read_ports,
    "pd_role": str, "p2p_host": str, "p2p_init_ports": read_ports, "p2p_lookup_ports": read_ports,
    "transfer_channel": str, "extra_config": read_table, "gds_path": read_folders,
    "local_cpu": read_flag, "local_disk": read_folders, "lookup_timeout_ms": read_whole,
    "max_local_cpu_size": read_number, "max_local_disk_size": read_number,
    "min_retrieve_tokens": read_whole, "audit_actual_remote_url": str, "remote_serde": str,
    "remote_storage_plugins": read_words, "remote_url": str, "retrieve_locations": read_words,
    "save_decode_cache": read_flag, "save_unfull_chunk": read_flag, "store_location": str,
    "use_layerwise": read_flag,
}  # fmt: skip
"""How each option that has a counterpart is read."""

P2P_ALONE = (
    "p2p_host", "p2p_init_ports", "p2p_lookup_ports", "transfer_channel", "lmcache_instance_id",
)  # fmt: skip
"""What says something only where engines share."""

PD_ALONE = (
    "pd_role", "pd_bidirectional", "pd_buffer_size", "pd_peer_host", "pd_peer_init_port",
    "pd_peer_alloc_port", "pd_proxy_host", "pd_proxy_port",
)  # fmt: skip
"""What says something only where prompts are handed over."""

OTHERS = {
    ASKED: (
        "pd_buffer_device pd_peer_query_port pd_max_prefill_len"
        " pd_allocation_timeout_sec pd_shutdown_timeout_sec pd_condition_poll_interval_sec"
        " pd_backend_mode pd_skip_proxy_notification pd_retrieve_locations pd_store_location"
        " nixl_backends"
    ),
    "text is found at every offset, without a separator": "blend_special_str",
    "what is computed is chosen by `probe`, which has a share and no other bound": (
        "blend_thresholds blend_check_layers"
    ),
    CONTROLLER: (
        "enable_controller controller_pull_url controller_reply_url"
        " lmcache_worker_ports lmcache_worker_ids lmcache_worker_heartbeat_delay_time"
        " lmcache_worker_heartbeat_time"
    ),
    HIDDEN: (
        "enable_hidden_state_cache max_hidden_state_cpu_size hidden_state_layers"
        " hidden_states_retrieve_mode"
    ),
    API: (
        "internal_api_server_enabled internal_api_server_host internal_api_server_port_start"
        " internal_api_server_include_index_list internal_api_server_socket_path_prefix"
        " script_allowed_imports run_script_api_enabled runtime_plugin_locations"
    ),
    PLUGIN: "storage_plugins",
    STATISTICS: (
        "enable_chunk_statistics chunk_statistics_auto_start_statistics"
        " chunk_statistics_auto_exit_timeout_hours"
        " chunk_statistics_auto_exit_target_unique_chunks chunk_statistics_strategy"
    ),
    MEMORY: (
        "local_cpu_use_hugepages reserve_local_cpu_size numa_mode enable_lazy_memory_allocator"
        " lazy_memory_initial_ratio lazy_memory_expand_trigger_ratio lazy_memory_step_ratio"
        " lazy_memory_safe_size"
    ),
    LOOKUP: (
        "external_lookup_client lookup_server_worker_ids enable_scheduler_bypass_lookup"
        " hit_miss_ratio"
    ),
    PINS: "pin_timeout_sec pin_check_interval_sec",
    REMOTE: "remote_config_url app_id",
    "names are SHA-256 of the tokens, the same in every process": "pre_caching_hash_algorithm",
    "several folders are not shared out; name one file system": (
        "local_disk_path_sharding gds_path_sharding"
    ),
    "transfers go through the arena, which `budget` sizes": (
        "gds_buffer_size nixl_buffer_size nixl_buffer_device"
    ),
    "files are read through the arena": "use_gds gds_backend",
    "there is no tier for it": "maru_path maru_pool_size",
    "`tierloom serve` is reached by a tier: tierloom://HOST:PORT": "mp_host mp_port",
    "Python's collector is left alone": "py_enable_gc",
    'one request may say: "kv_transfer_params": {"tierloom.skip_save": true}': "priority_limit",
    "KV events are switched on in vLLM: --kv-events-config": "enable_kv_events",
    "the layout is found by a self-test": "use_gpu_connector_v3",
    "there is no such policy": "cost_aware_half_life_seconds cost_aware_ewma_alpha",
}
"""Options without a counterpart, by the reason."""

REASONS = {name: reason for reason, names in OTHERS.items() for name in names.split()}
UNKNOWN = "no option of LMCache's"


def is_lmcache(path: Path) -> bool:
    """Whether a file is a configuration of LMCache's."""
    try:
        names = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(names, dict) or names.keys() & {"version", "extends", "tiers", "graphs"}:
        return False
    return any(ALIASES.get(str(n), str(n)) in {*CONVERTED, *REASONS} for n in names)


def unknown(name: str) -> str:
    """What is said of an option that nobody knows."""
    close = get_close_matches(name, {*CONVERTED, *REASONS, *ALIASES}, n=1)
    return f"{UNKNOWN}; did you mean {close[0]!r}?" if close else UNKNOWN


class Given:
    """Options by name. Each is taken once; what nobody took is told in the end."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.source = source
        self.raw = {ALIASES.get(name, name): value for name, value in raw.items()}
        self.bad: dict[str, str] = {}
        """Options that could not be read, and why."""
        self._values: dict[str, Any] = {}
        self._forgone: dict[str, str] = {}
        for name, value in self.raw.items():
            if name in CONVERTED and value is not None:
                try:
                    self._values[name] = CONVERTED[name](value)
                except (ValueError, TypeError, yaml.YAMLError) as error:
                    self.bad[name] = " ".join(str(error).split())
        self.extra: dict[str, Any] = self._values.get("extra_config") or {}
        """`extra_config`, less what was taken."""

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def says(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, default: Any = None) -> Any:
        """An entry of `extra_config`."""
        return self.extra.pop(name, default)

    def forgo_unused(self) -> None:
        """What belongs to a feature that is off says nothing: it is listed as not converted."""
        p2p, pd = self.get("enable_p2p", False), self.get("enable_pd", False)
        unused = {name: P2P for name in P2P_ALONE if not p2p}
        unused |= {name: PD for name in PD_ALONE if not pd}
        if pd:  # it is their channel, too
            unused.pop("transfer_channel", None)
        for name, because in unused.items():
            if self._values.pop(name, None) is not None:
                self._forgone[name] = because

    def switched_on(self) -> list[str]:
        """Reasons of the features that are asked for and have no counterpart."""
        on = ("true", "1")
        return [r for r, name in TOGGLES.items() if str(self.raw.get(name)).lower() in on]

    def left(self) -> list[tuple[str, Any, str]]:
        """Name, value and reason of every option that has no counterpart."""
        whys = REASONS | self._forgone | self.bad
        rows = [
            (name, value, whys.get(name) or unknown(name))
            for name, value in self.raw.items()
            if name not in self._values and not (name in CONVERTED and value is None)
        ]
        no = "no counterpart"
        return rows + [(f"extra_config.{n}", v, no) for n, v in self.extra.items()]


def from_file(path: Path, environ: Mapping[str, str] | None = None) -> Given:
    """A YAML or JSON file, and variables on top of it. Raises ConfigError, OSError."""
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: an LMCache configuration is a mapping of options")
    return Given({str(k): v for k, v in raw.items()} | _variables(environ or {}), str(path))


def from_environment(environ: Mapping[str, str]) -> Given:
    """What LMCache itself would read there: the file that LMCACHE_CONFIG_FILE names, and
    variables. Raises ConfigError, OSError."""
    if named := environ.get(f"{PREFIX}CONFIG_FILE"):
        return from_file(expanded(named), environ)
    if raw := _variables(environ):
        return Given(raw, f"{PREFIX}* of the environment")
    hint = "name a file: tierloom import-lmcache FILE"
    raise ConfigError(f"no {PREFIX}* variable sets an option of LMCache's; {hint}")


def _variables(environ: Mapping[str, str]) -> dict[str, Any]:
    """Variables that are options, or nearly so, by name; lists of numbers stay text."""
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        name = variable.removeprefix(PREFIX).lower()
        name = ALIASES.get(name, name)
        known = {*CONVERTED, *REASONS}
        if variable.startswith(PREFIX) and (
            name in known or get_close_matches(name, known, n=1, cutoff=_SURE)
        ):
            found[name] = _unquoted(text)
    return found


def _unquoted(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text[1:-1]
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else text
