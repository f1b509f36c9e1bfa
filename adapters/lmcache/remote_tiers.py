"""LMCache's remote stores as tiers: one function for each of its URL schemes.

An option that a tier of ours does not have is left out and noted: so these tables may name more
than the tiers that are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tierloom.adapters.lmcache.options import Given
from tierloom.pipeline.config.problems import nearest
from tierloom.stages import catalog
from tierloom.stages.options import masked

GIB = 1 << 30
_CREDENTIALS = (
    "aws_access_key_id", "aws_secret_access_key", "azure_account_key", "azure_connection_string",
    "azure_sas_token", "password", "valkey_password",
)  # fmt: skip
"""Entries of `extra_config` that are never written anywhere."""


@dataclass(slots=True)
class Made:
    """A tier that was made, and what is to be said of it."""

    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, because: str = "") -> None:
        """An option, if the tier has it and it says anything."""
        if value is None or value == "":
            return
        if name in _options_of(str(self.options["use"])):
            self.options[name] = value
        else:
            said = str(value).lower() if isinstance(value, bool) else str(value)
            self.notes.append(masked(f"{because or name}: {said}") + "  (no option of the tier)")


def _options_of(tier: str) -> set[str]:
    """Options of a tier that is installed; none of another."""
    try:
        return {f.name for f in fields(catalog.load_class("tier", tier).Options)}
    except (KeyError, ImportError):
        return set()


def remote(url: str, given: Given) -> Made | str:
    """The tier that a URL names, or why there is none."""
    scheme, mark, rest = url.partition("://")
    make = _SCHEMES.get(scheme.lower()) if mark else None
    if make is None:
        return f"remote_url: no tier for {masked(url)}; {_hint(url)}"
    return make(scheme.lower(), rest, given)


def _hint(url: str) -> str:
    """What LMCache's user may have meant."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "file" or url.startswith(("/", "~")):
        return f"a folder is written 'fs://HOST/{(rest or url).lstrip('/')}'"
    if "://" not in url and scheme.lower() in _SCHEMES:
        return f"did you mean {scheme.lower() + '://' + rest.lstrip('/')!r}?"
    own = "a store of your own is one in ten lines: docs/extending.md"
    return f"{nearest(scheme.lower(), _SCHEMES)}; {own}"


def _redis(scheme: str, rest: str, given: Given) -> Made:
    """Redis, Valkey, sentinels, clusters. The password goes into a variable."""
    if other := given.take("redis_url"):
        scheme, _, rest = str(other).partition("://")
    who, _, place = rest.rpartition("@")
    user, _, secret = who.partition(":")
    prefix = "valkey_" if scheme == "valkey" else ""
    user = str(given.take(f"{prefix}username") or user)
    secret = str(given.take(f"{prefix}password") or secret)
    place = ",".join(part.strip() for part in place.split(","))
    if scheme in ("valkey", "resp"):
        cluster = str(given.take("valkey_mode", "")).lower() == "cluster" or "," in place
        tls = "rediss" if given.take("tls_enable") is True else "redis"
        scheme = f"{tls}-cluster" if cluster else tls
        database = given.take("valkey_database")
        if database and not cluster:
            place = f"{place.rstrip('/')}/{database}"
    if scheme.endswith("-sentinel") and "/" not in place.rstrip("/"):
        place = f"{place.rstrip('/')}/${{REDIS_SERVICE_NAME:-redismaster}}"
    url = f"{scheme}://{user}@{place}" if user and secret else f"{scheme}://{place}"
    made = Made({"use": "redis", "url": url.rstrip("/")})
    if secret:
        variable = "TIERLOOM_REDIS_PASSWORD"
        made.add("password_env", variable)
        made.notes.append(f"set {variable} to the password, which is not copied")
    if given.take("valkey_enable_ttl") is True or "valkey_ttl_sec" in given.extra:
        ttl = given.take("valkey_ttl_sec")
        made.add("ttl", f"{ttl} s" if ttl else None, "valkey_ttl_sec")
    return made


