"""A bucket by obstore: names, sizes and bytes; errors without secrets.

The client's own messages are not passed on: they repeat what a server answered, which may carry an
account's id or a signed address. Every request belongs to the call that awaits it and ends with it;
memory that a request still sends stays leased until the client has released it (`transfers`).
"""

from __future__ import annotations

import ctypes
import os
import re
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

from tierloom.stages.errors import ConfigError, Damaged, Lost, MissingPackage, Refused, TierDown
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Lease
from tierloom.stages.memory.held import Transfers, held
from tierloom.stages.options import Size
from tierloom.stages.tiers.buckets.aws_profile import find_profile

_SCHEMES = ("s3", "gs", "az", "file")
_IDLE = "15s"  # how long a connection is kept unused; those to a host that is gone must not pile up
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist")
_ANSWER = re.compile(r"(?<=status code: )\d{3} [A-Za-z ]+|(?<=<Code>)\w+|(?<=HTTP error: )[\w ]+")
_REGION = re.compile(r"without LOCATION|PermanentRedirect|AuthorizationHeaderMalformed")
_MEANS = {"NotPartial": "it answers a range with the whole object"}
"""What the client's own words say."""
_NEEDS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and its key",
    "file": "choose a folder with write permission",
}
_LEAST = 64 * PAGE  # the longest header: the first part has the whole of it


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Options:
    """Options of a bucket. Credentials are not among them: see `configs/s3.yaml`."""

    url: str
    """`s3://bucket/prefix`, `gs://...`, `az://container/prefix`, `file:///folder`."""
    endpoint: str = ""
    """Server to use instead of the cloud's, as in `http://127.0.0.1:9000` (s3, az)."""
    region: str = ""
    """The bucket's region. Default: from the environment or the profile."""
    profile: str = ""
    """A profile of `~/.aws`. Default: environment, profile `default`, the machine's role."""
    path_style: bool = True
    """`endpoint/bucket/key`; false: `bucket.endpoint/key`, and `endpoint` includes the bucket."""
    unsigned: bool | Literal["auto"] = "auto"
    """Send objects without hashing them for the signature (0.2 instead of 0.8 s of CPU per GB);
    auto: over TLS. Every object carries its own checksums either way."""
    if_absent: bool = True
    """Let the bucket refuse objects that exist; false: ask first, for servers without
    If-None-Match."""
    retries: int = 2
    """Retries of a request, within `timeout`."""
    part: Size = 4 << 20
    """Bytes of one ranged read."""
    ranges: int = 4
    """Most parts of one object that are read at once."""
    depth: int = 4
    """Most objects of one call that are read or written at once."""
    requests: int = 8
    """Most parts that are read at once in all; each needs memory outside the arena."""

    def __post_init__(self) -> None:
        try:
            parts, base = urlsplit(self.url), urlsplit(self.endpoint)
        except ValueError:
            raise ValueError("url or endpoint is not a valid URL") from None
        if parts.scheme not in _SCHEMES:
            raise ValueError(f"url must begin with one of {', '.join(s + '://' for s in _SCHEMES)}")
        if any("@" in each.netloc or each.query for each in (parts, base)):
            raise ValueError("url and endpoint must not contain credentials or a query")
        if parts.scheme in ("s3", "gs", "az") and not parts.netloc:
            raise ValueError("url names no bucket: write s3://bucket/prefix")
        if self.endpoint and (base.scheme not in ("http", "https") or not base.netloc):
            raise ValueError("endpoint must begin with http:// or https://")
        if self.endpoint and parts.scheme not in ("s3", "az"):
            raise ValueError(f"endpoint is not supported for {parts.scheme}://")
        if self.unsigned not in (True, False, "auto"):
            raise ValueError(f"unsigned is {self.unsigned!r}; known: true, false, auto")
        if self.part < _LEAST or self.part % PAGE:
            raise ValueError(f"part must be a multiple of {PAGE}, and at least {_LEAST}")
        if min(self.ranges, self.depth, self.requests) < 1 or self.retries < 0:
            raise ValueError("ranges, depth and requests must be at least 1, retries at least 0")


