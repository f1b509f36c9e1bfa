"""What an engine's adapter must know of a pipeline, and set in it, before it is opened or then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.stages.ops.lookup import Lookup

if TYPE_CHECKING:
    from tierloom.pipeline.pipeline import Pipeline


def lookup_node(spec: PipelineSpec) -> Any:
    """The lookup stage of the retrieve graph, if there is one."""
    graph = spec.graphs.get("retrieve")
    return next((n for n in graph.nodes if issubclass(n.cls, Lookup)), None) if graph else None


def keeps_content(spec: PipelineSpec) -> bool:
    """Stores keep text with its token ids."""
    graph = spec.graphs.get("store")
    nodes = graph.nodes if graph else ()
    return any(issubclass(n.cls, Lookup) and n.options.by == "content" for n in nodes)


def asked_tiers(spec: PipelineSpec) -> list[str]:
    """The tiers that a retrieve asks, best first."""
    plan = lookup_node(spec)
    return (plan.options.tiers if plan else None) or list(spec.tiers)


def own_ports(spec: PipelineSpec, number: int) -> dict[str, Any]:
    """Overrides by which process `number` of an engine serves beside number 0, where that has a
    port or a path that is not chosen by the system."""
    if spec.serve is None or not number:
        return {}
    at, ours = spec.serve.at, {}
    if at.path:
        ours["serve.listen"] = f"unix://{at.path}.{number}"
    elif at.port:
        ours["serve.listen"] = f"{'tls' if at.tls else 'tcp'}://{_at(at.host, at.port + number)}"
    host, port = spec.serve.reached_at("", 0)
    if port:
        ours["serve.advertise"] = _at(host, port + number)
    return ours


def _at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_paths(spec: PipelineSpec, folder: str) -> dict[str, Any]:
    """Overrides that put what only one process may use below `folder`; none where that is empty."""
    return {
        f"tiers.{name}.path": f"{tier.options.path}/{folder}"
        for name, tier in spec.tiers.items()
        if folder and tier.cls.local and hasattr(tier.options, "path")
    }


def touch_ahead(pipeline: Pipeline) -> None:
    """Have its memory made ready before it is needed, unless the file says `budget.touch: false`:
    an engine lives so long that all of it will be used."""
    if pipeline.spec.budget.touch and not pipeline.off:
        pipeline.arena.touch_ahead()
