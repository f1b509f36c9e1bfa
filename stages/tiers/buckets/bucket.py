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
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

from tierloom.stages.errors import ConfigError, Damaged, MissingPackage, TierDown
from tierloom.stages.memory.arena import Lease
from tierloom.stages.memory.held import Transfers, held
from tierloom.stages.tiers.buckets.aws_profile import find_profile

SCHEMES = ("s3", "gs", "az", "file")
"""Beginnings of a bucket's address."""
_IDLE = "15s"  # how long a connection is kept unused; those to a host that is gone must not pile up
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist")
_ANSWER = re.compile(r"(?<=status code: )\d{3} [A-Za-z ]+|(?<=<Code>)\w+|(?<=HTTP error: )[\w ]+")
_NEEDS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and its key",
    "file": "choose a folder with write permission",
}


class Bucket:
    """The objects of one folder in a bucket. `open()` comes first."""

    def __init__(
        self, url: str, *, folder: str, endpoint: str, region: str, profile: str,
        path_style: bool, unsigned: bool | Literal["auto"], if_absent: bool, retries: int,
    ) -> None:  # fmt: skip
        self._url, self._folder = url, folder
        self._endpoint, self._region, self._profile = endpoint, region, profile
        self._path_style, self._unsigned = path_style, unsigned
        self._if_absent, self._retries = if_absent, retries
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
        """The lease's first bytes, whole or not at all; False: there is one already."""
        if not self._if_absent and await self.size(name) is not None:
            return False
        mode = "create" if self._if_absent else "overwrite"
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
            except Exception as error:
                raise self._down("PUT", error) from None
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
        scheme = self._url.partition(":")[0]
        if scheme == "file":
            return {"mkdir": True}
        told: dict[str, Any] = {
            # An endpoint of http:// is meant so; by themselves the clouds are asked by https.
            "client_options": {
                "allow_http": True, "connect_timeout": "2s", "timeout": "60s",
                "pool_idle_timeout": _IDLE, "user_agent": "tierloom",
            },
            "retry_config": {
                "max_retries": self._retries,
                "retry_timeout": timedelta(seconds=60),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=50),
                    "max_backoff": timedelta(seconds=1),
                    "base": 2,
                },
            },
        }  # fmt: skip
        if self._endpoint:
            told["endpoint"] = self._endpoint
        if scheme != "s3":
            return told
        profile = find_profile(self._profile)
        region = self._region or (profile.region if profile else "")
        if region:
            told["region"] = region
        if profile:
            told["credential_provider"] = profile
        plain = self._endpoint or next(filter(None, map(os.environ.get, _ENDPOINTS)), "")
        told["unsigned_payload"] = (
            not plain.startswith("http:") if self._unsigned == "auto" else self._unsigned
        )
        told["virtual_hosted_style_request"] = not self._path_style
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
    found = dict.fromkeys(each.strip() for each in _ANSWER.findall(str(error)))
    return ", ".join([type(error).__name__, *found])
