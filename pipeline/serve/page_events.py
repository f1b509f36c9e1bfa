"""KV events for routers: which of SGLang's pages a pipeline keeps, and in what medium.

SGLang publishes what its GPU and its host memory have; what lies below, a router does not hear of.
Here it does, by the same page hashes and in the same form: batches of msgpack on a ZMQ PUB socket,
numbered, and sent again to who asks a ROUTER socket for those from a number on. Pages come without
their tokens, as vLLM's offloading says it, since no tier knows them. vLLM publishes for us itself
(`adapters/vllm/scheduler/kv_events.py`), by hashes of its own that only its scheduler has.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from queue import Empty, SimpleQueue
from typing import Any

from tierloom.pipeline.config.spec import PipelineSpec, ServeOptions
from tierloom.stages.errors import ConfigError, require
from tierloom.stages.kv.object import LINK

log = logging.getLogger("tierloom.serve")

_BATCH = 256  # changes told in one message
_REMEMBERED = 10_000  # messages that can be asked for again
_MOST_UNSENT = 100_000  # messages that wait for a subscriber; more are lost to it, and it asks
_TURN = 0.1  # seconds between two looks for who asks
_JOIN = 0.5  # seconds for subscribers to be there before the first message
_END = (-1).to_bytes(8, "big", signed=True)
_MEDIA = {"memory": "CPU_PINNED"}
"""By what a tier uses, in SGLang's words; all others are its DISK."""


class PageEvents:
    """A thread with its sockets, from `start` to `close`. What fails here fails nothing else."""

    def __init__(self, options: ServeOptions, spec: PipelineSpec) -> None:
        """Raises ConfigError."""
        if spec.chunk.keys != "sglang":
            raise ConfigError(
                "serve.events: only SGLang's page hashes can be told to a router, which "
                "`chunk: {keys: sglang}` names chunks by; vLLM tells of our chunks itself, where "
                "its --kv-events-config says so"
            )
        require("events", "zmq", "msgspec")
        self._options, self._page = options, spec.chunk.grain
        self._media = {t: _MEDIA.get(spec.tiers[t].use, "DISK") for t in options.tiers}
        self._held: dict[str, Counter[int]] = {t: Counter() for t in options.tiers}
        self._changes: SimpleQueue[tuple[str, bool, bytes] | None] = SimpleQueue()
        self._told: deque[tuple[bytes, bytes]] = deque(maxlen=_REMEMBERED)
        self._number = 0
        self._thread = threading.Thread(target=self._run, name="tierloom-events", daemon=True)

    def note(self, tier: str, kept: bool, links: bytes) -> None:
        """As `TierWatch`, for tiers that are served; any thread."""
        if tier in self._media:
            self._changes.put((tier, kept, links))

    def start(self) -> None:
        """Nothing is published, and the log says why, where the port is another's."""
        self._thread.start()

    def close(self) -> None:
        """What was noted before is still published. Idempotent."""
        self._changes.put(None)
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        import zmq

        context: Any = zmq.Context.instance()
        sockets = [context.socket(zmq.PUB)]
        try:
            self._set_up(sockets, context, zmq)
            self._publish_all(*sockets)
        except Exception:
            log.exception("no KV events are published to routers any more")
        finally:
            self._media = {}  # and nothing is queued any more
            for socket in sockets:
                socket.close(linger=200)

    def _set_up(self, sockets: list[Any], context: Any, zmq: Any) -> None:
        """As vLLM and SGLang: to every address they bind, to one host they connect."""
        at = self._options.events
        everyone = ("*" in at, "::" in at, "0.0.0.0" in at, at.startswith("ipc://"))
        sockets[0].set_hwm(_MOST_UNSENT)
        (sockets[0].bind if any(everyone) else sockets[0].connect)(at)
        if self._options.events_replay:
            sockets.append(context.socket(zmq.ROUTER))
            sockets[1].set_hwm(_MOST_UNSENT)
            sockets[1].bind(self._options.events_replay)

    def _publish_all(self, pub: Any, replay: Any = None) -> None:
        from msgspec.msgpack import Encoder

        topic, encode = self._options.events_topic.encode(), Encoder().encode
        ended = False
        time.sleep(_JOIN)
        while not ended:
            if replay is not None and replay.poll(0):
                self._answer(replay, topic)
            events: list[dict[str, Any]] = []
            try:
                change = self._changes.get(timeout=_TURN)
                while change is not None:
                    events += self._event(*change)
                    if len(events) >= _BATCH:
                        break
                    change = self._changes.get_nowait()
                ended = change is None
            except Empty:
                pass
            if events:
                number, told = self._number.to_bytes(8, "big"), encode([time.time(), events])
                self._number += 1
                self._told.append((number, told))
                pub.send_multipart((topic, number, told))

    def _answer(self, replay: Any, topic: bytes) -> None:
        """Send what is remembered from a number on, and that it was all."""
        asked = replay.recv_multipart()
        if len(asked) != 3:
            return
        who, _, first = asked
        for number, told in self._told:
            if number >= first:
                replay.send_multipart((who, b"", topic, number, told))
        replay.send_multipart((who, b"", b"", _END, b""))

    def _event(self, tier: str, kept: bool, links: bytes) -> list[dict[str, Any]]:
        """An object came or went: its pages that no other object of the tier has."""
        held, new = self._held[tier], []
        for at in range(0, len(links), LINK):
            page = int.from_bytes(links[at : at + 8], "big", signed=True)  # as SGLang's events
            if kept:
                held[page] += 1
                if held[page] == 1:
                    new.append(page)
            elif page in held:
                held[page] -= 1
                if not held[page]:
                    del held[page]
                    new.append(page)
        if not new:
            return []
        said = {"block_hashes": new, "medium": self._media.get(tier), "ownership": "tierloom"}
        if not kept:
            return [{"type": "BlockRemoved"} | said]
        unsaid: dict[str, Any] = {
            "parent_block_hash": None,
            "token_ids": [],
            "lora_id": None,
            "lora_name": None,
        }
        return [{"type": "BlockStored", "block_size": self._page} | said | unsaid]
