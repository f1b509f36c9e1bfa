"""What a pipeline serves, told to a directory as it comes and goes."""

from __future__ import annotations

import logging
import os
import socket
import threading

import anyio

from tierloom.pipeline.config.spec import PipelineSpec, ServeOptions
from tierloom.stages.directory.shared.announcer import Announcer
from tierloom.stages.directory.shared.contract import Directory
from tierloom.stages.directory.shared.named import named_directory
from tierloom.stages.directory.shared.records import MOST_TIERS, WorkerRecord, chunk_name
from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.object import LINK
from tierloom.stages.kv.text import Text
from tierloom.stages.tiers.memory.lent import LENT

log = logging.getLogger("tierloom.serve")

_AGAIN = 5.0
"""Seconds between two tries to reach a directory at the start."""
_LEAVE = 1.0
"""Seconds that it may take to say that this engine ends."""


class AnnouncedTiers:
    """From `run` to its cancellation, on the pipeline's loop. What fails here fails nothing else:
    others then do not find what this engine has."""

    def __init__(self, options: ServeOptions, spec: PipelineSpec, names: Namespace) -> None:
        """Raises ConfigError."""
        self._tiers = [*options.tiers, *([LENT] if options.lend else [])]
        if len(self._tiers) > MOST_TIERS:
            raise ConfigError(
                f"serve.tiers: a directory is told of {MOST_TIERS} at most, what is lent among them"
            )
        self._directory: Directory = named_directory(options.directory)
        self._options, self._spec, self._names = options, spec, names
        self._lock = threading.Lock()
        self._early: list[tuple[str, bytes, bool]] | None = []
        """What came and went before anything could be told."""
        self._announcer: Announcer | None = None
        self._address = ""
        self._listening = anyio.Event()

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

    def listens_at(self, address: str, process: str) -> None:
        """Others reach it there; on the loop. `process`: 32 hex digits that the listener greets
        with."""
        instance = self._options.instance or f"{socket.gethostname()}-{os.getpid()}-{process[:4]}"
        chunk, names = self._spec.chunk, self._names
        # Ranks of an engine have its name alike, and each its share of the model.
        share = names.digest.hex()[:8] if self._options.instance else ""
        record = WorkerRecord(
            instance=instance, process=process, share=share, model=names.model,
            namespace=names.digest.hex(), chunk=chunk.tokens, grain=chunk.grain, keys=chunk.keys,
            tiers=tuple(self._tiers), addresses=(address,),
        )  # fmt: skip
        self._announcer = Announcer(self._directory, record)
        while True:
            with self._lock:
                early, self._early = self._early or [], []
                if not early:
                    self._early = None
                    break
            for tier, key, kept in early:
                self._tell(tier, key, kept)
        self._listening.set()

    async def run(self) -> None:
        await self._listening.wait()
        announcer = self._announcer
        assert announcer is not None
        try:
            await self._open()
            await announcer.run()
        finally:
            with anyio.move_on_after(_LEAVE, shield=True):
                await announcer.leave()
                await self._directory.close()

    async def _open(self) -> None:
        told = False
        while (why := await self._refusal()) is not None:
            if not told:
                log.warning("the directory is not told what is kept here: %s", why)
            told = True
            await anyio.sleep(_AGAIN)

    async def _refusal(self) -> Exception | None:
        """Why the directory cannot be opened now."""
        try:
            await self._directory.open()
        except (ConfigError, TierDown, OSError, TimeoutError) as error:
            return error
        return None

    def _tell(self, tier: str, key: bytes, kept: bool) -> None:
        assert self._announcer is not None
        name = chunk_name(self._names.digest, key)
        self._announcer.note(name, self._tiers.index(tier), kept)