def _server(scheme: str, rest: str, given: Given) -> Made:
    url = f"tierloom://{rest}"
    note = f"run `tierloom serve` there instead of lmcache_server: its protocol was lm://{rest}"
    return Made({"use": "server", "url": url}, [note])


def _s3(scheme: str, rest: str, given: Given) -> Made | str:
    """`bucket.host` is a bucket at an endpoint; what is Amazon's own needs none."""
    host, _, path = rest.partition("/")
    name, _, port = host.partition(":")
    if name.replace(".", "").isdigit() or (port and "." not in name) or not name:
        return (
            f"remote_url: s3://{rest} names no bucket: LMCache's form is s3://BUCKET.HOST/PREFIX; "
            f"for a server at {host or 'HOST'} write the tier yourself: "
            f"{{use: s3, url: s3://BUCKET, endpoint: http://{host or 'HOST'}}}"
        )
    bucket, _, server = host.partition(".")
    prefix = path.strip("/") or str(given.take("s3_file_prefix") or "").strip("/")
    made = Made({"use": "s3", "url": f"s3://{bucket}/{prefix}".rstrip("/")})
    amazon = server.endswith("amazonaws.com") and "s3express" not in server
    if server and not amazon:
        made.add("endpoint", f"https://{host}", "a bucket at")
        made.add("path_style", value=False)
    region = given.take("s3_region")
    if amazon and not region:
        region = server.removesuffix(".amazonaws.com").removeprefix("s3.")
    made.add("region", region, "s3_region")
    return made


def _azure(scheme: str, rest: str, given: Given) -> Made:
    made = Made({"use": "s3", "url": f"az://{rest}".rstrip("/")})
    account = urlsplit(str(given.take("azure_account_url") or "")).hostname or ""
    if account:
        made.notes.append(f"set AZURE_STORAGE_ACCOUNT_NAME to {account.partition('.')[0]}")
    return made


def _mooncake(scheme: str, rest: str, given: Given) -> Made:
    made = Made({"use": "mooncake", "url": f"mooncakestore://{rest}".rstrip("/")})
    for name, option in (
        ("local_hostname", "host"), ("metadata_server", "metadata"), ("protocol", "protocol"),
        ("device_name", "device"), ("global_segment_size", "segment"),
        ("local_buffer_size", "buffer"),
    ):  # fmt: skip
        made.add(option, given.take(name), name)
    master = given.take("master_server_address")
    if master and str(master) not in rest:
        made.notes.append(f"the master is the one of remote_url, not {master}")
    if limit := given.take("transfer_timeout"):
        made.add("deadline", f"{limit} s", "transfer_timeout")
    return made


def _infinistore(scheme: str, rest: str, given: Given) -> Made:
    made = Made({"use": "infinistore", "url": f"infinistore://{rest}"})
    made.add("link_type", given.take("infinistore_link_type"), "infinistore_link_type")
    return made


def _files(scheme: str, rest: str, given: Given) -> Made:
    """`fs://[host:port]/path[,path]`: host and port mean nothing."""
    path = rest if rest.startswith(("/", "~")) else f"/{rest.partition('/')[2]}"
    return folder_tier(path)


def folder_tier(paths: str) -> Made:
    """Comma-separated folders; the first is used."""
    first, *others = [p.strip() for p in paths.split(",")]
    made = Made({"use": "files", "path": first})
    made.notes += [f"objects are not spread over {path}, too" for path in others]
    return made


def _hf3fs(scheme: str, rest: str, given: Given) -> Made:
    mount, base = given.take("hf3fs_mount_point"), given.take("hf3fs_base_path")
    made = folder_tier(str(base or mount or f"/{rest.partition('/')[2]}"))
    made.notes.append("3FS is used as the file system that it is mounted as")
    return made


