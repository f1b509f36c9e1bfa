"""What a pipeline serves, told to a directory as it comes and goes."""

from __future__ import annotations

import os
import re
import socket
import threading
from dataclasses import replace

import anyio

from tierloom.pipeline.config.spec import PipelineSpec, ServeOptions
from tierloom.stages.directory.shared.announcer import Announcer
from tierloom.stages.directory.shared.described import DOOR, described, token_bytes_of
from tierloom.stages.directory.shared.hosted import DirectoryHost
from tierloom.stages.directory.shared.named import EMBEDDED, named_directory
from tierloom.stages.directory.shared.records import MOST_TIERS, WorkerRecord, chunk_name
from tierloom.stages.errors import ConfigError, InputError
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.object import LINK
from tierloom.stages.kv.text import Text
from tierloom.stages.tiers.memory.lent import LENT

_HOST = re.compile(r"(?<=://)(\[[^]]+\]|[^:/\[]+)(?=:\d+$)")
_ANY = re.compile(r"(?<=://)(0\.0\.0\.0|\[::\])(?=:)")
_LEAVE = 1.0
"""Seconds that it may take to say that this engine ends."""


class AnnouncedTiers:
    """From `run` to its cancellation, on the listener's loop. What fails here fails nothing else:
    others then do not find what this engine has."""

    def __init__(
        self, options: ServeOptions, spec: PipelineSpec, names: Namespace, geometry: Geometry,
        process: str,
    ) -> None:  # fmt: skip
        """`process`: 32 hex digits that the listener greets with. Raises ConfigError."""
        self._tiers = [*options.tiers, *([LENT] if options.lend else [])]
        if len(self._tiers) > MOST_TIERS:
            raise ConfigError(
                f"serve.tiers: a directory is told of {MOST_TIERS} at most, what is lent among them"
            )
        self._directory = named_directory(
            options.directory, token_file=options.token_file, ca_file=options.ca_file
        )
        self._options, self._namespace = options, names.digest
        chunk = spec.chunk
        nbytes = geometry.frame_bytes(geometry.layers, chunk.tokens) // chunk.tokens
        # Ranks of an engine have its name alike, and each its share of the model.
        share = names.digest.hex()[:8] if options.instance else ""
        try:
            self._record = WorkerRecord(
                instance=options.instance or f"{socket.gethostname()}-{os.getpid()}-{process[:4]}",
                process=process, share=share, model=names.model, namespace=names.digest.hex(),
                chunk=chunk.tokens, grain=chunk.grain, keys=chunk.keys, tiers=tuple(self._tiers),
                fields=described(names, nbytes),
            )  # fmt: skip
        except InputError as error:
            raise ConfigError(f"serve: the directory takes no such {error}") from None
        self._lock = threading.Lock()
        self._early: list[tuple[str, bytes, bool]] | None = []
        """What came and went before anything could be told."""
        self._announcer: Announcer | None = None
        self._address = ""

    @property
    def host(self) -> DirectoryHost | None:
        """Of the directory, where others reach it by this engine's listener."""
        return DirectoryHost(self._directory) if self._options.directory == EMBEDDED else None

    def describe(self, names: Namespace | None = None, *, door: str = "") -> None:
        """Tell the directory what chains begin with, where that is another namespace than this
        worker's own; and at which URL its door is. Any thread."""
        with self._lock:
            fields = dict(self._record.fields)
            if names is not None:
                fields |= described(names, token_bytes_of(self._record))
            if door:
                fields[DOOR] = door
            if fields == self._record.fields:
                return
            self._record = replace(self._record, fields=fields)
            if self._announcer is not None:
                self._announcer.introduce(self._reached())

    def note(self, tier: str, kept: bool, links: bytes, text: Text | None = None) -> None:
        """As `TierWatch`, for tiers that are served; any thread."""
        if tier not in self._tiers:
            return
        key = links[-LINK:]
        with self._lock:
            if self._early is not None:
                self._early.append((tier, key, kept))
                return
        self._tell(tier, key, kept)

    async def run(self, address: str) -> None:
        """Others reach it at `address`."""
        with self._lock:
            self._address = address
            self._announcer = announcer = Announcer(self._directory, self._reached())
        while True:
            with self._lock:
                early, self._early = self._early or [], []
                if not early:
                    self._early = None
                    break
            for tier, key, kept in early:
                self._tell(tier, key, kept)
        try:
            await announcer.run()
        finally:
            with anyio.move_on_after(_LEAVE, shield=True):
                await announcer.leave()
                await self._directory.close()

    def _reached(self) -> WorkerRecord:
        """With the addresses that others can dial: a door that listens at every one is at that."""
        host, fields = _HOST.search(self._address), dict(self._record.fields)
        if host is not None and DOOR in fields:
            fields[DOOR] = _ANY.sub(host[0], fields[DOOR])
        return replace(self._record, addresses=(self._address,), fields=fields)

    def _tell(self, tier: str, key: bytes, kept: bool) -> None:
        assert self._announcer is not None
        name = chunk_name(self._namespace, key)
        self._announcer.note(name, self._tiers.index(tier), kept)
