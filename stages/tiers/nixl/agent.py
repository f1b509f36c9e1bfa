"""A NIXL agent with one backend, and one piece of memory registered with it once.

The client is a wheel per CUDA version; its plugins link libraries of their own, and one that cannot
be loaded is listed all the same. So the plugin is asked what memory it knows, and where it knows
none, loading it by hand tells which library is missing. Nothing tells when a transfer is through:
it is polled, at first after a moment, then after a share of the time it has taken so far.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tierloom.stages.errors import ConfigError, MissingPackage, TierDown
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.disk.direct_io import FileIO, read_all, write_all
from tierloom.stages.tiers.nixl.installed import WHEELS

_TICK = 0.0002  # seconds before the first look at a transfer
_PART = 16  # further looks are this part of its age apart
_SMALL = 64 << 10  # what a system call moves sooner than two looks at a transfer
_ALL = 1 << 48  # no file is longer


class Registered(Protocol):
    """Memory that an agent is to know."""

    @property
    def address(self) -> int: ...

    @property
    def total(self) -> int:
        """Bytes."""


class Agent:
    """Thread-safe only with `shared`."""

    def __init__(
        self, backend: str, params: Mapping[str, str], memory: Registered, *, shared: bool,
        name: str = "", polled: bool = False,
    ) -> None:  # fmt: skip
        """`shared`: called by several threads at once. `name`: by which other processes know it,
        and it is never used again. `polled`: no thread of NIXL's own moves anything. Raises
        ConfigError: no client, no plugin, or the plugin refuses its parameters, of which nothing
        is told."""
        api = _api(backend)
        self.backend = backend
        sync = api.nixl_thread_sync_t
        config = api.nixl_agent_config(
            backends=[],
            enable_prog_thread=not polled,
            sync_mode=sync.NIXL_THREAD_SYNC_RW if shared else sync.NIXL_THREAD_SYNC_NONE,
        )
        self.name = name or f"tierloom-{os.getpid()}-{secrets.token_hex(4)}"
        self._agent = api.nixl_agent(self.name, config)
        self._check()
        try:
            self._agent.create_backend(backend, dict(params))
        except Exception as error:
            raise ConfigError(
                f"NIXL's plugin {backend} cannot start ({_cause(error)}): "
                f"this machine lacks something it needs, or its options are wrong"
            ) from None
        self._memory = self.register([(memory.address, memory.total, 0, "")], "DRAM")

    def close(self) -> None:
        """Nothing may be under way any more."""
        self.deregister(self._memory)

    def destroy(self, transfers: Iterable[Transfer] = ()) -> None:
        """End it with what is under way: from now on it reads no memory, and writes none that it
        receives for. `transfers`: all of it that are not over."""
        for transfer in transfers:
            with suppress(Exception):
                self._agent.release_xfer_handle(transfer._handle)
            transfer.forget()
        self._agent.agent = None

    def register(self, rows: Sequence[tuple[int, int, int, str]], kind: str) -> Any:
        """Make memory, files or objects known, (address or 0, bytes, device, name) each."""
        try:
            return self._agent.register_memory(list(rows), kind, backends=[self.backend])
        except Exception as error:
            raise self._down("register", error) from None

    def deregister(self, registered: Any) -> None:
        try:
            self._agent.deregister_memory(registered, backends=[self.backend])
        except Exception as error:
            raise self._down("deregister", error) from None

    @property
    def metadata(self) -> bytes:
        """What another agent must be told to write into the memory registered here."""
        return bytes(self._agent.get_agent_metadata())

    def meet(self, metadata: bytes) -> str:
        """The name of the agent whose metadata it is; from now on it can be written to. Raises
        TierDown."""
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:
            raise self._down("meet", error) from None
        return name.decode() if isinstance(name, bytes) else str(name)

    def part(self, name: str) -> None:
        """Forget another agent."""
        with suppress(Exception):
            self._agent.remove_remote_agent(name)

    def notes(self) -> list[bytes]:
        """What other agents' transfers have told since the last call; moves what comes. Raises
        TierDown."""
        try:
            heard = self._agent.get_new_notifs()
        except Exception as error:
            raise self._down("look", error) from None
        return [note for notes in heard.values() for note in notes]

    def begin(
        self, verb: str, rows: Sequence[tuple[int, int, int]], kind: str, address: int, *,
        other: str = "", note: bytes = b"",
    ) -> Transfer:  # fmt: skip
        """Set out to READ or WRITE `rows` (offset, bytes, device) of a kind, one after another to
        or from host memory at `address`, all of it registered. `other`: the agent that they are
        of, where it is not this one. `note`: what it hears behind the last byte. Raises
        TierDown."""
        host = []
        for _, nbytes, _ in rows:
            host.append((address, nbytes, 0))
            address += nbytes
        agent = self._agent
        try:
            handle = agent.initialize_xfer(
                verb, agent.get_xfer_descs(host, "DRAM"), agent.get_xfer_descs(list(rows), kind),
                other or agent.name, note,
            )  # fmt: skip
            return Transfer(self, handle, agent.transfer(handle))
        except Exception as error:
            raise self._down(verb, error) from None

    def _check(self) -> None:
        known = self._agent.get_plugin_list()
        if self.backend not in known:
            raise ConfigError(
                f"NIXL does not find plugin {self.backend}; it has {', '.join(sorted(known))}: "
                "build it, and name its folder in NIXL_PLUGIN_DIR"
            )
        if not self._agent.get_plugin_mem_types(self.backend):
            cause = _why_not(self.backend)
            raise ConfigError(f"NIXL's plugin {self.backend} cannot be loaded: {cause}")

    def _down(self, verb: str, error: Exception) -> TierDown:
        return TierDown(f"NIXL {self.backend}: {verb} failed: {_cause(error)}")


class Transfer:
    """One under way. Its memory must stay leased until `done` has said True, or has raised."""

    def __init__(self, agent: Agent, handle: Any, state: str) -> None:
        self._agent, self._handle, self._state = agent, handle, state
        self._began = time.monotonic()

    @property
    def pause(self) -> float:
        """Seconds that the next look may wait."""
        return max(_TICK, (time.monotonic() - self._began) / _PART)

    def done(self) -> bool:
        """Look whether it is through. Raises TierDown when it failed; it is over then, too."""
        agent = self._agent._agent
        try:
            if self._state == "PROC":
                self._state = agent.check_xfer_state(self._handle)
            if self._state == "PROC":
                return False
            agent.release_xfer_handle(self._handle)
        except Exception as error:
            raise self._agent._down("transfer", error) from None
        if self._state != "DONE":
            raise TierDown(f"NIXL {self._agent.backend}: a transfer ended as {self._state}")
        return True

    def forget(self) -> None:
        """Its agent is being destroyed: the handle must neither keep it nor be released later."""
        self._handle._released, self._handle._agent = True, None


class NixlFileIO(FileIO):
    """Files by NIXL; for threads, each of which waits for its own transfer."""

    def __init__(self, backend: str, params: Mapping[str, str], arena: Arena) -> None:
        self._backend, self._params, self._arena = backend, params, arena
        self._agent: Agent | None = None
        self._files: dict[int, Any] = {}

    def start(self) -> None:
        """Raises ConfigError. A second time it does nothing."""
        if self._agent is None:
            self._agent = Agent(self._backend, self._params, self._arena, shared=True)

    def stop(self) -> None:
        """A thread whose caller was cancelled may still use a file: then the agent stays open."""
        agent, self._agent = self._agent, None
        if agent is not None and not self._files:
            agent.close()

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        assert self._agent is not None
        fd = super().open(path, flags, mode)
        try:
            self._files[fd] = self._agent.register([(0, _ALL, fd, "")], "FILE")
        except BaseException:
            super().close(fd)
            raise
        return fd

    def close(self, fd: int) -> None:
        try:
            registered = self._files.pop(fd)
            if self._agent is not None:
                self._agent.deregister(registered)
        finally:
            super().close(fd)

    def read(self, fd: int, view: memoryview, at: int) -> None:
        if len(view) <= _SMALL:
            read_all(fd, view, at)
        else:
            self._go("READ", fd, view, at)

    def write(self, fd: int, view: memoryview, at: int) -> None:
        if len(view) <= _SMALL:
            write_all(fd, view, at)
        else:
            self._go("WRITE", fd, view, at)

    def _go(self, verb: str, fd: int, view: memoryview, at: int) -> None:
        assert self._agent is not None
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        transfer = self._agent.begin(verb, [(at, len(view), fd)], "FILE", address)
        while not transfer.done():
            time.sleep(transfer.pause)


def _api(backend: str) -> Any:
    """The client's module. Raises ConfigError."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")  # it prints to the engine's own output
    for name in WHEELS:
        try:
            return import_module(f"{name}._api")
        except ImportError:  # noqa: PERF203
            continue
    more = " (a machine with CUDA 13: pip install nixl-cu13)"
    raise MissingPackage(f"nixl, the client of backend {backend},", "nixl", more)


def _why_not(backend: str) -> str:
    """Which library a plugin misses."""
    for folder in _plugin_folders():
        plugin = folder / f"libplugin_{backend}.so"
        if plugin.exists():
            try:
                ctypes.CDLL(str(plugin))
            except OSError as error:
                return f"{error}; install the package of that library"
            return "it loads, but supports no kind of memory"
    return "its file is missing"


def _plugin_folders() -> list[Path]:
    given = os.environ.get("NIXL_PLUGIN_DIR")
    folders = [Path(given)] if given else []
    for name in WHEELS[1:]:
        spec = find_spec(name)
        if spec is not None and spec.origin:
            folders.append(Path(spec.origin).parent.parent / f".{name}.mesonpy.libs/plugins")
    return folders


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