def _mock(scheme: str, rest: str, given: Given) -> Made:
    """`mock://GB/?peeking_latency=MS&read_throughput=GB_S&write_throughput=GB_S`."""
    size, _, query = rest.partition("?")
    said = {name: values[-1] for name, values in parse_qs(query).items()}
    made = Made({"use": "mock"})
    made.add("capacity", size_of(float(size.strip("/") or 1)))
    if latency := said.get("peeking_latency"):
        made.add("latency", f"{latency} ms")
    speeds = {float(s) for n in ("read_throughput", "write_throughput") if (s := said.get(n))}
    if speeds:
        made.add("bandwidth", size_of(min(speeds)))
    if len(speeds) > 1:
        made.notes.append("reads and writes share one line; the slower figure is its bandwidth")
    return made


def _audit(scheme: str, rest: str, given: Given) -> Made | str:
    url = given.take("audit_actual_remote_url") or given.get("audit_actual_remote_url")
    if not url:
        return "audit:// without audit_actual_remote_url"
    inner = remote(str(url), given)
    if isinstance(inner, str):
        return inner
    for name in ("audit_calc_checksum", "audit_verify_checksum"):
        given.take(name)
    return Made({"use": "audit", "of": inner.options}, inner.notes)


def _blackhole(scheme: str, rest: str, given: Given) -> Made:
    return Made({"use": "blackhole"})


_SCHEMES: dict[str, Callable[[str, str, Given], Made | str]] = {
    "audit": _audit, "azure": _azure, "blackhole": _blackhole, "fs": _files, "hf3fs": _hf3fs,
    "infinistore": _infinistore, "lm": _server, "mock": _mock, "mooncakestore": _mooncake,
    "redis": _redis, "redis-cluster": _redis, "redis-sentinel": _redis, "rediss": _redis,
    "resp": _redis, "s3": _s3, "unix": _redis, "valkey": _redis,
}  # fmt: skip


def plugins(names: list[str], given: Given) -> list[tuple[str, Made | str]]:
    """The tiers of `remote_storage_plugins`: `fs` and `fs.NAME` are built in."""
    made: list[tuple[str, Made | str]] = []
    for name in names:
        base = given.take(f"remote_storage_plugin.{name}.base_path") or given.take("fs_base_path")
        if name.partition(".")[0] == "fs" and base:
            made.append((name, folder_tier(str(base))))
        else:
            made.append((name, f"no tier for the plug-in {name!r}: docs/extending.md writes one"))
    return made


def nixl(given: Given) -> Made:
    """NIXL as a store: the entries of `extra_config` that switch it on and say where."""
    given.take("enable_nixl_storage")
    backend = str(given.take("nixl_backend") or "POSIX").upper()
    made = Made({"use": "nixl", "backend": backend})
    params = dict(given.take("nixl_backend_params") or {})
    path = given.take("nixl_path")
    if backend in ("OBJ", "AZURE_BLOB"):
        scheme, name = ("s3", "bucket") if backend == "OBJ" else ("az", "container_name")
        made.options["url"] = f"{scheme}://{params.pop(name, name)}"
        endpoints = [params.pop("endpoint_override", None), *given.take("nixl_endpoint_list", [])]
        made.add("endpoint", next(filter(None, endpoints), None), "endpoint_override")
        made.add("region", params.pop("region", None))
    else:
        made.options["path"] = path
        made.add("direct", given.take("use_direct_io"), "use_direct_io")
        if str(params.pop("use_uring", "")).lower() == "true":
            made.add("io", "uring", "use_uring")
    if pool := given.take("nixl_pool_size"):
        made.notes.append(f"objects have files of their own, not a pool of {pool}")
    for name in [n for n in params if masked(f"{n}: x") != f"{n}: x"]:
        del params[name]
        made.notes.append(f"{name} is not copied: credentials come from the environment")
    made.notes += [masked(f"{name}: {value}  (no counterpart)") for name, value in params.items()]
    return made


def forget_credentials(given: Given) -> list[str]:
    """Take out what must not be printed; the notes that say so."""
    named = [name for name in _CREDENTIALS if given.take(name) is not None]
    return [f"{name} is not copied: credentials come from the environment" for name in named]


def size_of(gigabytes: float) -> str:
    """LMCache's gigabytes, which are GiB, with a unit of ours."""
    nbytes = int(gigabytes * GIB)
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if nbytes % size == 0:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"
