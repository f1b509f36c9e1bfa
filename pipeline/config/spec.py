"""A checked pipeline as frozen data: what `check` makes, `lower` cuts and `explain` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tierloom.pipeline.config.problems import Place
from tierloom.stages.contract.stage import ChunkOptions, PortType, Stage
from tierloom.stages.options import Rate, Seconds, Size
from tierloom.stages.tiers.contract.tier import Tier
from tierloom.stages.tiers.landing.options import PeerWire, WireOptions
from tierloom.stages.tiers.net.address import Address

WhenFull = Literal["block", "drop", "spill"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much may be under way at once."""

    arena: Size = 1 << 30
    """Bytes of host memory for requests under way; memory tiers have theirs on top."""
    inflight: int = 512
    """Requests under way; more are refused, as misses and skipped stores."""
    threads: int = 4
    """Threads for copies, codecs and disk I/O."""
    touch: bool = True
    """Servers and engines have memory made ready ahead of its first use, a little at a time."""

    def __post_init__(self) -> None:
        if self.arena < 1 << 20:
            raise ValueError("arena must be at least 1 MiB")
        if min(self.inflight, self.threads) < 1:
            raise ValueError("inflight and threads must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Whether a graph follows the model layer by layer."""

    by: Literal["layer", "request"] = "request"
    """`layer`: frames travel in model order and each has a gate; `request`: all at once."""
    window: int = 2
    """Layer groups in flight beyond the one that the model is at."""
    idle: Seconds = 60.0
    """Layer-wise calls only: a request is cancelled this long after the model's last call. The
    graph's deadline then bounds each of the model's waits, not the time between them."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError("window must be at least 1")
        if self.idle <= 0:
            raise ValueError("idle must be greater than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Options of the wire into a stage; they may stand on any stage."""

    when_full: WhenFull | None = None
    """What a full wire does to its sender: `block` waits, `drop` counts the batch as lost, `spill`
    lets the wire grow, bounded by the arena alone. Not said: `block`, and `drop` on all but a
    fork's first branch."""
    depth: int = 64
    """Batches that the wire holds."""
    width: int = 8
    """Batches that the stage works on at once."""

    def __post_init__(self) -> None:
        if min(self.depth, self.width) < 1:
            raise ValueError("depth and width must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphOptions:
    """What may be said of a graph besides its stages."""

    pace: Pace = Pace()
    """Whether frames travel layer by layer."""
    deadline: Seconds = 5.0
    """Time a request may take, from the call on; then it is a miss or a skipped store."""
    on_error: Literal["skip", "partial"] = "partial"
    """`skip`: one lost chunk cancels the rest of its request; `partial`: the others go on."""

    def __post_init__(self) -> None:
        if self.deadline <= 0:
            raise ValueError("deadline must be greater than 0")


@dataclass(frozen=True, slots=True)
class Node:
    """One stage of a graph."""

    id: str
    use: str
    cls: type[Stage]
    options: Any
    source: str | None
    """Id of the stage whose output it reads; None: the graph's input."""
    takes: PortType
    gives: PortType
    wire: Wire
    place: str
    """`file:line:col`, for messages."""

    def keeps_in(self) -> tuple[str, ...]:
        """Tiers that it puts into: those that an option names singly."""
        values = (getattr(self.options, name) for name in self.cls.tier_options)
        return tuple(v for v in values if isinstance(v, str))

    def reads(self, tiers: Iterable[str]) -> tuple[str, ...]:
        """Which of `tiers` it reads: those that an option lists, or all where it lists none."""
        kinds = get_type_hints(self.cls.Options)
        lists = [o for o in self.cls.tier_options if _is_list(kinds[o])]
        wanted = [getattr(self.options, name) for name in lists]
        return tuple(t for t in tiers if any(w is None or t in w for w in wanted))


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in an order in which every source is before its readers."""

    name: str
    options: GraphOptions
    nodes: tuple[Node, ...]

    def readers(self, id: str | None) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes if n.source == id)


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier, named as the YAML names it."""

    name: str
    use: str
    cls: type[Tier]
    options: Any
    breaker: Breaker
    place: Place
    """Without the line itself, which may hold a password."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Breaker:
    """When a failing tier is left alone; may stand on any tier."""

    timeout: Seconds = 2.0
    """Longest wait for one call to the tier; its request's deadline may be sooner."""
    fails: int = 3
    """Failures in a row that open the breaker."""
    probe: Seconds = 1.0
    """How long an open breaker waits before it lets one call through."""

    def __post_init__(self) -> None:
        if self.fails < 1 or self.timeout <= 0 or self.probe <= 0:
            raise ValueError("fails, timeout and probe must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """What a pipeline gives to other engines out of its own tiers, for reading."""

    listen: str = "127.0.0.1:0"
    """`HOST:PORT`, `tls://HOST:PORT` or `unix:///PATH`; port 0: one that is free. Other hosts are
    let in only if there is a token."""
    advertise: str = "auto"
    """`HOST` or `HOST:PORT` by which others reach it. `auto`: what it listens at, or this host's
    address where that is every address."""
    tiers: list[str]
    """Tiers to serve, best first; each with an index in this process, as memory and disk have."""
    directory: str = ""
    """Where other engines look up what this one has: `redis://HOST:PORT/DB`, whose password may be
    in the environment variable TIERLOOM_DIRECTORY_PASSWORD; `directory://HOST:PORT` of who hosts
    one; or `embedded`, to host it at `listen`, as others then name it. Empty: they must name this
    engine."""
    instance: str = ""
    """This engine's name there, which no other has. Default: made of its host and process."""
    events: str = ""
    """Where routers hear of what comes and goes in these tiers, as KV events on a ZMQ socket:
    `tcp://*:5558`, to which they connect, or `tcp://HOST:PORT` of one that listens. With
    `chunk.keys: sglang` alone. Empty: nowhere."""
    events_replay: str = ""
    """Where they ask for events that they missed: `tcp://*:5559`."""
    events_topic: str = ""
    """What the events are published under."""
    token_file: str = ""
    """File with the token to ask for, and to show to who hosts the directory. Default: the
    environment variable TIERLOOM_TOKEN, if set."""
    ca_file: str = ""
    """PEM file of the certificate authorities to trust, for a directory with TLS. Default: the
    system's."""
    cert_file: str = ""
    """PEM file of the certificate, for `tls://`."""
    key_file: str = ""
    """PEM file of its key."""
    lend: Size = 0
    """Bytes of memory that is not in use here in which other engines may put what theirs evicts. It
    goes first when this one needs the room; 0: nothing is lent."""
    limit: Rate = 0
    """Bytes per second to give to all others together; 0: no limit."""
    ticket: Seconds = 30.0
    """How long what was computed for another engine is kept for it after its last chunk came."""
    clients: int = 64
    """Most connections at once; for a directory that is hosted here an engine takes up to 4."""
    wire: PeerWire = "inline"
    """How objects go to engines that ask for it: `inline` in the connection, by `nixl` into their
    memory; `auto`: by NIXL where it is installed, unless the connection is encrypted. No token
    guards NIXL's own ports: for networks that are trusted."""
    nixl: WireOptions = field(default_factory=WireOptions)
    """NIXL's backend; both sides need the same."""

    def __post_init__(self) -> None:
        if not self.tiers:
            raise ValueError("tiers: name at least one")
        if not self.events and (self.events_replay or self.events_topic):
            raise ValueError("events_replay and events_topic need events")
        if not all("://" in at for at in (self.events, self.events_replay) if at):
            raise ValueError("events and events_replay: write tcp://HOST:PORT")
        if self.clients < 1:
            raise ValueError(f"clients must be at least 1, got {self.clients}")
        if self.wire not in get_args(PeerWire):
            raise ValueError(f"wire is {self.wire!r}; known: {', '.join(get_args(PeerWire))}")
        if self.ticket <= 0:
            raise ValueError(f"ticket must be positive, got {self.ticket}")
        if bool(self.cert_file) != bool(self.key_file) or self.at.tls != bool(self.cert_file):
            raise ValueError("tls:// needs cert_file and key_file, which are for it alone")
        try:
            self.reached_at("", 1)
        except ValueError:
            raise ValueError(f"advertise {self.advertise!r}: write HOST or HOST:PORT") from None

    @property
    def at(self) -> Address:
        """Where to listen. Raises ValueError."""
        url = self.listen if "://" in self.listen else f"tcp://{self.listen}"
        return Address.parse(url, "tcp", tls="tls", unix="unix")

    def reached_at(self, host: str, port: int) -> tuple[str, int]:
        """Where others dial what listens at `port`. `host`: for `auto`."""
        if self.advertise == "auto":
            return host, port
        named = Address.parse(f"tcp://{self.advertise}", "tcp", port=port)
        return named.host, named.port


@dataclass(frozen=True, kw_only=True, slots=True)
class HandoffOptions:
    """How a pipeline fetches what another engine computes for it, into its own memory."""

    peers: list[str] = field(default_factory=list)
    """Engines that may be asked: `HOST`, or `HOST:PORT`; one may be several, with commas between.
    None: those that prove to have the token."""
    token_file: str = ""
    """File with the token they ask for. Default: the environment variable TIERLOOM_TOKEN."""
    tls: bool = False
    """They listen at `tls://`."""
    ca_file: str = ""
    """PEM file of the certificate authorities to trust. Default: the system's."""
    wait: Seconds = 2.0
    """How long a request waits after the last bytes that came; 0: it is computed at once."""
    connections: int = 32
    """Most requests for which one engine is asked at once."""
    offers: bool = False
    """Engines that compute may say, at `serve`, when there is something to fetch: for LMCache's
    proxy, which tells this engine of nothing."""
    proxy: str = ""
    """`HOST:PORT` at which LMCache's proxy waits to hear that a prompt has come; for engines that
    compute, whose decoders are `peers`. Needs pyzmq."""

    def __post_init__(self) -> None:
        if self.connections < 1 or self.wait < 0:
            raise ValueError("connections must be at least 1, wait not negative")
        if self.proxy:
            Address.parse(f"tcp://{self.proxy}", "tcp")
        _ = self.named

    @property
    def named(self) -> set[tuple[str, int]]:
        """Hosts and ports of `peers`; port 0: any. Raises ValueError."""
        words = (word.strip() for entry in self.peers for word in entry.split(","))
        found = [Address.parse(f"tcp://{word}", "tcp", port=-1) for word in words if word]
        return {(a.host, max(a.port, 0)) for a in found}


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineOptions:
    """What may be said of a pipeline besides its tiers and graphs."""

    name: str = ""
    """Its name, for logs and metrics; the file's name when not said."""
    order: Literal["auto", "canonical", "native"] = "auto"
    """How KV is kept: as the engine has it (`native`), in the one order that engines can share
    (`canonical`), or whichever costs less (`auto`)."""
    verify: Literal["always", "remote"] = "always"
    """`always`: every frame is checked before it is placed; `remote`: memory is trusted."""
    chunk: ChunkOptions = field(default_factory=ChunkOptions)
    """How prompts are cut."""
    budget: Budget = field(default_factory=Budget)
    """How much may be under way at once."""
    serve: ServeOptions | None = None
    """What other engines may read out of this pipeline's tiers; not said: nothing."""
    handoff: HandoffOptions | None = None
    """What is fetched that other engines compute for this one; not said: nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSpec(PipelineOptions):
    """A whole YAML file, checked."""

    source: str
    """The file it was read from."""
    tiers: dict[str, TierSpec]
    graphs: dict[str, Graph]

    def __repr__(self) -> str:
        tiers = ", ".join(f"{t.name} ({t.use})" for t in self.tiers.values()) or "none"
        graphs = ", ".join(self.graphs) or "none"
        return f"<PipelineSpec {self.name}, tiers: {tiers}, graphs: {graphs}>"

    def _repr_html_(self) -> str:
        from tierloom.pipeline.config.picture import pipeline_svg

        return pipeline_svg(self)


def _is_list(kind: Any) -> bool:
    return list in {get_origin(k) for k in (kind, *get_args(kind))}