class Bucket:
    """The objects of one folder in a bucket. `open()` comes first."""

    def __init__(self, options: S3Options, folder: str) -> None:
        self._options, self._url, self._folder = options, options.url, folder
        self.transfers = Transfers()
        """What the client still sends for callers that were cancelled."""
        self._obs: Any = None
        self._store: Any = None

    async def open(self) -> None:
        """Raises ConfigError (no client, no bucket, no right), TierDown."""
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise MissingPackage(f"{self._url}: the client obstore", "s3") from None
        self._obs = obstore
        try:
            self._store = from_url(self._url, **self._settings())
        except obstore.exceptions.BaseError as error:
            cure = _NEEDS[self._url.partition(":")[0]]
            raise ConfigError(
                f"{self._url}: the client rejects it ({_answer(error)}); {cure}"
            ) from None
        await self._look()

    async def size(self, name: str) -> int | None:
        """Bytes of an object; None when it is not there. Raises TierDown."""
        try:
            return int((await self._obs.head_async(self._store, self._path(name)))["size"])
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._down("HEAD", error) from None

    async def get(self, name: str, stop: int) -> tuple[memoryview, int]:
        """Bytes up to `stop`, or to the object's end, and how long it is. Raises
        FileNotFoundError, Damaged (it is empty), TierDown (also when fewer bytes came)."""
        try:
            got = await self._obs.get_async(
                self._store, self._path(name), options={"range": (0, stop)}
            )
            view, size = memoryview(await got.bytes_async()), int(got.meta["size"])
        except FileNotFoundError:
            raise
        except Exception as error:
            raise await self._judged(name, 0, error) from None
        if len(view) != min(stop, size):
            raise TierDown(f"{self._url}: {len(view)} bytes came, expected {stop} of {size}")
        return view, size

    async def get_range(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop`, all of them; cheaper than `get`. Raises FileNotFoundError (also
        when it has not as many any more), Damaged, TierDown."""
        try:
            got = await self._obs.get_range_async(
                self._store, self._path(name), start=start, end=stop
            )
        except FileNotFoundError:
            raise
        except Exception as error:
            raise await self._judged(name, start, error) from None
        if len(got) != stop - start:
            raise FileNotFoundError(name)
        return memoryview(got)

    async def put(self, name: str, lease: Lease, nbytes: int) -> bool:
        """The lease's first bytes, whole or not at all; False: there is one already. Raises
        TierDown, Refused."""
        if not self._options.if_absent and await self.size(name) is not None:
            return False
        mode = "create" if self._options.if_absent else "overwrite"
        body = (ctypes.c_ubyte * nbytes).from_address(lease.at(0, nbytes))
        sent = weakref.ref(body)
        with held(lease):
            try:
                await self._obs.put_async(
                    self._store, self._path(name), memoryview(body).cast("B"), mode=mode,
                    use_multipart=False,
                )  # fmt: skip
            except self._obs.exceptions.AlreadyExistsError:
                return False
            except self._obs.exceptions.PermissionDeniedError as error:
                raise Refused(str(self._down("PUT", error))) from None
            except Exception as error:
                down = self._down("PUT", error)
                if "507 " in str(error):  # insufficient storage
                    raise Refused(str(down), Lost.NO_ROOM) from None
                raise down from None
            finally:
                del body  # from here on it is there as long as the client refers to it
                self.transfers.keep(lease, lambda: sent() is None)
        return True

    async def delete(self, name: str) -> None:
        try:
            await self._obs.delete_async(self._store, self._path(name))
        except FileNotFoundError:
            pass
        except Exception as error:
            raise self._down("DELETE", error) from None

    async def list(self) -> list[str]:
        """Names of all objects in the folder."""
        names: list[str] = []
        try:
            async for some in self._obs.list(self._store, prefix=self._folder):
                names += [each["path"].rpartition("/")[2] for each in some]
        except Exception as error:
            raise self._down("LIST", error) from None
        return names

    def key_of(self, name: str) -> str:
        """The object's whole name in the bucket, for other clients."""
        return "/".join([*filter(None, urlsplit(self._url).path.split("/")), self._path(name)])

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _settings(self) -> dict[str, Any]:
        """What the client is told beyond what it finds in the environment."""
        o, scheme = self._options, self._url.partition(":")[0]
        if scheme == "file":
            return {"mkdir": True}
        told: dict[str, Any] = {
            # An endpoint of http:// is meant so; by themselves the clouds are asked by https.
            "client_options": {
                "allow_http": True, "connect_timeout": "2s", "timeout": "60s",
                "pool_idle_timeout": _IDLE, "user_agent": "tierloom",
            },
            "retry_config": {
                "max_retries": o.retries,
                "retry_timeout": timedelta(seconds=60),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=50),
                    "max_backoff": timedelta(seconds=1),
                    "base": 2,
                },
            },
        }  # fmt: skip
        if o.endpoint:
            told["endpoint"] = o.endpoint
        if scheme != "s3":
            return told
        profile = find_profile(o.profile)
        region = o.region or (profile.region if profile else "")
        if region:
            told["region"] = region
        if profile:
            told["credential_provider"] = profile
        plain = o.endpoint or next(filter(None, map(os.environ.get, _ENDPOINTS)), "")
        over_tls = not plain.startswith("http:")
        told["unsigned_payload"] = over_tls if o.unsigned == "auto" else o.unsigned
        told["virtual_hosted_style_request"] = not o.path_style
        told["disable_bulk_delete"] = True  # many servers do not know it, and we seldom delete
        return told

    async def _look(self) -> None:
        """Ask for what is not there: the answer says whether the bucket is."""
        try:
            await self._obs.get_async(self._store, self._path("-"))
        except FileNotFoundError as error:
            if _NO_BUCKET.search(str(error)):
                raise ConfigError(f"{self._url}: the bucket does not exist; create it") from None
        except (
            self._obs.exceptions.PermissionDeniedError,
            self._obs.exceptions.UnauthenticatedError,
        ) as error:
            raise ConfigError(
                f"{self._url}: refused ({_answer(error)}): the credentials must allow list, get, "
                "put and delete; configs/s3.yaml says where they are searched"
            ) from None
        except Exception as error:
            if _REGION.search(str(error)):
                raise ConfigError(
                    f"{self._url}: the bucket is in another region: set `region`, or AWS_REGION"
                ) from None
            raise self._down("GET", error) from None

    async def _judged(self, name: str, start: int, error: Exception) -> Exception:
        """What a failed read was: where an object ends before `start`, servers answer in ways of
        their own, and it is not the bucket that failed."""
        down = self._down("GET", error)
        size = await self.size(name)
        if size == 0:
            return Damaged("it is empty")
        return down if size is not None and size > start else FileNotFoundError(name)

    def _down(self, verb: str, error: Exception) -> TierDown:
        """What happened, in words that are ours."""
        return TierDown(f"{self._url}: {verb} failed: {_answer(error)}")


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def _answer(error: Exception) -> str:
    """A status, a server's code, a cause: nothing else of an error's text is passed on."""
    text = str(error)
    found = dict.fromkeys(each.strip() for each in _ANSWER.findall(text))
    means = (meaning for word, meaning in _MEANS.items() if word in text)
    return ", ".join([type(error).__name__, *found, *means])
